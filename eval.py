"""Evaluate a model on published benchmarks, or on any file of questions; score stored responses again without a model.

    torchrun --nproc_per_node 8 eval.py --model runs/pebr/stage2/model --benchmark mathvista
    torchrun --nproc_per_node 8 eval.py --model runs/pebr/stage2/model --benchmark all --caption_only --blind
    python eval.py --benchmark mathvista --score runs/eval/mathvista/responses.jsonl --audit 50
    python eval.py --model runs/demo/stage1/model --data runs/demo/world/evaluation.jsonl --group_size 4 --temperature 1

Prompt, pixels and sampler are those of training; a benchmark's prompt text takes the place of the question. Benchmarks
(benchmarks.py says which) come from the hub, its cache, or --data: a folder, a .parquet or a .json file. Their scores
need no judge model and no key: "official" is the published rule, "strict" counts a response without an answer as wrong.

A benchmark writes to out/NAME: one responses-RANK.jsonl per process and pass, lines as soon as they are there, so a run
that was cut off goes on where it stopped, on any number of processes; then responses.jsonl, in the order of the data
set, verdicts.json, report.json and report.md. A file of questions is graded like training data: accuracy, pass@n,
format and the other reward parts. The intervals treat questions as the independent draws.
"""
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from glob import glob

import torch
import torch.distributed as dist

import data
from benchmarks import registry, report
from data import InputError, Sample
from engine.clip import load_clip
from engine.memory import choose_slots
from engine.plan import bytes_of, shape_of
from engine.policy import Policy
from engine.weights import find_model, load_processor
from grading.algebra import check_rule
from plumbing.flags import Flags, check_sampling, complain, refuse
from plumbing.processes import (barrier, ending_together, gather, is_main, on_every_rank, print0, start_processes,
                                stop_processes)
from plumbing.run_folder import write_text
from train import PARTS, Sampling, ask

CHUNK = 64  # questions per process between two signs of life: what an interruption can cost


@dataclass(frozen=True)
class EvalConfig(Sampling):
    """Settings of eval.py: greedy by default, prompt and pixels as in training."""

    split: str = ""  # of a hub data set; empty: train, or what is usual for the benchmark
    clip: str = ""  # as in training; empty: the clip part is not computed
    group_size: int = 1  # responses per question; pass@n needs more than one, and a temperature
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # of sampling; 1: all tokens
    # run
    out: str = "runs/eval"  # report.json and responses.jsonl go here, of a benchmark into a folder of its name
    # evaluation
    benchmark: list[str] = field(default_factory=list)  # names with spaces or commas between, or all
    restart: bool = False  # ask again, instead of going on with the responses that out holds
    blind: bool = False  # a second pass: the same questions without their images
    caption_only: bool = False  # a second pass: the model's own image description instead of the image
    score: str = ""  # score these stored responses: ours, or the output file of MathVista's authors; loads no model
    from_extraction: bool = False  # with score: judge the extractions stored there, instead of reading the responses
    verdicts: str = ""  # with score: write each question's extraction, rule, prediction and verdicts to this .json
    audit: int = 0  # so many questions with response, extraction and verdict, as a sheet for a person to check


def check_evaluation(config: EvalConfig):
    """What eval.py needs: questions, a model or stored responses, and flags that go together."""
    check_sampling(config)
    check_rule(config.grader)
    only_with = "--{} goes with --{}: give that too, or leave it out"
    alone = [(name, "benchmark", config.benchmark) for name in ("restart", "blind", "caption_only", "score", "audit")]
    pairs = [*alone, ("from_extraction", "score", config.score), ("verdicts", "score", config.score)]
    refuse([(bool(other) or not getattr(config, name), only_with.format(name, flag)) for name, flag, other in pairs])
    passes = [name for name in ("restart", "blind", "caption_only", "model") if getattr(config, name)]
    refuse([
        (bool(config.model or config.score), "--model is missing"),
        (bool(config.data or config.benchmark), "--data is missing (or --benchmark)"),
        (not config.score or not passes, f"--score asks no model: leave --{(passes or [''])[0]} out"),
        (not config.benchmark or config.group_size == 1, f"--group_size {config.group_size}: a benchmark counts one "
         "response to each question; run it again with another --seed and --out, or give its questions as --data"),
        (not config.benchmark or not config.clip, "--clip is a part of the reward: leave it out with --benchmark"),
    ])


# ---------------------------------------------------------------- a file of questions


