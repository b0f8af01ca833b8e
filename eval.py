"""Evaluate a model on published benchmarks, or on any file of questions; score stored responses again without a model.

    torchrun --nproc_per_node 8 eval.py --model runs/pebr/stage2/model --benchmark mathvista
    torchrun --nproc_per_node 8 eval.py --model runs/pebr/stage2/model --benchmark all --caption_only --blind
    python eval.py --benchmark mathvista --score runs/eval/mathvista/responses.jsonl --audit 50
    python eval.py --model runs/demo/stage1/model --data runs/demo/world/evaluation.jsonl --group_size 4 --temperature 1

Prompt, pixels and sampler are those of training; a benchmark's prompt text takes the place of the question. Benchmarks
(benchmarks/registry.py finds them) come from the hub, its cache, or --data: a folder, a .parquet or a .json file. Their
scores need no judge model and no key: "official" is the published rule, "strict" counts no answer as wrong.

A benchmark writes to out/NAME. Every process appends its responses to its own responses-RANK.jsonl as soon as they are
there, so a run that was cut off goes on where it stopped, on any number of processes. In the end responses.jsonl has
them in the order of the data set, beside verdicts.json, report.json and report.md. A file of questions goes on in the
same way, and is graded like training data: accuracy, pass@n, format and the other reward parts. Intervals take every
question as one draw.
"""
import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from glob import escape, glob

import torch

import data
from benchmarks import registry, report
from benchmarks.common import plain
from data import InputError, Sample
from engine.clip import load_clip
from engine.memory import choose_slots
from engine.plan import bytes_of, shape_of
from engine.policy import Policy
from engine.weights import find_model, load_processor
from grading.algebra import check_rule
from plumbing import filters
from plumbing.flags import Flags, check_sampling, complain, refuse
from plumbing.log import records
from plumbing.processes import (TOLD, barrier, ending_together, is_main, on_every_rank, print0, start_processes,
                                stop_processes)
from plumbing.release import prompt_id
from plumbing.run_folder import (complete_files, drop_kept, fingerprints, kept, open_folder, run_id, weights_id,
                                 write_text)
from train import PARTS, Sampling, ask


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


def read_flags(argv: list[str]) -> EvalConfig:
    """The command line, checked: there are questions, and a model or stored responses, and the flags go together."""
    config = Flags(EvalConfig, __doc__).read(argv, {})
    names = registry.chosen(config.benchmark)
    check_sampling(config)
    check_rule(config.grader)
    dependent = {"benchmark": "restart blind caption_only score audit", "score": "from_extraction verdicts"}
    refuse([(bool(getattr(config, flag)) or not getattr(config, name),
             f"--{name} goes with --{flag}: give that too, or leave it out")
            for flag, needing in dependent.items() for name in needing.split()])
    asking = [name for name in ("restart", "blind", "caption_only", "model") if getattr(config, name)]
    refuse([
        (bool(config.model or config.score), "--model is missing"),
        (bool(config.data or config.benchmark), "--data is missing (or --benchmark)"),
        (not config.score or not asking, f"--score asks no model: leave --{(asking or [''])[0]} out"),
        (not config.benchmark or config.group_size == 1, f"--group_size {config.group_size}: a benchmark counts one "
         "response to each question; run it again with another --seed and --out, or give its questions as --data"),
        (not config.benchmark or not config.clip, "--clip is a part of the reward: leave it out with --benchmark"),
        (not config.score or len(names) == 1,
         "--score reads the responses to one benchmark: give one name as --benchmark"),
    ])
    return config


def load(config: EvalConfig, device) -> tuple:
    """(config with as many slots as there is room for, model, processor, clip, questions as their `prepare_..` returns
    them). All questions are checked first, because loading a model takes minutes."""
    folder = find_model(config.model)
    processor = load_processor(folder, config.min_pixels, config.max_pixels, config.prompt, log=print0)
    if config.benchmark:
        questions = [prepare_benchmark(config, name, folder, processor) for name in registry.chosen(config.benchmark)]
    else:
        questions = prepare_file(config, folder, processor)
    clip = load_clip(config.clip, device) if config.clip else None
    shape = shape_of(folder)
    config = replace(config, slots=choose_slots(config, shape, device, planned=bytes_of(config) * shape.total))
    return config, Policy.load(folder, device, getattr(torch, config.dtype)).eval(), processor, clip, questions


# ---------------------------------------------------------------- a file of questions: asked in one go


