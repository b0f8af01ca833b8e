"""The folder of a run: written whole or not at all, refused where it is something else's, resumed or set aside."""
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from glob import glob

from data import InputError, Sample, several
from plumbing.processes import barrier, broadcast, is_main, launch_store, restarts

ASIDE = ".before-restart"  # of a stage's folder: the run that --restart replaces, until the new one is complete
SAME_RESULT = {"restart", "token_budget", "slots", "cuda_graphs", "fused_loss", "save_every", "eval_data", "eval_every",
               "eval_questions", "gradient_checkpointing", "ref_offload", "patience", "plan", "gpus", "gpu_gb",
               "skip_bad_images", "recipe"}


def write_text(path: str, text: str):
    """Write a file in one go: under a temporary name, flushed, renamed."""
    with open(path + ".writing", "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".writing", path)


@contextlib.contextmanager
def replaced_folder(path: str):
    """A folder to write into that takes the place of `path` only when the block has ended well."""
    writing, old = f"{path}.writing", f"{path}.old"
    for leftover in (writing, old):
        shutil.rmtree(leftover, ignore_errors=True)
    os.makedirs(writing)
    yield writing
    if os.path.exists(path):
        os.rename(path, old)
    os.rename(writing, path)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: str) -> list[str]:
    """Names of the complete checkpoints, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.startswith("step-") and name.removeprefix("step-").isdigit())


def digest(*parts) -> str:
    """Of bytes as they are, of anything else as it is printed."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part if isinstance(part, bytes) else repr(part).encode()).digest())
    return whole.hexdigest()[:12]


def weights_id(folder: str) -> str:
    """A digest of a model's files, of each the size and up to three megabytes: its beginning, middle and end. Another
    model in the same folder has another, for training moves every weight."""
    parts = []
    for path in sorted(glob(os.path.join(folder, "*.json")) + glob(os.path.join(folder, "*.safetensors"))):
        size = os.path.getsize(path)
        parts += [os.path.basename(path), size]
        with open(path, "rb") as file:
            for place in {0, size // 2, max(0, size - (1 << 20))}:
                file.seek(place)
                parts.append(file.read(1 << 20))
    return digest(*parts)


def fingerprints(config, model_folder: str, samples: list[Sample], *prompt: str) -> dict[str, str]:
    """What a run depends on and its flags do not say. Of an image file only the name counts, since the folder may be
    mounted elsewhere, and a file that has gone bad is what --skip_bad_images is for."""
    clip = [weights_id(config.clip)] if config.clip_weight > 0 and os.path.isdir(config.clip) else []
    rows = ((sample.qid, sample.question, sample.answer, sample.key_words, sample.choices, sample.solution,
             [digest(image) if isinstance(image, bytes) else os.path.basename(str(image)) for image in sample.images])
            for sample in samples)
    return {"rows of --data": digest(*rows), "prompt template": digest(*prompt),
            "weights of --model": weights_id(model_folder), "weights of --clip": digest(*clip)}


def inside(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def check_folder(config, folder: str, prints: dict[str, str]):
    """Refuse to mix this run with what lies in its folder, and to write over its own input. prints: `fingerprints`."""
    for name in ("model", "data"):
        if any(inside(path, folder) for path in several(getattr(config, name))) and (
                config.restart or config.stage == "sample"):
            raise InputError(f"--{name} {getattr(config, name)} lies in {folder}, which this run replaces: "
                             "give another --out")
    try:
        os.makedirs(config.out or ".", exist_ok=True)
        writable = os.access(config.out or ".", os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"--out {config.out}: no folder can be made or written there")
    path = os.path.join(folder, "config.json")
    if config.stage == "sample" or not os.path.isdir(folder) or not os.listdir(folder):
        return
    try:
        with open(path) as f:
            found = dict(json.load(f))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} has no readable config.json, so it is no run to resume or replace: move it away, "
                         "or give another --out") from error
    changed = [f"--{name} was {found.get(name)} and is {value}" for name, value in dataclasses.asdict(config).items()
               if found.get(name) != value and name not in SAME_RESULT]
    kept = found.get("fingerprints", {})  # a run of an older version has none
    changed += [f"the {name} changed" for name, value in prints.items() if kept.get(name, value) != value]
    if changed and not config.restart:
        raise InputError(f"{folder} holds a run with other settings ({', '.join(changed)}): "
                         "give another --out, or --restart to replace it")


def set_aside(folder: str):
    """Move a run out of the way of the one that replaces it; a restart that never got to its end is just deleted."""
    if os.path.exists(folder + ASIDE) and not os.path.exists(os.path.join(folder, "model")):
        shutil.rmtree(folder)
    else:
        shutil.rmtree(folder + ASIDE, ignore_errors=True)
        os.rename(folder, folder + ASIDE)


def prepare_folder(folder: str, config, prints: dict[str, str]) -> int:
    """Make a stage's folder ready, resuming what the same command left there; returns the step to start at.

    With --restart the old run is set aside, and dropped only when the new one is complete (`drop_old_run`). When
    torchrun restarts us, the folder already holds our own checkpoints: these are resumed, not set aside.
    """
    folder = os.path.realpath(folder)  # it may be a link to a larger disk
    if is_main():
        mark = f"replaced {folder}"
        if config.restart and os.path.exists(folder) and not (restarts() and launch_store().check([mark])):
            set_aside(folder)
        if config.restart:
            launch_store().set(mark, "")
        os.makedirs(os.path.join(folder, "rollouts"), exist_ok=True)
        settings = dataclasses.asdict(config) | {"fingerprints": prints}
        write_text(os.path.join(folder, "config.json"), json.dumps(settings, indent=1))
    barrier()
    names = broadcast(checkpoints(os.path.join(folder, "checkpoints")))
    step = int(names[-1].removeprefix("step-")) if names else 0
    if is_main():
        metrics = os.path.join(folder, "metrics.jsonl")
        lines = open(metrics).readlines() if os.path.exists(metrics) else []
        write_text(metrics, "".join(lines[:step]))  # what came after the checkpoint is done again
    return step


def drop_old_run(folder: str):
    """Delete what --restart had set aside: the run that takes its place is complete."""
    if is_main():
        shutil.rmtree(os.path.realpath(folder) + ASIDE, ignore_errors=True)
