"""What the files of the benchmarks share: what a benchmark is, and helpers to read rows and to average verdicts.

A benchmark is one file, NAME.py in this folder, that ends with its own

    BENCHMARK = Benchmark(hub="owner/name", split="test", groups=("subject",), item=item_from_row, judge=judge,
                          official="what the published figure counts as right", strict="what ours counts as right")

    item_from_row(row, number) -> Item              a row of the data set, and its number from 1, as a question
    judge(response, extraction, item) -> Verdict    extraction is what extraction.py read out of the response
    means(right, items) -> {name: figure}           optional: the averages that its authors publish; right: pid -> bool

registry.py finds the file, eval.py asks its questions and report.py tells its figures: nothing else is to be edited.
"""
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.extraction import LETTERS, NO_ANSWER, extract
from benchmarks.reading import Item, letter_of


class Verdict(NamedTuple):
    prediction: str | None                         # what was compared with the gold answer
    official: bool                                 # right by the published rule, as far as it needs no judge model
    strict: bool                                   # right by ours


@dataclass(frozen=True)
class Benchmark:
    hub: str                                       # the data set's name there
    split: str
    groups: tuple[str, ...]                        # labels that the score is broken down by
    item: Callable[[dict, int], Item]
    judge: Callable[[str, str, Item], Verdict]
    official: str                                  # what each figure counts as right, for the report
    strict: str
    config: str | None = None                      # of the hub's data set
    means: Callable[[dict, dict], dict] | None = None
    extract: Callable[[str, Item], tuple[str, str]] = extract
    short: dict = field(default_factory=dict)      # the authors' abbreviations of label values

    def verdict(self, response: str, extraction: str, rule: str, item: Item) -> Verdict:
        """What `judge` says; but nothing is right where gold is withheld, nor strictly without an answer."""
        prediction, official, strict = self.judge(response, extraction, item)
        has_gold = item.answer != ""
        return Verdict(prediction, official and has_gold, strict and has_gold and rule not in NO_ANSWER)


# ---------------------------------------------------------------- reading rows


def present(row: dict, name: str):
    """The value, or None when it is missing, null, or the NaN that pandas writes for null."""
    value = row.get(name)
    return None if isinstance(value, float) and math.isnan(value) else value


def text_of(row: dict, *names: str) -> str:
    """The first of these columns that the row has and that is not empty, stripped; else ""."""
    texts = (str(row[name]).strip() for name in names if present(row, name) is not None)
    return next(filter(None, texts), "")


def texts_of(row: dict, name: str) -> tuple[str, ...]:
    """A column of several texts; () for null. An array of pandas cannot be asked whether it is empty."""
    values = present(row, name)
    return () if values is None else tuple(map(str, values))


def labels_of(row: dict, *names: str) -> dict[str, tuple[str, ...]]:
    """The values to break a score down by, as texts; none where the row has null."""
    return {name: () if present(row, name) is None else (str(row[name]),) for name in names}


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


def lettered(choices: tuple[str, ...]) -> list[str]:
    return [f"({letter_of(i)}) {choice}" for i, choice in enumerate(choices)]


# ---------------------------------------------------------------- averaging verdicts


def grouped(right: dict[str, bool], items: dict[str, Item], label: str) -> dict[str, list[bool]]:
    """Each value of this label -> the verdicts on the items that have it; an item may have several."""
    groups = defaultdict(list)
    for pid, item in items.items():
        for value in item.labels.get(label, ()):
            groups[value].append(right[pid])
    return groups


def percent(values) -> float:
    return 100 * sum(values) / max(len(values), 1)


def mean_of_groups(right: dict[str, bool], items: dict[str, Item], label: str) -> float:
    groups = grouped(right, items, label).values()
    return sum(map(percent, groups)) / max(len(groups), 1)
