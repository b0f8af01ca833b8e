"""What a step says about itself: from rollout rows, optimiser statistics and seconds to named numbers.

Names are group/name; the README's table says what each means and what to watch for. Nothing here is trained on.
"""
import importlib
import json
import math
import os
import statistics
import sys
from dataclasses import asdict

import torch

from data import parse
from plumbing.doctor import Doctor
from plumbing.processes import SharedError, is_main, print0
from plumbing.run_folder import write_text


def mean(values) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))


def records(answered) -> list[dict]:
    """rewards.Answered as json rows, one per question: rollout files, metrics and evaluation are made of these."""
    return [dict(qid=one.sample.qid, question=one.sample.question, answer=one.sample.answer,
                 key_words=list(one.sample.key_words), images=list(one.sample.images), responses=[
        dict(text=text, extracted=parse(text).answer, tokens=len(response.ids), finished=response.finished,
             **{name: values[g] for name, values in one.earned.items()})
        for g, (text, response) in enumerate(zip(one.texts, one.responses))]) for one in answered]


def rollout_metrics(rows: list[dict], parts: tuple[str, ...]) -> dict[str, float]:
    """What one step's responses say about reward and policy; _std is the mean standard deviation within a group."""
    responses = [response for row in rows for response in row["responses"]]
    metrics = {"adv/zero_std_groups": mean(len({r["reward"] for r in row["responses"]}) == 1 for row in rows)}
    for part in ("reward", *parts):
        name = "reward/" + ("total" if part == "reward" else part)
        metrics[name] = mean(r[part] for r in responses)
        metrics[name + "_std"] = mean(statistics.stdev(r[part] for r in row["responses"]) for row in rows)
    return metrics | {
        "response/length": mean(r["tokens"] for r in responses),
        "response/truncated": mean(not r["finished"] for r in responses),
        "response/parse_failed": mean(r["extracted"] is None for r in responses),
    }


def update_metrics(stats: list[dict]) -> dict[str, float]:
    """The statistics of a step's optimiser steps: their mean, but the largest ratio and the last learning rate."""
    metrics = {name: mean(s[name] for s in stats) for name in stats[0]}
    metrics |= {"ratio_max": max(s["ratio_max"] for s in stats), "lr": stats[-1]["lr"],
                "tokens": sum(s["tokens"] for s in stats)}
    if "sampler_gap" in metrics:
        metrics["sampler_gap"] = stats[0]["sampler_gap"]  # later ones contain what the updates have changed
    optimiser = {"loss", "lr", "grad_norm", "skipped", "tokens"}
    return {("opt/" if name in optimiser else "policy/") + name: value for name, value in metrics.items()}


def peak_memory() -> float:
    """GB that this rank has held at most: of its GPU, or of host memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def step_metrics(rows: list[dict], parts: tuple[str, ...], stats: list[dict], seconds: dict[str, float]) -> dict:
    """All named numbers of a step: tokens of all ranks, seconds of this one. The warm-up has no rows of a rollout."""
    metrics = (rollout_metrics(rows, parts) if rows else {}) | update_metrics(stats)
    metrics |= {f"time/{phase}": value for phase, value in seconds.items()}
    metrics["perf/train_tokens_per_s"] = metrics["opt/tokens"] / seconds["update"]
    if "rollout" in seconds:  # a rank without a question has rows of the others
        drawn = sum(response["tokens"] for row in rows for response in row["responses"])
        metrics["perf/rollout_tokens_per_s"] = drawn / seconds["rollout"]
    return metrics | {"perf/peak_memory_gb": peak_memory()}


def check_skipped(run, step: int, skipped: int):
    """InputError after five steps in a row without a finite gradient, of which the last is `step`."""
    if skipped == 5:
        qids = ", ".join(run.samples[i].qid for i in run.batches[step])
        raise SharedError(f"{skipped} steps in a row, the last is step {step}, had a gradient that is not finite: no "
                          f"model is exported; lower --lr, in a run of its own; the last step's rows are qid {qids}")


def connect(config, folder: str):
    """log(step, metrics, rows) and end() of --tracker, a mirror of metrics.jsonl for who watches many runs; on other
    ranks than the first, two functions that do nothing."""
    if config.tracker == "none" or not is_main():
        return lambda *_: None, lambda: None
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(os.path.join(folder, "tensorboard"))
        return lambda step, metrics, _: [writer.add_scalar(*each, step) for each in metrics.items()], writer.close
    service = importlib.import_module(config.tracker)  # trackio has wandb's names
    place = {"dir": folder} if config.tracker == "wandb" else {}
    service.init(project="pebr", name=os.path.relpath(folder).replace(os.sep, "-"), config=asdict(config), **place)

    def log(step: int, metrics: dict, rows: list[dict]):
        if rows and step % 20 == 0:  # the responses to one question, as a table
            responses = rows[0]["responses"]
            cells = [list(response.values()) for response in responses]
            metrics = metrics | {"sample": service.Table(columns=list(responses[0]), data=cells)}
        service.log(metrics, step=step)
    return log, service.finish


class Log:
    """What rank 0 leaves of a stage's steps: files, lines on the screen, the doctor's lines, and a tracker's mirror."""

    def __init__(self, config, folder: str, bar):
        self.folder, self.bar, self.doctor = folder, bar, Doctor(config)
        self.metrics, (self.track, self.end_tracker) = os.path.join(folder, "metrics.jsonl"), connect(config, folder)
        if is_main():
            with open(self.metrics) as file:
                for line in file:  # of a run that is resumed
                    self.doctor.look(json.loads(line))

    def step(self, step: int, metrics: dict[str, float], rows: list[dict]):
        """nan and infinity are written as null, because json has neither."""
        if not is_main():
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")
        if rows:
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(os.path.join(self.folder, "rollouts", f"step_{step:06d}.jsonl"), lines)
        self.track(step, {name: value for name, value in finite.items() if value is not None}, rows)
        for line in (console_line(step, self.bar.total, metrics), *self.doctor.look(finite)):
            self.bar.write(line)

    def end(self):
        """Everything that the doctor has said, once more."""
        for line in self.doctor.said.values():
            print0(f"doctor: {line}")
        self.end_tracker()


def console_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """The metrics a person watches, vanishing advantages first."""
    rewards = [name for name in metrics if name.startswith("reward/") and not name.endswith("_std")]
    first = "adv/zero_std_groups" if rewards else "opt/loss"  # the loss of RL is near 0 whatever is learned
    names = [first, *rewards, "policy/kl", "policy/entropy", "response/length", "opt/grad_norm", "time/step"]
    shown = [f"{name.split('/')[-1]} {metrics[name]:.3g}" for name in names if name in metrics]
    shown += [f"{name} {value:.3g}" for name, value in metrics.items() if name.startswith("eval/")]
    return f"step {step + 1}/{steps}  " + "  ".join(shown)