def load_model(config: EvalConfig, folder: str, device) -> tuple[EvalConfig, Policy]:
    """The model, and the config with as many slots as there is room for beside it."""
    shape = shape_of(folder)
    config = replace(config, slots=choose_slots(config, shape, device, planned=bytes_of(config) * shape.total))
    return config, Policy.load(folder, device, getattr(torch, config.dtype)).eval()


def make_folder(path: str):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: no folder can be made there ({error.strerror})") from error


def start(config: EvalConfig, device, folder: str, processor) -> tuple:
    """Load and check a file of questions and the model: (config with its slots, model, clip, samples within the limit,
    number of prompts over it)."""
    samples = data.load_samples(config.data, config.image_root, config.split or "train")
    data.check_images(samples)
    data.require(samples, "answer", config.data)
    kept = data.drop_long(samples, processor, config.max_prompt, log=print0)
    clip = load_clip(config.clip, device) if config.clip else None
    data.encode_prompt(max(kept, key=lambda sample: len(sample.images)), processor)  # template and processor work
    make_folder(config.out)
    return *load_model(config, folder, device), clip, kept, len(samples) - len(kept)


def write_figures(config: EvalConfig, rows: list[dict], dropped: int):
    """report.json and responses.jsonl in config.out, and a table on the screen."""
    figures = report.figures(rows, [part for part in PARTS if part != "clip" or config.clip])
    result = dict(questions=len(rows), dropped_prompts=dropped, config=asdict(config), figures=figures)
    write_text(os.path.join(config.out, "responses.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_text(os.path.join(config.out, "report.json"), json.dumps(result, indent=1))
    print(f"{config.model} on {config.data}: {len(rows)} questions x {config.group_size}, "
          f"temperature {config.temperature}; mean and 95 % interval")
    for name, values in figures.items():
        ends = "" if values["low"] is None else f"{values['low']:8.3f} ..{values['high']:8.3f}"
        print(f"  {name:<10} {values['mean']:8.3f} {ends}")


def evaluate_file(config: EvalConfig, device, folder: str, processor):
    """The model's graded responses to every question, as figures with intervals and as rows in the order of the file."""
    config, model, clip, samples, dropped = on_every_rank(lambda: start(config, device, folder, processor))
    rows = []
    for part in ask(model, processor, clip, samples, config, "eval", CHUNK * dist.get_world_size()):
        rows += gather(part)
    if is_main():
        for response in (response for row in rows for response in row["responses"]):
            del response["reward"]  # a weighted sum, and evaluation has no weights
        write_figures(config, rows, dropped)


# ---------------------------------------------------------------- a benchmark's responses, on disk as they come


def weights_id(folder: str) -> str:
    """Of a model's config and of a piece of each weights file: another model under the same name is noticed."""
    digest = hashlib.sha256()
    for path in [os.path.join(folder, "config.json"), *sorted(glob(os.path.join(folder, "*.safetensors")))]:
        with open(path, "rb") as file:
            file.seek(os.path.getsize(path) // 2)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:12]


def settings_of(config: EvalConfig, folder: str, samples: list[Sample]) -> dict:
    """What responses depend on: two runs whose settings are equal may complete each other."""
    names = ("model", "dtype", "seed", "temperature", "top_p", "max_prompt", "max_response", "min_pixels", "max_pixels")
    questions = json.dumps([(sample.qid, sample.question) for sample in samples])
    return {name: getattr(config, name) for name in names} | dict(
        weights=weights_id(folder), prompt_id=hashlib.sha256(data.INSTRUCTION.encode()).hexdigest()[:8],
        questions_id=hashlib.sha256(questions.encode()).hexdigest()[:12])


def check_settings(folder: str, settings: dict, restart: bool):
    """Refuse to complete the responses of another model or setting with those of this one."""
    path = os.path.join(folder, "settings.json")
    if restart or not os.path.exists(path):
        return
    found = data.read_json(path)
    changed = [f"{name} was {found.get(name)} and is {value}" for name, value in settings.items()
               if found.get(name) != value]
    if changed:
        raise InputError(f"{folder} holds responses under other settings ({', '.join(changed)}): give another --out, "
                         "or --restart to replace them")


def read_shard(path: str) -> tuple[list[dict], int]:
    """The rows of one process, and the bytes they take; what follows the last line end was being written when the run
    was cut off."""
    with open(path, "rb") as file:
        content = file.read()
    end = content.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in content[:end].splitlines()], end
    except ValueError as error:
        raise InputError(f"{path}: a line is broken ({error}); remove it, or ask again with --restart") from error


def read_shards(folder: str, way: str) -> dict[str, dict]:
    """pid -> row, of all processes of all runs so far."""
    rows = {}
    for path in sorted(glob(os.path.join(folder, f"{way}-*.jsonl"))):
        for row in read_shard(path)[0]:
            rows.setdefault(row["pid"], row)
    return rows


def open_shard(folder: str, way: str):
    """This process's file, open for appending after its last whole line."""
    path = os.path.join(folder, f"{way}-{dist.get_rank()}.jsonl")
    if os.path.exists(path):
        os.truncate(path, read_shard(path)[1])
    return open(path, "a")


def respond(config: EvalConfig, model, processor, samples: list[Sample], folder: str, way: str) -> dict[str, dict]:
    """Ask what has no response yet, each process its share, and return all rows by pid once every process is done.

    way: the pass and name of its files.
    """
    done = read_shards(folder, way)
    todo = [sample for sample in samples if sample.qid not in done]
    barrier()  # all have read before anyone writes: the shares are dealt from the same list
    with open_shard(folder, way) as file:
        for rows in ask(model, processor, None, todo, config, "eval", CHUNK * dist.get_world_size()):
            for row in rows:
                [response] = row["responses"]
                file.write(json.dumps(dict(pid=row["qid"], response=response["text"], tokens=response["tokens"],
                                           finished=response["finished"])) + "\n")
            file.flush()
            os.fsync(file.fileno())
    barrier()
    rows = read_shards(folder, way)
    lost = [sample.qid for sample in samples if sample.qid not in rows]
    if lost:
        raise InputError(f"{folder}: {len(lost)} responses of other processes are not to be seen, the first has pid "
                         f"{lost[0]}; --out must be a folder that all machines share")
    return {sample.qid: rows[sample.qid] for sample in samples}  # exactly those asked, in the order of the data set


# ---------------------------------------------------------------- benchmarks


def without_images(samples: list[Sample], descriptions: dict[str, str] | None) -> list[Sample]:
    """The same questions blind, or with a description in front, of those that have one."""
    if descriptions is None:
        return [replace(sample, images=()) for sample in samples]
    plain = {qid: text.replace(data.IMAGE, "") for qid, text in descriptions.items()}  # there is no image to mark
    return [replace(sample, images=(), question=f"{data.DESCRIPTION}: {plain[sample.qid]}\n{sample.question}")
            for sample in samples if sample.qid in plain]


def prepare(config: EvalConfig, name: str, model_folder: str, processor) -> tuple:
    """(name, items, samples within --max_prompt, settings) of one benchmark, everything about them checked."""
    rows = registry.load_rows(name, config.data, config.split)
    items = registry.load_items(name, rows)
    place = registry.place(name, config.data)
    root = config.image_root or (place if os.path.isdir(place) else os.path.dirname(place))
    samples = registry.load_samples(items, rows, root)
    data.check_images(samples)
    settings = settings_of(config, model_folder, samples)
    check_settings(os.path.join(config.out, name), settings, config.restart)
    make_folder(os.path.join(config.out, name))
    kept = data.drop_long(samples, processor, config.max_prompt, log=print0)
    data.encode_prompt(kept[0], processor)  # template and processor work
    return name, items, kept, settings


def begin(config: EvalConfig, folder: str, settings: dict):
    """Rank 0 makes the folder ready, while the others wait."""
    if is_main():
        for path in glob(os.path.join(folder, "*.jsonl")) if config.restart else []:
            os.remove(path)
        write_text(os.path.join(folder, "settings.json"), json.dumps(settings, indent=1))
    barrier()


def run_benchmark(config: EvalConfig, model, processor, name: str, items: dict, samples: list[Sample], settings: dict):
    """All passes over one benchmark, and its report."""
    folder = os.path.join(config.out, name)
    begin(config, folder, settings)
    responses = respond(config, model, processor, samples, folder, "responses")
    others = {}
    if config.caption_only:
        asked = without_images(samples, report.descriptions(responses))
        others["caption_only"] = respond(config, model, processor, asked, folder, "caption_only")
    if config.blind:
        others["blind"] = respond(config, model, processor, without_images(samples, None), folder, "blind")
    if is_main():
        for way, rows in {"responses": responses, **others}.items():
            write_text(os.path.join(folder, f"{way}.jsonl"), "".join(json.dumps(row) + "\n" for row in rows.values()))
        verdicts = report.judge_all(name, responses, items)
        split = report.perception(verdicts, {way: report.judge_all(name, rows, items) for way, rows in others.items()})
        write_report(config, folder, name, items, responses, verdicts, dict(model=config.model, settings=settings,
                     prompt_id=settings["prompt_id"]), split if others else None)


def write_report(config: EvalConfig, folder: str, name: str, items: dict, responses: dict, verdicts: dict, about: dict,
                 split: dict | None = None):
    """report.json, report.md and verdicts.json in the folder, the tables on the screen; of a split whose gold answers
    are withheld a file to submit instead."""
    write_text(os.path.join(folder, "verdicts.json"), json.dumps(verdicts, indent=1))
    if config.verdicts:
        write_text(config.verdicts, json.dumps(verdicts, indent=1))
    if config.audit:
        write_text(os.path.join(folder, "audit.md"), report.audit_sheet(config.audit, items, responses, verdicts))
    if not any(item.answer for item in items.values()):
        rows = {pid: dict(pid=pid, response=row.get("response") or "", extraction=verdicts[pid]["extraction"],
                          prediction=verdicts[pid]["prediction"]) for pid, row in responses.items() if pid in items}
        path = os.path.join(folder, "submission.json")
        write_text(path, json.dumps(rows, indent=1))
        print(f"{name}: this split has no gold answers; {path} is the file to submit to its authors")
        return
    result = about | report.provenance() | report.summarize(name, items, responses, verdicts)
    if split:
        result["perception"] = split
    write_text(os.path.join(folder, "report.json"), json.dumps(result, indent=1))
    write_text(os.path.join(folder, "report.md"), report.markdown(result, split, whole=True))
    print(report.markdown(result, split) + f"\nbreakdown {folder}/report.md", flush=True)


def evaluate_benchmarks(config: EvalConfig, device, folder: str, processor):
    """Every benchmark is checked before the first is asked, and before the model is loaded."""
    tasks = on_every_rank(lambda: [prepare(config, name, folder, processor)
                                   for name in registry.chosen(config.benchmark)])
    config, model = on_every_rank(lambda: load_model(config, folder, device))
    for task in tasks:
        run_benchmark(config, model, processor, *task)


# ---------------------------------------------------------------- stored responses


def score(config: EvalConfig):
    """Score responses of any origin: no model, no images."""
    [name] = registry.chosen(config.benchmark)
    if not os.path.isdir(os.path.dirname(config.verdicts) or ".") or os.path.isdir(config.verdicts):
        raise InputError(f"--verdicts {config.verdicts}: give a file in a folder that exists")
    responses = report.read_responses(config.score)
    items = registry.load_items(name, registry.load_rows(name, config.data, config.split, images=False))
    strangers = [pid for pid in responses if pid not in items]
    if len(strangers) == len(responses):
        raise InputError(f"--score {config.score}: none of its {len(responses)} pids is in this split of {name}")
    if strangers:
        print(f"note: {len(strangers)} responses belong to no question of this split, the first has pid {strangers[0]}")
    folder = os.path.join(config.out, f"{name}-scored")
    make_folder(folder)
    beside = os.path.join(os.path.dirname(config.score), "settings.json")  # there when the responses are ours
    settings = data.read_json(beside) if os.path.exists(beside) else {}
    if not isinstance(settings, dict):
        raise InputError(f"{beside}: lies beside the responses but is not their settings; move it away")
    about = dict(source=config.score, settings=settings, prompt_id=settings.get("prompt_id"))
    verdicts = report.judge_all(name, responses, items, config.from_extraction)
    write_report(config, folder, name, items, responses, verdicts, about)


def read_flags(argv: list[str]) -> EvalConfig:
    config = Flags(EvalConfig, __doc__).read(argv, {})
    names = registry.chosen(config.benchmark)
    check_evaluation(config)
    if config.score and len(names) > 1:
        raise InputError("--score reads the responses to one benchmark: give one name as --benchmark")
    return config


def ready(config: EvalConfig) -> tuple:
    """(device, the model's folder, its processor)."""
    device, _ = start_processes()
    folder = find_model(config.model)
    return device, folder, load_processor(folder, config.min_pixels, config.max_pixels, log=print0)


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, or 2 after one line about bad input."""
    try:
        with ending_together():
            start_processes()  # join first, so that a bad flag ends all ranks with one message
            config = on_every_rank(lambda: read_flags(sys.argv[1:] if argv is None else argv))
            if config.score:
                on_every_rank(lambda: score(config) if is_main() else None)
            else:
                evaluate = evaluate_benchmarks if config.benchmark else evaluate_file
                evaluate(config, *on_every_rank(lambda: ready(config)))
    except InputError as error:  # it may concern only this rank, e.g. a corrupt image
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
