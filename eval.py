"""Evaluate a model on published benchmarks, or on any file of questions; score stored responses again without a model.

    torchrun --nproc_per_node 8 eval.py --model runs/pebr/stage2/model --benchmark mathvista
    torchrun --nproc_per_node 8 eval.py --model runs/pebr/stage2/model --benchmark all --caption_only --blind
    python eval.py --benchmark mathvista --score runs/eval/mathvista/responses.jsonl
    python eval.py --model runs/demo/stage1/model --data runs/demo/world/evaluation.jsonl --group_size 4 --temperature 1

Prompt, pixels and sampler are those of training; a benchmark's prompt text takes the place of the question. Benchmarks
(benchmarks/registry.py finds them) come from the hub, its cache, or --data: a folder, a .parquet or a .json file. Their
scores need no judge model and no key: "official" is the published rule, "strict" counts no answer as wrong.

Responses go to disk as they come, so the same command goes on where a run was cut off, on any number of processes; what
is kept belongs to one model, its questions and its settings. A benchmark writes to out/NAME. A file of questions is
graded like training data: accuracy, pass@n, format and the other reward parts.
"""
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace

import torch

import data
from benchmarks import registry, report
from data import InputError, Sample
from engine.clip import load_clip
from engine.plan import CLIP_PARAMETERS, choose_slots, shape_of
from engine.policy import Policy
from engine.weights import find_model, load_processor
from grading.algebra import check_rule
from plumbing import filters
from plumbing.flags import Flags, check_sampling, complain, refuse
from plumbing.log import records
from plumbing.processes import (TOLD, barrier, ending_together, is_main, on_every_rank, print0, start_processes,
                                stop_processes)
from plumbing.release import prompt_id
from plumbing.run_folder import complete_files, drop_kept, fingerprints, kept, open_folder, run_id, write_text
from train import PARTS, Sampling, ask


@dataclass(frozen=True)
class EvalConfig(Sampling):
    """Settings of eval.py: greedy by default, prompt and pixels as in training."""

    split: str = ""  # of a folder or a hub data set; empty: train, or what is usual for the benchmark
    clip: str = ""  # as in training; empty: the clip part is not computed
    group_size: int = 1  # responses per question; pass@n needs more than one, and a temperature
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # of sampling; 1: all tokens
    # run
    out: str = "runs/eval"  # report.json and responses.jsonl go here, of a benchmark into a folder of its name
    # evaluation
    benchmark: list[str] = field(default_factory=list)  # names with spaces between, or all
    blind: bool = False  # a second pass: the same questions without their images
    caption_only: bool = False  # a second pass: the model's own image description instead of the image
    score: str = ""  # score these stored responses: ours, or the output file of MathVista's authors; loads no model


def read_flags(argv: list[str]) -> EvalConfig:
    """The command line, checked: there are questions, and a model or stored responses, and the flags go together."""
    config = Flags(EvalConfig, __doc__).read(argv, {})
    names = registry.chosen(config.benchmark)
    check_sampling(config)
    check_rule(config.grader)
    refuse([
        (bool(config.model or config.score), "--model is missing"),
        (bool(config.data or config.benchmark), "--data is missing (or --benchmark)"),
        (bool(names) or not (config.score or config.blind or config.caption_only),
         "--score, --blind and --caption_only go with --benchmark: give one, or leave them out"),
        (not config.score or not (config.model or config.blind or config.caption_only),
         "--score asks no model: leave --model, --blind and --caption_only out"),
        (not config.benchmark or config.group_size == 1,
         f"--group_size {config.group_size}: a benchmark counts one response to each question; leave it out"),
        (not config.benchmark or not config.clip, "--clip is a part of the reward: leave it out with --benchmark"),
        (not config.score or len(names) == 1,
         "--score reads the responses to one benchmark: give one name as --benchmark"),
    ])
    return config


def load(config: EvalConfig, device) -> tuple:
    """(config with as many slots as there is room for, model, processor, clip, what `prepare` returns for each set of
    questions). All questions are checked first, because loading a model takes minutes."""
    folder = find_model(config.model)
    processor = load_processor(folder, config.min_pixels, config.max_pixels, config.prompt)
    sets = [prepare(config, name, folder, processor) for name in registry.chosen(config.benchmark) or [""]]
    clip = load_clip(config.clip, device) if config.clip else None
    shape = shape_of(folder)
    planned = getattr(torch, config.dtype).itemsize * shape.total + 4 * CLIP_PARAMETERS * bool(config.clip)
    config = replace(config, slots=choose_slots(config, shape, device, planned))
    return config, Policy.load(folder, device, getattr(torch, config.dtype)).eval(), processor, clip, sets


def prepare(config: EvalConfig, name: str, model_folder: str, processor) -> tuple:
    """(name, items, samples within --max_prompt, how many are over it, the folder of responses that have come so far)
    of a benchmark, or of a file of questions, which has neither name nor items."""
    if name:
        rows = registry.load_rows(name, config.data, config.split)
        items = registry.load_items(name, rows)
        place = registry.place(name, config.data)
        root = config.image_root or (place if os.path.isdir(place) else os.path.dirname(place))
        samples = registry.load_samples(items, rows, root)
    else:
        items, samples = {}, data.load_samples(config.data, config.image_root, config.split or "train")
        filters.require(samples, "answer", config.data)
    filters.check_images(samples)
    near = filters.drop_long(samples, processor, config.max_prompt, log=print0)
    asking = replace(config, benchmark=[], blind=False, caption_only=False)  # these change no response
    prints = fingerprints(asking, model_folder, samples, processor.chat_template)
    out = os.path.join(config.out, name)
    open_folder(out)
    return name, items, near, len(samples) - len(near), os.path.join(out, f"asked-{run_id(asking, prints)}")


