"""What a person sees on the screen of a program that takes minutes: little, and the rest in a file.

It reads what the stages have written (metrics.jsonl and the buckets) and knows no model.
"""
import contextlib
import os
import sys
from statistics import fmean
from types import SimpleNamespace

from data import read_json
from plumbing.processes import is_main


@contextlib.contextmanager
def log_to(path: str, verbose: bool):
    """Inside, what rank 0 prints goes to this file, and when verbose also to the screen. Yields a print for both."""
    with open(path if is_main() else os.devnull, "w", buffering=1) as file:
        files = (sys.stdout, file)
        both = SimpleNamespace(write=lambda text: [each.write(text) for each in files], flush=sys.stdout.flush)
        with contextlib.redirect_stdout(both if verbose else file):
            yield lambda *words: print(*words, file=both if is_main() else file, flush=True)


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
