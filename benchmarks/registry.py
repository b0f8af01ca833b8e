"""The published benchmarks: the files of this folder that define one. None needs a judge model.

    rows = load_rows("mathvista", source, split)                 hub, cache, folder or file -> [(where, row)]
    items = load_items("mathvista", rows)                        pid -> Item: question, prompt text, gold, labels
    samples = load_samples(items, rows, root)                    what the sampler is asked

Each file says what its data set is, what counts as right there, and which columns every row has: rows of another data
set are refused before anything is asked.
"""
import importlib
import os
from pathlib import Path

from benchmarks.common import Benchmark, Item, misfit, plain
from data import IMAGE, InputError, Sample, as_image, read_rows


# Of each file of this folder in which a line begins with BENCHMARK, in the order of names.
BENCHMARKS: dict[str, Benchmark] = {
    path.stem: importlib.import_module(f"benchmarks.{path.stem}").BENCHMARK
    for path in sorted(Path(__file__).parent.glob("*.py")) if "\nBENCHMARK = " in path.read_text(encoding="utf-8")}


def chosen(names: list[str]) -> list[str]:
    """The benchmarks that --benchmark names; "all" is all of them."""
    for name in names:
        if name not in (*BENCHMARKS, "all"):
            raise InputError(f"--benchmark {name}: give one or several of {' '.join(BENCHMARKS)}, or all")
    return list(BENCHMARKS) if "all" in names else list(dict.fromkeys(names))


def place(name: str, source: str) -> str:
    """A folder may hold one folder per benchmark: then that one is meant."""
    inside = os.path.join(source, name)
    return inside if source and os.path.isdir(inside) else source


def load_rows(name: str, source: str, split: str) -> list[tuple[str, dict]]:
    """[(where, row)] of a benchmark, from whatever data.read_rows reads.

    source: as --data; "" is the hub's data set, or its cached copy. A key in an object of rows is the pid. InputError
    when it cannot be had, or has no rows.
    """
    benchmark = BENCHMARKS[name]
    source = place(name, source) or benchmark.hub
    rows = read_rows(source, split or benchmark.split, benchmark.config, only_split=True)
    if not rows:
        raise InputError(f"{source}: no rows of {name}; expected a list or an object of rows")
    return [(f"{source} row {key}", {"pid": key} | row if isinstance(key, str) and isinstance(row, dict) else row)
            for key, row in rows]


def load_items(name: str, rows: list[tuple[str, dict]]) -> dict[str, Item]:
    """pid -> Item in the order of the data set. InputError: a column that is missing or of another kind, with the name
    of the benchmark of which this is a row, if of any; a question that lacks something; or two rows with one pid."""
    items = {}
    for number, (where, row) in enumerate(rows, 1):
        row = plain(row)
        if wrong := misfit(row, BENCHMARKS[name].columns):
            others = [other for other in BENCHMARKS if not misfit(row, BENCHMARKS[other].columns)]
            advice = f"a row of {others[0]}: give --benchmark {others[0]}" if others else f"no row of {name}: fix it"
            raise InputError(f"{where}: {wrong}; this is {advice}, or give other --data")
        item = BENCHMARKS[name].item(row, number)
        for wrong, message in ((item.kind == "choice" and not item.choices, "a choice without choices"),
                               (item.kind == "float" and not item.precision, "a float without precision"),
                               (item.pid in items, f"pid {item.pid} is there twice")):
            if wrong:
                raise InputError(f"{where}: {message}; fix or remove the row")
        items[item.pid] = item
    return items


def load_samples(items: dict[str, Item], rows: list[tuple[str, dict]], root: str) -> list[Sample]:
    """The prompt text in place of the question, the picture in front of it. root: what image paths are relative to."""
    samples = []
    for item, (where, row) in zip(items.values(), rows):
        image = next((row[name] for name in ("decoded_image", "image") if row.get(name) not in (None, "")), None)
        images = () if image is None else (as_image(image, where, root),)
        samples.append(Sample(item.pid, item.query.replace(IMAGE, ""), images, item.answer, where=where))
    return samples