def prepare_file(config: EvalConfig, model_folder: str, processor) -> tuple[list[Sample], int, str]:
    """The samples within --max_prompt, how many are over it, and the folder of responses that have come so far."""
    samples = data.load_samples(config.data, config.image_root, config.split or "train")
    filters.require(samples, "answer", config.data)
    filters.check_images(samples)
    near = filters.drop_long(samples, processor, config.max_prompt, log=print0)
    prints = fingerprints(config, model_folder, samples, processor.chat_template)
    open_folder(config.out)
    return near, len(samples) - len(near), os.path.join(config.out, f"asked-{run_id(config, prints)}")


def run_file(config: EvalConfig, model, processor, clip, samples: list[Sample], dropped: int, folder: str):
    """Ask every question: report.json and responses.jsonl, in the order of the file, and a table on the screen."""
    asked = kept(folder, "responses", samples, lambda todo: map(records, ask(model, processor, clip, todo, config,
                                                                             "eval")))
    if not is_main():
        return
    rows = list(asked.values())
    for row in rows:
        for response in row["responses"]:
            del response["reward"]  # a weighted sum, and evaluation has no weights
    figures = report.figures(rows, [part for part in PARTS if part != "clip" or config.clip])
    result = dict(questions=len(rows), dropped_prompts=dropped, config=asdict(config),
                  prompt_id=prompt_id(config.prompt), figures=figures)
    write_text(os.path.join(config.out, "responses.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_text(os.path.join(config.out, "report.json"), json.dumps(result, indent=1))
    drop_kept(folder)
    print(f"{config.model} on {config.data}: {len(rows)} questions x {config.group_size}, "
          f"temperature {config.temperature}; mean and 95 % interval")
    for name, values in figures.items():
        ends = "" if values["low"] is None else f"{values['low']:8.3f} ..{values['high']:8.3f}"
        print(f"  {name:<10} {values['mean']:8.3f} {ends}")


# ---------------------------------------------------------------- a benchmark: its responses go to disk as they come


def settings_of(config: EvalConfig, model_folder: str, samples: list[Sample], out: str) -> dict:
    """What responses depend on. InputError if those that `out` holds were made with other settings: never mix them."""
    names = ("model", "dtype", "seed", "temperature", "top_p", "max_prompt", "max_response", "min_pixels", "max_pixels")
    questions = json.dumps([(sample.qid, sample.question) for sample in samples])
    settings = {name: getattr(config, name) for name in names} | dict(
        weights=weights_id(model_folder), prompt_id=prompt_id(config.prompt),
        questions_id=hashlib.sha256(questions.encode()).hexdigest()[:12])
    path = os.path.join(out, "settings.json")
    old = not config.restart and (os.path.exists(path) or glob(os.path.join(escape(out), "*-*.jsonl")))
    found = data.checked(data.read_json(path) if old else settings, (dict,), f"{path}: has",
                         "the settings of the responses beside it; give another --out, or --restart to replace them")
    changed = [f"{name} was {found.get(name)} and is {value}" for name, value in settings.items()
               if found.get(name) != value]
    if changed:
        raise InputError(f"{out} holds responses under other settings ({', '.join(changed)}): give another --out, "
                         "or --restart to replace them")
    return settings


def stored(where: str, number: int, found) -> dict | None:
    """A row of a benchmark's responses; None where it has none, as after a failed request."""
    row = report.response_row(where, number, found)
    return row if row.get("response") is not None else None


def respond(config: EvalConfig, model, processor, samples: list[Sample], folder: str, way: str) -> dict[str, dict]:
    """All rows by pid, of which those without a response are asked. way: responses, caption_only or blind."""
    def asked(todo):
        for part in ask(model, processor, None, todo, config, "eval"):
            yield [dict(pid=one.sample.qid, response=one.texts[0], tokens=len(one.responses[0].ids),
                        finished=one.responses[0].finished, images=one.sample.images) for one in part]

    return kept(folder, way, samples, asked, stored, "pid")


def prepare_benchmark(config: EvalConfig, name: str, model_folder: str, processor) -> tuple:
    """(name, items, samples within --max_prompt, settings) of one benchmark, everything about them checked."""
    rows = registry.load_rows(name, config.data, config.split)
    items = registry.load_items(name, rows)
    place, out = registry.place(name, config.data), os.path.join(config.out, name)
    root = config.image_root or (place if os.path.isdir(place) else os.path.dirname(place))
    samples = registry.load_samples(items, rows, root)
    bare = sum(not sample.images for sample in samples)
    if bare:
        print0(f"note: {bare} of the {len(samples)} questions of {name} have no picture and are asked without")
    settings = settings_of(config, model_folder, samples, out)
    filters.check_images(samples)
    near = filters.drop_long(samples, processor, config.max_prompt, log=print0)
    open_folder(out)
    return name, items, near, settings


def described(samples: list[Sample], responses: dict[str, dict]) -> list[Sample]:
    """The questions to which the model's response has an Image Description: that in front of them, and no image."""
    descriptions = {qid: data.parse(row["response"]).description or "" for qid, row in responses.items()}
    plain = {qid: text.replace(data.IMAGE, "") for qid, text in descriptions.items()}  # there is no image to mark
    return [replace(sample, images=(), question=f"{data.DESCRIPTION}: {plain[sample.qid]}\n{sample.question}")
            for sample in samples if descriptions[sample.qid]]


def run_benchmark(config: EvalConfig, model, processor, name: str, items: dict, samples: list[Sample], settings: dict):
    """All passes over one benchmark, and its report."""
    folder = os.path.join(config.out, name)
    if is_main():
        for path in glob(os.path.join(escape(folder), "*.jsonl")) if config.restart else []:
            os.remove(path)
        write_text(os.path.join(folder, "settings.json"), json.dumps(settings, indent=1))
    barrier()  # no rank asks before the folder is ready
    passes = {"responses": respond(config, model, processor, samples, folder, "responses")}
    if config.caption_only:
        asked = described(samples, passes["responses"])
        passes["caption_only"] = respond(config, model, processor, asked, folder, "caption_only")
    if config.blind:
        asked = [replace(sample, images=()) for sample in samples]
        passes["blind"] = respond(config, model, processor, asked, folder, "blind")
    if is_main():
        for way, rows in passes.items():
            write_text(os.path.join(folder, f"{way}.jsonl"), "".join(json.dumps(row) + "\n" for row in rows.values()))
        about = dict(model=config.model, settings=settings, prompt_id=settings["prompt_id"])
        write_report(config, folder, name, items, passes, about)


def write_report(config: EvalConfig, folder: str, name: str, items: dict, passes: dict[str, dict], about: dict):
    """Judge the responses of all passes: report.json, report.md and verdicts.json in the folder, the tables on the
    screen. Where gold answers are withheld, a file to submit takes the place of the report."""
    others = {way: report.judge_all(name, rows, items, config.from_extraction) for way, rows in passes.items()}
    responses, verdicts = passes["responses"], others.pop("responses")
    split = report.perception(verdicts, others) if others else None
    for path in filter(None, (os.path.join(folder, "verdicts.json"), config.verdicts)):
        write_text(path, json.dumps(verdicts, indent=1))
    if config.audit:
        write_text(os.path.join(folder, "audit.md"), report.audit_sheet(config.audit, items, responses, verdicts))
    if not any(item.answer for item in items.values()):
        rows = {pid: dict(pid=pid, response=row["response"], extraction=verdicts[pid]["extraction"],
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


# ---------------------------------------------------------------- stored responses


def score(config: EvalConfig):
    """Score responses of any origin: no model, no images."""
    [name] = registry.chosen(config.benchmark)
    if not os.path.isdir(os.path.dirname(config.verdicts) or ".") or os.path.isdir(config.verdicts):
        raise InputError(f"--verdicts {config.verdicts}: give a file in a folder that exists")
    responses = report.read_responses(config.score, "extraction" if config.from_extraction else "response")
    items = registry.load_items(name, registry.load_rows(name, config.data, config.split))
    strangers = [pid for pid in responses if pid not in items]
    if len(strangers) == len(responses):
        raise InputError(f"--score {config.score}: none of its {len(responses)} pids is in this split of {name}")
    if strangers:
        print(f"note: {len(strangers)} responses belong to no question of this split, the first has pid {strangers[0]}")
    beside = os.path.join(os.path.dirname(config.score), "settings.json")  # there when the responses are ours
    settings = plain(data.read_json(beside)) if os.path.exists(beside) else {}
    data.checked(settings, (dict,), f"{beside}: has", "the settings of the responses beside it; move it away")
    folder = os.path.join(config.out, f"{name}-scored")
    open_folder(folder)
    about = dict(source=config.score, settings=settings, prompt_id=settings.get("prompt_id"))
    write_report(config, folder, name, items, {"responses": responses}, about)


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, or after one line 2 for bad input, 143 for SIGTERM, 130 for Ctrl-C."""
    try:
        with ending_together(), complete_files():
            device, _ = start_processes()  # join first, so that a bad flag ends all ranks with one message
            config = on_every_rank(lambda: read_flags(sys.argv[1:] if argv is None else argv))
            if config.score:
                on_every_rank(lambda: score(config) if is_main() else None)
                return 0
            config, model, processor, clip, questions = on_every_rank(lambda: load(config, device))
            TOLD.grace = config.grace
            if config.benchmark:
                for benchmark in questions:
                    run_benchmark(config, model, processor, *benchmark)
            else:
                run_file(config, model, processor, clip, *questions)
            barrier()  # a rank that left while rank 0 writes would no longer hear that a signal has come
    except InputError as error:  # it may concern only this rank, e.g. a corrupt image
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
