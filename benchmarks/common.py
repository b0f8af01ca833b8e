"""What the files of the benchmarks share: what a benchmark is, and helpers to read rows and to average verdicts.

A benchmark is one file, NAME.py in this folder, that ends with its own BENCHMARK = Benchmark(..). registry.py finds the
file, eval.py asks its questions and report.py tells its figures: nothing else is to be edited.
"""
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.extraction import LETTERS, NO_ANSWER, Item, extract


class Verdict(NamedTuple):
    prediction: str | None                         # what was compared with the gold answer
    official: bool                                 # right by the published rule, as far as it needs no judge model
    strict: bool                                   # right by ours


@dataclass(frozen=True)
class Benchmark:
    hub: str                                       # the data set's name there
    split: str
    columns: dict[str, str]                        # what every row has, see `misfit`; nothing else is to be checked
    groups: tuple[str, ...]                        # labels that the score is broken down by
    item: Callable[[dict, int], Item]              # (row, its number from 1) -> the question
    judge: Callable[[str, str, Item], Verdict]     # (response, what `extract` read out of it, question)
    official: str                                  # what each figure counts as right, for the report
    strict: str
    config: str | None = None                      # of the hub's data set
    means: Callable[[dict, dict], dict] | None = None                # (pid -> right, items) -> the published averages
    extract: Callable[[str, Item], tuple[str, str]] = extract

    def verdict(self, response: str, extraction: str, rule: str, item: Item) -> Verdict:
        """What `judge` says; but nothing is right where gold is withheld, nor strictly without an answer."""
        prediction, official, strict = self.judge(response, extraction, item)
        has_gold = item.answer != ""
        return Verdict(prediction, official and has_gold, strict and has_gold and rule not in NO_ANSWER)


# ---------------------------------------------------------------- the door: is this such a row?

KINDS = {type(None): "null", str: "string", int: "number", float: "number", dict: "object"}


def plain(row):
    """The row as json holds it: arrays are lists, and NaN, which pandas writes for null, is null. Half a surrogate
    pair, which can be neither printed nor written, is a question mark, and a picture is an empty object."""
    text = json.dumps(row, ensure_ascii=False, default=lambda value: getattr(value, "tolist", dict)())
    return json.loads(text.encode("utf-8", "replace"),
                      parse_constant=lambda name: None if name == "NaN" else float(name))


def misfit(row, columns: dict[str, str]) -> str:
    """What is wrong with the first column of a plain row that is not as the table says; "" where all are.

    columns: name -> kinds or values with "or" between them, "string or null", "yes or no"; a list of texts is strings.
    "metadata.skills" is inside the object metadata. A null column may be missing.
    """
    if not isinstance(row, dict):
        return "it is no object with columns"
    row = row | {f"{name}.{key}": part for name, value in row.items() if isinstance(value, dict)
                 for key, part in value.items()}
    for name, expected in columns.items():
        value, words = row.get(name), expected.split(" or ")
        texts = isinstance(value, list) and all(isinstance(part, str) for part in value)
        kind = "strings" if texts else KINDS.get(type(value), type(value).__name__)
        said = f"{value:g}" if kind == "number" else str(value).lower()
        if kind not in words and said not in words:
            found = repr(value)[:40] if kind in ("string", "number") else kind
            return f"{name} is {found}; expected {expected}" if name in row else f"no column {name}"
    return ""


# ---------------------------------------------------------------- reading rows


def text_of(row: dict, *names: str) -> str:
    """The first of these columns that the row has and that is not empty, stripped; else ""."""
    texts = (str(row[name]).strip() for name in names if row.get(name) is not None)
    return next(filter(None, texts), "")


def labels_of(row: dict, *names: str) -> dict[str, tuple[str, ...]]:
    """The values to break a score down by, as texts."""
    return {name: (str(row[name]),) for name in names}


def listed_options(question: str) -> tuple[str, ...]:
    """The texts of "Choices: A: 1 B: 2", "Option: (A) 1 (B) 2" or, with no heading, "(A) 1 (B) 2": the spelling of A
    is that of all. The letters A to D where they cannot be told apart."""
    *heading, listed = re.split(r"\b(?:choice|option)s? ?[:：]", question, flags=re.IGNORECASE)
    for mark in ("({})", "{}:", "{}.", "{})") if heading else ("({})",):
        texts = [listed]
        for i in range(8):
            texts[-1:] = re.split(r"(?<!\w)" + re.escape(mark.format(LETTERS[i])), texts[-1], maxsplit=1)
            if len(texts) < i + 2:
                break
        if len(texts) > 2:
            return tuple(text.strip().rstrip(",;") for text in texts[1:])
    return tuple("ABCD")


def gold_letters(answer: str, choices: tuple[str, ...]) -> str:
    """The letter of a gold answer: C of (C), or of the text of the third option; CD of C and D on two lines. What is
    neither stays as it is."""
    letters = re.findall("[A-Z]", answer) if re.fullmatch(r"\W*(?:[A-Z]\W*)+", answer) else []
    if len(letters) != 1 and answer in choices:
        return LETTERS[choices.index(answer)]
    return "".join(letters) or answer


def lettered(choices: tuple[str, ...]) -> list[str]:
    return [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices)]


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
