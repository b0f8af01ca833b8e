"""Six published benchmarks: where they are, what is asked, and what counts as right, all without a judge model.

    mathvista       MathVista         AI4Math/MathVista          testmini 1000, test 5141 (gold answers withheld)
    mathverse       MathVerse         AI4Math/MathVerse          testmini 3940: 788 problems in 5 versions
    mathvision      MATH-Vision       MathLLMs/MathVision        test 3040, testmini 304
    hallusionbench  HallusionBench    lmms-lab/HallusionBench    image 951
    mmstar          MMStar            Lin-Chen/MMStar            val 1500
    ocrbench        OCRBench          echo840/OCRBench           test 1000

    rows = load_rows("mathvista", source, split, images=True)    hub, cache, folder or file -> [(where, row)]
    items = load_items("mathvista", rows)                        pid -> Item: question, prompt text, gold, labels
    samples = load_samples(items, rows, root)                    what the sampler is asked

Each benchmark has two figures. "strict" is ours: read by extraction.py, and a response without an answer is wrong.
"official" is the published rule as far as it needs no judge; what each counts is in the table BENCHMARKS. Names of hub
configs, splits and columns are those of the data set cards; what could not be checked against the data is marked so.
"""
import difflib
import os

from benchmarks import mathvista
from benchmarks.common import Benchmark, Item, present
from benchmarks.hallusionbench import hallusionbench_item, hallusionbench_means, judge_hallusionbench
from benchmarks.mathverse import judge_mathverse, mathverse_item, mathverse_means
from benchmarks.mathvision import judge_mathvision, mathvision_item
from benchmarks.mathvista import judge_mathvista, mathvista_item
from benchmarks.mmstar import judge_mmstar, mmstar_item, mmstar_means
from benchmarks.ocrbench import final_text, judge_ocrbench, ocrbench_item, ocrbench_means
from data import IMAGE, InputError, Sample, as_image, read_json



BENCHMARKS = {
    "mathvista": Benchmark(
        "AI4Math/MathVista", None, "testmini", mathvista.GROUPS, mathvista_item, judge_mathvista,
        official="the authors' normaliser on our extraction: the nearest option stands in for a missing answer",
        strict="the same, and a response without an answer is wrong"),
    "mathverse": Benchmark(
        "AI4Math/MathVerse", "testmini", "testmini",
        ("problem_version", "question_type", "gold", "subject", "subfield"), mathverse_item, judge_mathverse,
        official="extraction and gold answer are the same text: the published rule where it asks no judge",
        strict="the same letter, or an equal value", means=mathverse_means),
    "mathvision": Benchmark(
        "MathLLMs/MathVision", None, "test", ("subject", "level"), mathvision_item, judge_mathvision,
        official="the same letter, the same text, or numbers within 1e-6",
        strict="the same letter, or an equal value"),
    "hallusionbench": Benchmark(
        "lmms-lab/HallusionBench", None, "image", ("category", "subcategory"), hallusionbench_item,
        judge_hallusionbench,
        official="of the words yes and no just the right one, in the final section (in a response without one, in all)",
        strict="yes or no as extracted", means=hallusionbench_means),
    "mmstar": Benchmark(
        "Lin-Chen/MMStar", "val", "val", ("category", "l2_category"), mmstar_item, judge_mmstar,  # "val": not verified
        official="VLMEvalKit's letter from the whole response, without its judge",
        strict="the letter as extracted", means=mmstar_means),
    "ocrbench": Benchmark(
        "echo840/OCRBench", None, "test", ("group", "question_type", "dataset"), ocrbench_item, judge_ocrbench,
        official="a gold answer is part of the whole response, reasoning included",
        strict="a gold answer is part of the final section", means=ocrbench_means, extract=final_text),
}


def chosen(words: list[str]) -> list[str]:
    """The benchmarks that --benchmark names, with commas or spaces between; "all" is all of them."""
    names = [name for word in words for name in word.split(",") if name]
    for name in names:
        if name not in (*BENCHMARKS, "all"):
            near = difflib.get_close_matches(name.lower(), BENCHMARKS, 1)
            raise InputError(f"--benchmark {name}: " + (f"did you mean {near[0]}?" if near else
                             f"give one or several of {', '.join(BENCHMARKS)}, or all"))
    return list(BENCHMARKS) if "all" in names else list(dict.fromkeys(names))


