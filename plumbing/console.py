"""What a person sees on the screen of a program that takes minutes: little, and the rest in a file."""
import contextlib
import os
import sys
from statistics import fmean

from data import read_json
from plumbing.processes import is_main


@contextlib.contextmanager
def log_to(path: str):
    """Inside, what rank 0 prints goes to this file. Yields a print for the screen and the file."""
    screen = sys.stdout
    with open(path if is_main() else os.devnull, "w", buffering=1) as file, contextlib.redirect_stdout(file):
        def say(text: str):
            for each in (screen, file) if is_main() else ():
                print(text, file=each, flush=True)

        yield say


def learned(folder: str, metrics: tuple[str, ...]) -> str:
    """What a stage has changed: of each metric the mean of the first and of the last three steps. Of stage sample, how
    many questions it has found easy, medium and hard."""
    sizes = {kind: f"{folder}/{kind}.jsonl" for kind in ("easy", "medium", "hard")}
    if os.path.exists(sizes["easy"]):
        return ", ".join(f"{len(read_json(path))} {kind}" for kind, path in sizes.items())
    rows = list(read_json(f"{folder}/metrics.jsonl").values()) if metrics else []
    return ", ".join(f"{metric.split('/')[1]} {fmean(row[metric] for row in rows[:3]):.2f} -> "
                     f"{fmean(row[metric] for row in rows[-3:]):.2f}" for metric in metrics)


def table(figures: tuple[str, ...], rows: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Mean and half width of the 95 % interval of each figure."""
    lines = [f"\n{'':<22}" + "".join(f"{figure:>16}" for figure in figures)]
    return "\n".join(lines + [f"{name:<22}" + "".join(f"{mean:>9.3f} ±{half:.3f}" for mean, half in row.values())
                              for name, row in rows.items()])
