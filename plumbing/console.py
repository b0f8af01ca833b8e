"""What a person sees on the screen of a program that takes minutes: little, and the rest in a file.

It reads what the stages have written (metrics.jsonl, responses.jsonl) and knows no model.
"""
import contextlib
import io
import os
import sys
import time
from statistics import fmean

import torch

from data import read_json
from plumbing.processes import is_main, sum_over_ranks


class Tee(io.TextIOBase):
    """Writes to several files what is written to it."""

    def __init__(self, *files):
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


@contextlib.contextmanager
def log_to(path: str, verbose: bool):
    """Inside, what rank 0 prints goes to this file, and when verbose also to the screen. Yields a print for both."""
    with open(path if is_main() else os.devnull, "w") as file:
        both = Tee(sys.stdout, file)
        with contextlib.redirect_stdout(both if verbose else file):
            yield lambda *words: print(*words, file=both if is_main() else file)


def work_per_second() -> float:
    """How many small matrix products all processes together do in the second that begins now."""
    x, done, end = torch.ones(128, 64) / 64, 0, time.perf_counter() + 1
    while time.perf_counter() < end:
        x, done = torch.nn.functional.normalize(x @ x.T @ x), done + 1
    return sum_over_ranks({"done": done})["done"]


def learned(folder: str, metrics: tuple[str, ...]) -> str:
    """What a stage has changed: of each metric the mean of the first and of the last three steps. Of stage sample, how
    many questions it has found easy, medium and hard."""
    sizes = {kind: f"{folder}/{kind}.jsonl" for kind in ("easy", "medium", "hard")}
    if os.path.exists(sizes["easy"]):
        return ", ".join(f"{len(read_json(path))} {kind}" for kind, path in sizes.items())
    rows = list(read_json(f"{folder}/metrics.jsonl").values()) if metrics else []
    return ", ".join(f"{metric.split('/')[1]} {fmean(row[metric] for row in rows[:3]):.2f} -> "
                     f"{fmean(row[metric] for row in rows[-3:]):.2f}" for metric in metrics)


def before_and_after(folders: dict[str, str]) -> str:
    """The first responses of three models to the question whose description got better with the second model, and
    whose answer was wrong before and is right in the end.

    folders: of evaluations of the same questions, each with the title of its response."""
    files = [read_json(f"{folder}/responses.jsonl").values() for folder in folders]
    asked = [[row["responses"][0] | row for row in rows] for rows in zip(*files)]
    best = max(asked, key=lambda rows: rows[1]["keyword"] - rows[0]["keyword"] + rows[2]["keyword"]
               + rows[2]["accuracy"] - rows[0]["accuracy"])
    images = ", ".join(map(os.path.relpath, best[0]["images"]))
    lines = [f"{best[0]['question']} (gold answer {best[0]['answer']}, image {images})"]
    for title, row in zip(folders.values(), best):
        lines += [f"\n{title}: key words {row['keyword']:.2f}, answer {'right' if row['accuracy'] else 'wrong'}",
                  *(f"    {line}" for line in row["text"].splitlines())]
    return "\n".join(lines)


def table(figures: tuple[str, ...], rows: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Mean and half width of the 95 % interval of each figure."""
    lines = [f"\n{'':<22}" + "".join(f"{figure:>16}" for figure in figures)]
    return "\n".join(lines + [f"{name:<22}" + "".join(f"{mean:>9.3f} ±{half:.3f}" for mean, half in row.values())
                              for name, row in rows.items()])
