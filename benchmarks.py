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
import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import mathvista
from answers import MAX_CHARACTERS, clean, parse, quantity
from data import IMAGE, InputError, Sample, as_image
from extraction import LETTERS, NO_ANSWER, extract
from grader import process_grader
from mathvista import Item, present

Verdict = tuple[str | None, bool, bool]            # prediction, official, strict

# ---------------------------------------------------------------- rows to items


def labels_of(row: dict, *names: str) -> dict[str, tuple[str, ...]]:
    """The values to break a score down by, as texts; none where the row has null."""
    return {name: () if present(row, name) is None else (str(row[name]),) for name in names}


def text_of(row: dict, *names: str) -> str:
    """The first of these columns that is not empty, stripped."""
    texts = (str(row[name]).strip() for name in names if present(row, name) is not None)
    return next(filter(None, texts), "")


def metadata_of(row: dict, number: int) -> dict:
    metadata = present(row, "metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"row {number}: metadata is {metadata!r}; expected an object")
    return metadata


def listed_options(question: str) -> tuple[str, ...]:
    """The texts of "... Choices: A: 1 B: 2" (or "Options:"); the letters A to D where they cannot be told apart."""
    _, heading, listed = question.rpartition("Choices:") if "Choices:" in question else question.rpartition("Options:")
    marks = []
    for match in re.finditer(r"(?:^|(?<=[\s,;.]))\(?([A-H])[:.)]\s*", listed if heading else ""):
        if match[1] == LETTERS[len(marks)]:
            marks.append(match)
    ends = [match.start() for match in marks[1:]] + [len(listed)]
    texts = tuple(listed[match.end():end].strip().rstrip(",;") for match, end in zip(marks, ends))
    return texts if len(texts) > 1 else tuple("ABCD")


def mathvista_item(row: dict, number: int) -> Item:
    return mathvista.item_from_row(row, f"row {number}")


def mathverse_item(row: dict, number: int) -> Item:
    """In the version Vision Only the question stands in the picture; what is asked then is query_wo (not verified)."""
    is_choice = row["question_type"] == "multi-choice"
    question, answer = text_of(row, "question_for_eval", "question", "query_wo"), text_of(row, "answer")
    gold = "letter" if is_choice else "number" if quantity(clean(answer)) else "other"
    return Item(pid=text_of(row, "sample_index") or str(number), question=question,
                kind="choice" if is_choice else "text", answer=answer,
                choices=listed_options(question) if is_choice else (),
                query=text_of(row, "question", "query_wo"),
                labels=labels_of(row, "problem_version", "question_type")
                | labels_of(metadata_of(row, number), "subject", "subfield") | {"gold": (gold,)})


def mathvision_item(row: dict, number: int) -> Item:
    """Options that are just letters stand in the picture. <image1> marks where the one picture was: it goes first."""
    options = present(row, "options")
    options = () if options is None else tuple(map(str, options))        # an array cannot be asked whether it is empty
    question = re.sub(r" ?<image\d+>", "", text_of(row, "question")).strip()
    lettered = "".join(options) == LETTERS[: len(options)]
    listed = [] if lettered else [f"({LETTERS[i]}) {option}" for i, option in enumerate(options)]
    answer = text_of(row, "answer")
    if options and answer not in LETTERS[: len(options)] and answer in options:
        answer = LETTERS[options.index(answer)]
    return Item(pid=text_of(row, "id") or str(number), question=question, kind="choice" if options else "text",
                choices=options, answer=answer, query="\n".join([question, *listed]),
                labels=labels_of(row, "subject", "level"))


YES_NO = {"1": "Yes", "0": "No", "yes": "Yes", "no": "No"}  # that '1' is yes in HallusionBench is not verified


def hallusionbench_item(row: dict, number: int) -> Item:
    answer, question = text_of(row, "gt_answer"), text_of(row, "question")
    if answer.lower() not in YES_NO:
        raise InputError(f"row {number}: gt_answer is {answer!r}; expected 1, 0, yes or no")
    place = [text_of(row, name) for name in ("subcategory", "set_id")]
    groups = {name: (" ".join([*place, text_of(row, f"{name}_id")]),) for name in ("figure", "question")}
    return Item(pid=str(number), question=question, kind="yesno", answer=YES_NO[answer.lower()],
                query=f"{question} Please answer yes or no.", labels=labels_of(row, "category", "subcategory") | groups)


def mmstar_item(row: dict, number: int) -> Item:
    question = text_of(row, "question")
    return Item(pid=text_of(row, "index") or str(number), question=question, kind="choice",
                answer=text_of(row, "answer"), choices=listed_options(question),
                query=f"{question}\nPlease select the correct answer from the options above.",
                labels=labels_of(row, "category", "l2_category"))


HANDWRITTEN = "Handwritten Mathematical Expression Recognition"


def ocrbench_item(row: dict, number: int) -> Item:
    golds = present(row, "answer")
    golds = () if golds is None else (golds,) if isinstance(golds, str) else tuple(map(str, golds))
    question, kind = text_of(row, "question"), text_of(row, "question_type")
    group = "Text Recognition" if kind.endswith("Recognition") and kind != HANDWRITTEN else kind
    return Item(pid=str(number), question=question, kind="text", answer=" or ".join(golds), query=question,
                labels={"group": (group,), "question_type": (kind,), "golds": golds} | labels_of(row, "dataset"))


# ---------------------------------------------------------------- verdicts


def judge_mathvista(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    return mathvista.judge(extraction, rule, item)


def same_value(extraction: str, item: Item) -> bool:
    r"""Equal numbers, texts, lists, and algebra: \sqrt{8} is 2\sqrt{2}."""
    return process_grader("own").correct(extraction, item.answer)


def judge_mathverse(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    same = clean(extraction) == clean(item.answer)  # our extraction of a text is in clean's spelling
    if item.kind == "choice":
        return extraction, same, same and rule not in NO_ANSWER
    return extraction, same, rule not in NO_ANSWER and same_value(extraction, item)


def judge_mathvision(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    """VLMEvalKit's is_equal runs both texts as code to get numbers; here they are read as numbers."""
    if item.kind == "choice":
        same = extraction == item.answer
        return extraction, same, same and rule not in NO_ANSWER
    given, wanted = quantity(clean(extraction)), quantity(clean(item.answer))
    equal = given is not None and wanted is not None and abs(given[0] - wanted[0]) < Fraction(1, 10**6)
    same = clean(extraction).lower() == clean(item.answer).lower()
    return extraction, same or equal, rule not in NO_ANSWER and same_value(extraction, item)


def judge_hallusionbench(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    """Nearly every reasoning holds the word "no": the published rule is put to the final section where there is one."""
    section = parse(response).answer
    words = set(re.findall(r"\w+", (response if section is None else section).lower()))
    official = words & {"yes", "no"} == {item.answer.lower()}
    return extraction, official, extraction == item.answer and rule not in NO_ANSWER


def can_infer(response: str, choices: tuple[str, ...]) -> str:
    """VLMEvalKit's letter without a judge (utils/matching_util.py); Z when it would ask one.

        response                          choices           -> letter
        "(B)"                             ("red", "blue")   -> "B"
        "I say B, which is what I see"    ("red", "blue")   -> "Z"      not among the last words
        "A or B"                          ("red", "blue")   -> "Z"
        "the answer is B, A is wrong"     ("red", "blue")   -> "B"
        "Blue"                            ("red", "blue")   -> "B"
    """
    letters = LETTERS[: len(choices)]
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", response).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    stated = re.search(rf"answer is:? \(?([{letters}])\b", response)
    if stated:
        return stated[1]
    named = [letter for letter, choice in zip(letters, choices) if choice.lower() in response.lower()]
    return named[0] if len(named) == 1 and len(response) <= 2 * sum(map(len, choices)) else "Z"


def judge_mmstar(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    return (extraction, can_infer(response, item.choices) == item.answer,
            extraction == item.answer and rule not in NO_ANSWER)


def final_text(response: str, item: Item) -> tuple[str, str]:
    """OCRBench's extraction: the final section as it stands, for the text to read may be anything; else a response that
    is short enough to be nothing but an answer."""
    answer = parse(response).answer
    if answer is not None:
        return answer, "section" if answer else "nothing"
    return (response.strip(), "whole") if 0 < len(response.strip()) <= MAX_CHARACTERS else ("", "nothing")


def contains(text: str, item: Item) -> bool:
    """OCRBench: is any gold answer part of the text? Case counts in handwritten formulas only, and spaces do not."""
    if item.labels["question_type"] == (HANDWRITTEN,):
        return any(re.sub(r"\s", "", gold) in re.sub(r"\s", "", text) for gold in item.labels["golds"])
    text = text.lower().strip().replace("\n", " ")
    return any(gold.lower().strip().replace("\n", " ") in text for gold in item.labels["golds"])


def judge_ocrbench(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    return extraction, contains(response, item), rule not in NO_ANSWER and contains(extraction, item)


# ---------------------------------------------------------------- figures beside the plain accuracy, in percent


def grouped(right: dict[str, bool], items: dict[str, Item], label: str) -> list[list[bool]]:
    """The verdicts of each group of items that share a value of this label."""
    groups = defaultdict(list)
    for pid, item in items.items():
        for value in item.labels[label]:
            groups[value].append(right[pid])
    return list(groups.values())


def percent(values: list) -> float:
    return 100 * sum(values) / max(len(values), 1)


def mean_of_groups(right: dict[str, bool], items: dict[str, Item], label: str) -> float:
    groups = [percent(group) for group in grouped(right, items, label)]
    return sum(groups) / max(len(groups), 1)


def no_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    return {}


def mathverse_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    only = {pid: item for pid, item in items.items() if item.labels["problem_version"] == ("Vision Only",)}
    return {"mean of the versions": mean_of_groups(right, items, "problem_version"),
            "Vision Only": percent([right[pid] for pid in only])}


def hallusionbench_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    """aAcc over questions; fAcc and qAcc: share of figures, and of questions, with all answers right."""
    accuracies = {"aAcc": percent(list(right.values())),
                  "fAcc": percent([all(group) for group in grouped(right, items, "figure")]),
                  "qAcc": percent([all(group) for group in grouped(right, items, "question")])}
    return accuracies | {"mean of the three": sum(accuracies.values()) / 3}


def mmstar_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    return {"mean of the categories": mean_of_groups(right, items, "category")}


def ocrbench_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    """OCRBench counts points: one a question, 1000 in all."""
    return {"score": float(sum(right.values()))}


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Benchmark:
    hub: str
    config: str | None                             # of the hub data set
    split: str
    groups: tuple[str, ...]                        # labels that the score is broken down by
    item: Callable[[dict, int], Item]              # row and its number -> Item
    judge: Callable[[str, str, str, Item], Verdict]
    official: str                                  # what each figure counts as right
    strict: str
    means: Callable[[dict, dict], dict] = no_means
    extract: Callable[[str, Item], tuple[str, str]] = extract


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


def read_json(path: str):
    """A .json or .jsonl file, plain or .gz; of jsonl the list of its rows."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            if path.removesuffix(".gz").endswith(".jsonl"):
                return [json.loads(line) for line in file if line.strip()]
            return json.load(file)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path and that it is whole") from error


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
