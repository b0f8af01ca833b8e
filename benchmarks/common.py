import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.reading import Problem

from benchmarks.extraction import LETTERS, extract
from data import InputError
from grading.algebra import process_grader


@dataclass(frozen=True)
class Item(Problem):
    """A Problem as the data set has it: answer is the text of the right option, not its letter."""
    query: str = ""                                # the hub's prompt text; "" in files without that column
    labels: dict = field(default_factory=dict)     # group -> tuple of its values: one, but several skills


def present(row: dict, name: str):
    """The value, or None when it is missing, null, or the NaN that pandas writes for null."""
    value = row.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


Verdict = tuple[str | None, bool, bool]            # prediction, official, strict


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


def same_value(extraction: str, item: Item) -> bool:
    r"""Equal numbers, texts, lists, and algebra: \sqrt{8} is 2\sqrt{2}."""
    return process_grader("own").correct(extraction, item.answer)


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
