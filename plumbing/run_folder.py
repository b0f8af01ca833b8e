"""The folder of a run: written whole or not at all, refused where it is something else's, resumed or set aside.

One program at a time works in a folder. Responses go to disk as they come, each rank's to a file of its own, and are
not asked for again.
"""
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from glob import escape, glob

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

import data
from data import InputError, Sample
from plumbing.processes import (SharedError, barrier, below_prefixes, broadcast, group_store, is_main, print0,
                                restarts)
from plumbing.release import prompt_id

SAME_RESULT = {"restart", "token_budget", "slots", "cuda_graphs", "fused_loss", "save_every", "eval_data", "eval_every",
               "eval_questions", "gradient_checkpointing", "patience", "plan", "gpus", "gpu_gb", "grace", "tracker",
               "recipe"}
HELD = contextlib.ExitStack()  # the locks of this program
NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE}


@contextlib.contextmanager
def complete_files():
    """Around a program, within `ending_together`: a file that cannot be written ends it with one line. Afterwards its
    folders are free for others."""
    with HELD:
        try:
            yield
        except (OSError, SafetensorError, CheckpointException) as error:
            if isinstance(error, OSError) and error.errno not in NOT_WRITTEN:
                raise
            everywhere = isinstance(error, CheckpointException)
            reason = next(iter(error.failures.values()))[0] if everywhere else error
            kind = SharedError if everywhere else InputError
            raise kind(f"cannot write ({reason}): is the disk full? What was complete is safe: the same command goes "
                       "on from there") from error


def check_space(config, policy):
    """Says before a run if the disk of --out has less room than a checkpoint and the model take. Of a trained weight a
    checkpoint holds the float32 master and Adam's two moments."""
    size = getattr(torch, config.dtype).itemsize
    needed = sum(weight.numel() * (12 * weight.requires_grad + size) for weight in policy.parameters())
    if is_main() and (free := shutil.disk_usage(config.out or ".").free) < needed:
        print(f"warning: --out {config.out} has {free / 1e9:.3g} GB free; a checkpoint and the model take "
              f"{needed / 1e9:.3g}", flush=True)


