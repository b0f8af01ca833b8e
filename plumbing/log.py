"""What a step says about itself: from rollout rows, optimiser statistics and seconds to named numbers.

Names are group/name; the README's table says what each means and what to watch for. Nothing here is trained on.
"""
import contextlib
import math
import resource
import statistics
import time

import torch

from plumbing.processes import here


PARTS = ("clip", "keyword", "format", "length", "accuracy")


def mean(values) -> float:
    values = list(values)
    return sum(values) / max(1, len(values))


def rollout_metrics(rows: list[dict]) -> dict[str, float]:
    """What one step's responses say about reward and policy; _std is the mean standard deviation within a group."""
    responses = [response for row in rows for response in row["responses"]]
    metrics = {"adv/zero_std_groups": mean(len({r["reward"] for r in row["responses"]}) == 1 for row in rows)}
    for part in ("reward", *PARTS):
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
    optimiser = {"loss", "lr", "grad_norm", "skipped", "tokens"}
    return {("opt/" if name in optimiser else "policy/") + name: value for name, value in metrics.items()}


def peak_memory(forget=False) -> float:
    """GB that this rank has held at most: of its GPU, since one was told to forget, or of host memory without one."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        if forget:
            torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_metrics(seconds: dict[str, float], metrics: dict[str, float], rows: list[dict]) -> dict[str, float]:
    """Seconds per phase, tokens per second over all ranks, and this rank's peak memory."""
    drawn = sum(response["tokens"] for row in rows for response in row["responses"])
    speed = {"perf/train_tokens_per_s": metrics["opt/tokens"] / seconds["update"]}
    if "rollout" in seconds:
        speed["perf/rollout_tokens_per_s"] = drawn / seconds["rollout"]
    speed["perf/peak_memory_gb"] = peak_memory()
    return {f"time/{phase}": value for phase, value in seconds.items()} | speed


def finite(metrics: dict) -> dict:
    """nan and infinity as null: json has neither."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def console_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """The metrics a person watches, vanishing advantages first."""
    names = ["adv/zero_std_groups", "reward/total", *(f"reward/{part}" for part in PARTS), "policy/kl",
             "policy/entropy", "response/length", "opt/grad_norm", "time/step"]
    if "reward/total" not in metrics:
        names[0] = "opt/loss"  # the loss of RL says nothing (it is near 0 by construction), that of the warm-up does
    shown = [f"{name.split('/')[-1]} {metrics[name]:.3g}" for name in names if name in metrics]
    return f"step {step + 1}/{steps}  " + "  ".join(shown)


class Timer:
    """Seconds per phase: `with timer("rollout"): ..` adds to timer.seconds["rollout"]; other ranks see where we are."""

    def __init__(self, step: int = 0):
        self.step, self.seconds = step, {}

    @contextlib.contextmanager
    def __call__(self, phase):
        here(f"{phase} of step {self.step}")
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