# ---------------------------------------------------------------- rows


def read_set(source: str, config: str | None, split: str):
    """A hub name, a folder of `hf download` or of `save_to_disk`, or a parquet file -> datasets.Dataset."""
    import datasets  # a second to import, and re-scoring from a JSON file needs none
    from huggingface_hub.utils import logging
    datasets.disable_progress_bars()
    logging.set_verbosity_error()                  # a hub that cannot be reached is one line, not one per attempt
    if source.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=source, split="train")
    if os.path.exists(os.path.join(source, "dataset_dict.json")) or os.path.exists(os.path.join(source, "state.json")):
        loaded = datasets.load_from_disk(source)
    else:
        try:
            return datasets.load_dataset(source, config, split=split)
        except ValueError:                         # no such config or split: there may be but one, under another name
            loaded = datasets.load_dataset(source)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded and len(loaded) > 1:
        raise InputError(f"data set {source}: no split {split}; it has {', '.join(loaded)}: give one with --split")
    return loaded[split] if split in loaded else next(iter(loaded.values()))


def named_rows(source: str, benchmark: Benchmark, split: str, images: bool) -> list[dict]:
    """The rows of a data set in any of its forms. Pictures stay as their files' bytes, or are left out."""
    if source.removesuffix(".gz").endswith((".json", ".jsonl")):
        rows = read_json(source)
        if isinstance(rows, dict):
            rows = [{"pid": pid} | row if isinstance(row, dict) else row for pid, row in rows.items()]
        return rows
    import datasets
    try:
        loaded = read_set(source, benchmark.config, split)
        for column, feature in loaded.features.items():
            if isinstance(feature, datasets.Image):
                loaded = loaded.cast_column(column, datasets.Image(decode=False)) if images else \
                    loaded.remove_columns(column)
        return list(loaded)
    except InputError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"data set {source}, split {split}: cannot be loaded ({reason}); where there is a network, run `hf "
            f"download --repo-type dataset {benchmark.hub} --local-dir FOLDER` and give --data FOLDER (or a .parquet "
            "or .json file of it), or point HF_HOME to a cache that has it") from error


def place(name: str, source: str) -> str:
    """A folder may hold one folder per benchmark: then that one is meant."""
    inside = os.path.join(source, name)
    return inside if source and os.path.isdir(inside) else source


def load_rows(name: str, source: str, split: str, images: bool = True) -> list[tuple[str, dict]]:
    """[(where, row)] of a benchmark from a hub, a folder, or a .parquet, .json[.gz] or .jsonl[.gz] file.

    source: as --data; "" is the hub's data set, or its cached copy.
    images: False leaves pictures out, for scoring needs none. InputError when it cannot be had, or has no rows.
    """
    benchmark = BENCHMARKS[name]
    source = place(name, source) or benchmark.hub
    rows = named_rows(source, benchmark, split or benchmark.split, images)
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{source}: no rows of {name}; expected a list or an object of rows")
    return [(f"{source} row {number}", row) for number, row in enumerate(rows, 1)]


def load_items(name: str, rows: list[tuple[str, dict]]) -> dict[str, Item]:
    """pid -> Item in the order of the data set. InputError: a column that is missing, or two rows with one pid."""
    items = {}
    for number, (where, row) in enumerate(rows, 1):
        try:
            item = BENCHMARKS[name].item(row, number)
        except KeyError as error:
            raise InputError(f"{where}: no column {error}; it has {', '.join(row)}: no row of {name}") from error
        if not item.question or item.pid in items:
            wrong = f"pid {item.pid} is there twice" if item.question else "no question"
            raise InputError(f"{where}: {wrong}; this is no row of {name}, or the data set is broken")
        items[item.pid] = item
    return items


def load_samples(items: dict[str, Item], rows: list[tuple[str, dict]], root: str) -> list[Sample]:
    """The prompt text in place of the question, the picture in front of it. root: what image paths are relative to."""
    samples = []
    for item, (where, row) in zip(items.values(), rows):
        image = next((row[name] for name in ("decoded_image", "image") if present(row, name) is not None), None)
        images = () if image is None else (as_image(image, where, root),)
        samples.append(Sample(item.pid, mathvista.query(item).replace(IMAGE, ""), images, item.answer, where=where))
    return samples
