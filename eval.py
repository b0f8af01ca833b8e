"""Evaluate a model on any file of questions: accuracy, pass@n, format, and the other reward parts, with 95 % intervals.

    torchrun --nproc_per_node 8 eval.py --model runs/pebr/stage2/model --data questions.jsonl
    python eval.py --model runs/demo/stage1/model --data runs/demo/world/evaluation.jsonl --group_size 4 --temperature 1

Prompt, pixels, sampler and grader are those of training. The intervals treat questions as the independent draws: with
several responses per question, the mean of a question counts once.
"""
import json
import math
import os
import statistics
import sys
from dataclasses import asdict

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import rewards
from checkpoint import write_text
from config import EvalConfig, Flags, check_sampling, complain
from data import InputError
from model import Policy, find_model
from processes import first_error, gather, is_writer, mine, no_bar, print0, start_processes, stop_processes
from rollout import Timer, collect, records, seed_of

CHUNK = 64  # questions per process between two signs of life


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, 1.96 standard errors; one value per question."""
    if len(values) < 2:
        return sum(values), math.inf
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5


def report(rows: list[dict], parts: list[str]) -> dict[str, tuple[float, float]]:
    """Every figure as (mean, half width of the 95 % interval) over questions. rows: as `rollout.records` makes them."""
    per_question = {part: [statistics.fmean(r[part] for r in row["responses"]) for row in rows] for part in parts}
    G = len(rows[0]["responses"])
    per_question[f"pass@{G}"] = [float(any(r["accuracy"] == 1 for r in row["responses"])) for row in rows]
    per_question["truncated"] = [statistics.fmean(not r["finished"] for r in row["responses"]) for row in rows]
    per_question["no answer"] = [statistics.fmean(r["extracted"] is None for r in row["responses"]) for row in rows]
    per_question["tokens"] = [statistics.fmean(r["tokens"] for r in row["responses"]) for row in rows]
    return {name: interval(values) for name, values in per_question.items()}


def start(config: EvalConfig) -> tuple:
    """Load and check everything: (model, processor, clip, the samples asked, the number of prompts over the limit)."""
    for name in ("model", "data"):
        if not getattr(config, name):
            raise InputError(f"--{name} is missing")
    check_sampling(config)
    device, _ = start_processes()
    folder = find_model(config.model)
    processor = data.load_processor(folder, config.min_pixels, config.max_pixels)
    data.note_pixels(folder, config.min_pixels, config.max_pixels, log=print0)
    samples = data.load_samples(config.data, config.image_root, config.split)
    data.check_images(samples)
    data.require(samples, "answer", config.data)
    asked = data.drop_long(samples, processor, config.max_prompt, log=print0)
    clip = rewards.load_clip(config.clip, device) if config.clip else None
    data.encode_prompt(max(asked, key=lambda sample: len(sample.images)), processor)  # template and processor work
    try:
        os.makedirs(config.out, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {config.out}: no folder can be made there ({error.strerror})") from error
    model = Policy.load(folder, device, getattr(torch, config.dtype)).eval()
    return model, processor, clip, asked, len(samples) - len(asked)


def ask(config: EvalConfig, model, processor, clip, samples: list[data.Sample]) -> list[dict]:
    """The model's graded responses to every question: on rank 0 the rows of all, in the order of the file."""
    rows, chunk = [], CHUNK * dist.get_world_size()
    for first in tqdm(range(0, len(samples), chunk), "eval", disable=no_bar()):
        part = mine(samples[first : first + chunk])
        seeds = [seed_of(config.seed, "eval", sample.qid) for sample in part]
        rows += gather(records(collect(model, processor, clip, part, seeds, config, Timer())))
    for response in (response for row in rows for response in row["responses"]):
        del response["reward"]  # a weighted sum, and evaluation has no weights
    return rows


def write_report(config: EvalConfig, rows: list[dict], dropped: int):
    """report.json and responses.jsonl in config.out, and a table on the screen."""
    figures = report(rows, [part for part in rewards.PARTS if part != "clip" or config.clip])
    result = dict(questions=len(rows), dropped_prompts=dropped, config=asdict(config),
                  figures={name: dict(mean=value, half_width=half if math.isfinite(half) else None)
                           for name, (value, half) in figures.items()})
    write_text(os.path.join(config.out, "responses.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_text(os.path.join(config.out, "report.json"), json.dumps(result, indent=1))
    print(f"{config.model} on {config.data}: {len(rows)} questions x {config.group_size}, "
          f"temperature {config.temperature}")
    for name, (value, half) in figures.items():
        print(f"  {name:<10} {value:8.3f} +- {half:.3f}")


def main(argv: list[str] | None = None) -> int:
    """Evaluate; returns the exit code: 0, or 2 after one line about bad input."""
    loaded = error = None
    try:
        config = Flags(EvalConfig, __doc__).read(sys.argv[1:] if argv is None else argv, {})
        *loaded, dropped = start(config)
    except InputError as complaint:
        error = complaint
    if error := first_error(error):
        return complain(error, is_writer())
    try:
        rows = ask(config, *loaded)
    except InputError as complaint:  # perhaps on this rank alone: an image that has gone bad, say
        return complain(complaint, True)
    if is_writer():
        write_report(config, rows, dropped)
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