def open_folder(path: str, stage: str = ""):
    """Make a folder of --out, and take it, or the folder of a stage below it, for this program; InputError if it cannot
    be written to, or if another program works in it. The system drops a lock when its process dies, also on a shared
    disk, so none is ever stale. A disk without locks is used without."""
    import fcntl  # not on Windows

    if not is_main():
        return
    try:
        os.makedirs(path or ".", exist_ok=True)
        file = HELD.enter_context(open(os.path.join(path, f"{stage}.lock"), "a+b", buffering=0))
    except (OSError, ValueError) as error:  # a NUL byte is a ValueError
        raise InputError(f"--out {path}: no folder can be made or written there") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise InputError(f"--out is in use ({file.name}: {file.read().decode()}): wait for it, end it, or give "
                         "another") from error
    except OSError as error:
        print0(f"note: {file.name}: no locks on this disk ({error.strerror}); do not start the same command twice")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}".encode())


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
    """Twelve hex digits that stand for bytes as they are, and for anything else as it is printed."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part if isinstance(part, bytes) else repr(part).encode()).digest())
    return whole.hexdigest()[:12]


def weights_id(folder: str) -> str:
    """A digest of a model's files, of each the size and up to three megabytes: its beginning, middle and end. Another
    model in the same folder has another, for training moves every weight."""
    parts = []
    for path in sorted(glob(os.path.join(escape(folder), "*.json")) +
                       glob(os.path.join(escape(folder), "*.safetensors"))):
        size = os.path.getsize(path)
        parts += [os.path.basename(path), size]
        with open(path, "rb") as file:
            for place in {0, size // 2, max(0, size - (1 << 20))}:
                file.seek(place)
                parts.append(file.read(1 << 20))
    return digest(*parts)


def fingerprints(config, model_folder: str, samples: list[Sample], *prompt: str) -> dict[str, str]:
    """What a run depends on and its flags do not say. Of an image file only the name counts, since the folder may be
    mounted elsewhere, and a file that has gone bad may be replaced."""
    rows = ((sample.qid, sample.question, sample.answer, sample.key_words, sample.choices, sample.solution,
             [digest(image) if isinstance(image, bytes) else os.path.basename(str(image)) for image in sample.images])
            for sample in samples)
    return {"rows of --data": digest(*rows), "prompt template": digest(prompt_id(config.prompt), *prompt),
            "weights of --model": weights_id(model_folder)}


def check_folder(config, folder: str, prints: dict[str, str]):
    """Refuse to mix this run with what lies in its folder, and to write over its own input. prints: `fingerprints`."""
    open_folder(config.out, os.path.basename(folder))
    inputs = [os.path.realpath(path) for path in (config.model, *config.data.split(","))]
    inside = any(path.startswith(os.path.realpath(folder) + os.sep) for path in inputs)
    if inside and (config.restart or config.stage == "sample"):
        raise InputError(f"--model or --data lies in {folder}, which this run replaces: give another --out")
    names = {name for _, _, names in os.walk(folder) for name in names if not name.endswith(".writing")}
    if not names or config.stage == "sample" and "easy.jsonl" in names:
        return  # there is nothing of value, or the buckets that this run replaces
    path = os.path.join(folder, "config.json")
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


def replace_buckets(folder: str, samples: list[Sample], rows: list[dict], group_size: int, asked: str):
    """Write the questions with responses, in three buckets, and all responses; asked: where they lay until then."""
    correct = {row["qid"]: sum(response["accuracy"] == 1 for response in row["responses"]) for row in rows}
    with replaced_folder(folder) as writing:
        sizes = data.write_buckets(writing, samples, correct, group_size)
        write_text(os.path.join(writing, "rollouts.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    drop_kept(asked)
    print(f"{len(rows)} questions -> {folder}: " + ", ".join(f"{size} {name}" for name, size in sizes.items()))


def prepare_folder(folder: str, config, prints: dict[str, str]) -> int:
    """Make a stage's folder ready, resuming what the same command left there. Returns the step to start at.

    With --restart the old run stays beside it as FOLDER.before-restart; of two such runs, the complete one. An attempt
    of torchrun's that finds the mark of an earlier one resumes: what lies there is its own.
    """
    folder = os.path.realpath(folder)  # it may be a link to a larger disk
    if is_main():
        launch, mark = below_prefixes(group_store()), f"replaced {folder}"
        if config.restart and not (restarts() and launch.check([mark])):
            aside, dropped = f"{folder}.before-restart", f"{folder}.dropped"
            shutil.rmtree(dropped, ignore_errors=True)  # of a run that was killed here
            if os.path.exists(aside) and os.path.exists(folder):
                os.rename(aside if os.path.exists(os.path.join(folder, "model")) else folder, dropped)
            if os.path.exists(folder):
                os.rename(folder, aside)
            shutil.rmtree(dropped, ignore_errors=True)
            launch.set(mark, "")
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


# ----------------------------------------------------- responses that go to disk as they come, and are kept


def run_id(config, prints: dict[str, str]) -> str:
    """Of everything that responses depend on."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in SAME_RESULT | {"out"}}
    return digest(*settings.items(), *prints.items())


def read_shards(folder: str, way: str) -> dict[str, dict]:
    """qid -> row, of all processes of all runs so far. A line that a killed run has left half is no row."""
    rows = {}
    for path in sorted(glob(os.path.join(escape(folder), f"{way}-*.jsonl"))):
        with open(path, errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError):
                    row = json.loads(line)
                    rows.setdefault(row["qid"], row)
    return rows


def drop_kept(folder: str):
    """Delete the rows of finished questions, and those under other settings: what was made of them is complete."""
    for path in glob(escape(folder.rpartition("-")[0]) + "-*"):
        shutil.rmtree(path)


def kept(folder: str, way: str, samples: list[Sample],
         ask: Callable[[list[Sample]], Iterable[list[dict]]]) -> dict[str, dict]:
    """Ask what has no row yet, each process its share, and return all rows by qid once every process is done.

    ask(samples) yields rows as they come; they are appended to folder/way-RANK.jsonl.
    """
    os.makedirs(folder, exist_ok=True)
    done = read_shards(folder, way)
    todo = [sample for sample in samples if sample.qid not in done]
    barrier()  # all have read before anyone writes: the shares are dealt from the same list
    with open(os.path.join(folder, f"{way}-{dist.get_rank()}.jsonl"), "a") as file:
        file.write("\n")  # a half line ends here
        for rows in ask(todo):
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
    rows = read_shards(folder, way)
    barrier()  # all have read before rank 0 may drop them
    lost = [sample.qid for sample in samples if sample.qid not in rows]
    if lost:
        raise InputError(f"{folder}: {len(lost)} responses of other processes are not to be seen, the first has "
                         f"qid {lost[0]}; --out must be a folder that all machines share")
    return {sample.qid: rows[sample.qid] for sample in samples}  # exactly those asked, in the order of the data set