# ---------------------------------------------------------------- asking: responses go to disk as they come


def run(config: EvalConfig, model, processor, clip, name: str, items: dict, samples: list[Sample], dropped: int,
        folder: str):
    """All passes over one set of questions, and what is said of them."""
    def respond(asked: list[Sample], way: str) -> dict[str, dict]:
        """All rows by qid, of which those without a response are asked."""
        return kept(folder, way, asked, lambda todo: map(records, ask(model, processor, clip, todo, config, "eval")))

    passes = {"responses": respond(samples, "responses")}
    if config.caption_only:
        passes["caption_only"] = respond(described(samples, passes["responses"]), "caption_only")
    if config.blind:
        passes["blind"] = respond([replace(sample, images=()) for sample in samples], "blind")
    if not is_main():
        return
    if name:
        write_report(config, name, items, {way: single(rows) for way, rows in passes.items()})
    else:
        write_figures(config, list(passes["responses"].values()), dropped)
        drop_kept(folder)


def described(samples: list[Sample], rows: dict[str, dict]) -> list[Sample]:
    """The questions to which the model's response has an Image Description: that in front of them, and no image."""
    descriptions = {qid: data.parse(row["responses"][0]["text"]).description or "" for qid, row in rows.items()}
    plain = {qid: text.replace(data.IMAGE, "") for qid, text in descriptions.items()}  # there is no image to mark
    return [replace(sample, images=(), question=f"{data.DESCRIPTION}: {plain[sample.qid]}\n{sample.question}")
            for sample in samples if descriptions[sample.qid]]


def single(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows with one response each, as a benchmark's responses are stored."""
    return {qid: dict(pid=qid, response=one["text"], tokens=one["tokens"], finished=one["finished"],
                      images=row["images"]) for qid, row in rows.items() for one in row["responses"]}


# ---------------------------------------------------------------- reports


def write_figures(config: EvalConfig, rows: list[dict], dropped: int):
    """Of a file of questions: report.json and responses.jsonl, in the order of the file, and a table on the screen."""
    for row in rows:
        for response in row["responses"]:
            del response["reward"]  # a weighted sum, and evaluation has no weights
    figures = report.figures(rows, [part for part in PARTS if part != "clip" or config.clip])
    result = dict(questions=len(rows), dropped_prompts=dropped, config=asdict(config),
                  prompt_id=prompt_id(config.prompt), figures=figures)
    write_text(os.path.join(config.out, "responses.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_text(os.path.join(config.out, "report.json"), json.dumps(result, indent=1))
    print(f"{config.model} on {config.data}: {len(rows)} questions x {config.group_size}; mean and 95 % interval")
    for name, values in figures.items():
        ends = "" if values["low"] is None else f"{values['low']:8.3f} ..{values['high']:8.3f}"
        print(f"  {name:<10} {values['mean']:8.3f} {ends}")


def write_report(config: EvalConfig, name: str, items: dict, passes: dict[str, dict]):
    """Judge a benchmark's responses of all passes, each of which gets a file: responses.jsonl, caption_only.jsonl,
    blind.jsonl. Then report.json, report.md, and the tables on the screen, unless gold answers are withheld."""
    folder = os.path.join(config.out, f"{name}-scored" if config.score else name)
    about = dict(model=config.model or config.score, config=None if config.score else asdict(config),
                 prompt_id="unknown" if config.score else prompt_id(config.prompt))
    judged = {way: report.judge_all(name, rows, items) for way, rows in passes.items()}
    for way, rows in judged.items():
        write_text(os.path.join(folder, f"{way}.jsonl"), "".join(json.dumps(row) + "\n" for row in rows.values()))
    if not any(item.answer for item in items.values()):
        print(f"{name}: this split has no gold answers; its authors score what {folder}/responses.jsonl predicts")
        return
    result = about | report.summarize(name, items, judged)
    write_text(os.path.join(folder, "report.json"), json.dumps(result, indent=1))
    text = report.markdown(result)
    write_text(os.path.join(folder, "report.md"), text)
    print(f"{text.partition('## ')[0]}breakdown {folder}/report.md", flush=True)


# ---------------------------------------------------------------- stored responses


def score(config: EvalConfig):
    """Score responses of any origin: no model, no images."""
    [name] = registry.chosen(config.benchmark)
    responses = report.read_responses(config.score)
    items = registry.load_items(name, registry.load_rows(name, config.data, config.split))
    if not responses.keys() & items.keys():
        raise InputError(f"--score {config.score}: none of its {len(responses)} pids is in this split of {name}")
    if strangers := [pid for pid in responses if pid not in items]:
        print(f"note: {len(strangers)} responses belong to no question of this split, the first has pid {strangers[0]}")
    open_folder(os.path.join(config.out, f"{name}-scored"))
    write_report(config, name, items, {"responses": responses})


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, or after one line 2 for bad input, 143 for SIGTERM, 130 for Ctrl-C."""
    try:
        with ending_together(), complete_files():
            device, _ = start_processes()  # join first, so that a bad flag ends all ranks with one message
            config = on_every_rank(lambda: read_flags(sys.argv[1:] if argv is None else argv))
            if config.score:
                on_every_rank(lambda: score(config) if is_main() else None)
                return 0
            config, model, processor, clip, sets = on_every_rank(lambda: load(config, device))
            TOLD.grace = config.grace
            for questions in sets:
                run(config, model, processor, clip, *questions)
            barrier()  # a rank that left while rank 0 writes would no longer hear that a signal has come
    except InputError as error:  # it may concern only this rank, e.g. a corrupt image
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
