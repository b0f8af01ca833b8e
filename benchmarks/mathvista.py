"""MathVista as its authors score it: questions on pictures, hub AI4Math/MathVista, testmini 1000, test 5141.

official is the published rule (lupantech/MathVista, evaluation/calculate_score.py), quirk included: whatever text
stands in for an answer becomes the nearest option, so an empty response is right on 168 of testmini's 1000 questions.
strict counts a response that holds no answer as wrong. Deviations from the authors' scripts: a missing response is
wrong, instead of dropping out; groups come from the data set, not from its copy in the file of responses.
"""
import re

from benchmarks.common import Benchmark, Item, Verdict, labels_of, lettered
from benchmarks.extraction import LETTERS


GROUPS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
COLUMNS = {
    "pid": "string or number", "question": "string", "answer": "string or number",
    "question_type": "multi_choice or free_form", "answer_type": "text or integer or float or list",
    "choices": "strings or null", "precision": "1 or 2 or null", "query": "string or null",
    **dict.fromkeys((f"metadata.{name}" for name in GROUPS[2:-1]), "string"), "metadata.skills": "strings"}


def item_from_row(row: dict, number: int) -> Item:
    """Row of the hub, or of the authors' testmini.json. That has no prompt text, so question and options are asked,
    without the hint at the kind of answer."""
    kind = "choice" if row["question_type"] == "multi_choice" else row["answer_type"]
    choices = tuple(row.get("choices") or ()) if kind == "choice" else ()
    return Item(
        pid=str(row["pid"]), question=row["question"], kind=kind, choices=choices, answer=str(row["answer"]),
        precision=None if row.get("precision") is None else int(float(row["precision"])),
        query=row.get("query") or "\n".join([row["question"], *lettered(choices)]),
        labels=labels_of(row, *GROUPS[:2]) | labels_of(row["metadata"], *GROUPS[2:-1])
        | {"skills": tuple(row["metadata"]["skills"])})


# ---------------------------------------------------------------- the authors' normaliser, quirks included


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions, 1 each."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


def normalize(extraction, item: Item) -> str | None:
    """The prediction the authors compare with the gold answer (calculate_score.py:normalize_extracted_answer).

        choice, ("20", "30")    "B" -> "30"; "the (b) one" -> "30", by the first letter in parentheses
        choice, ("yes", "no")   "B." -> "no", the nearest option; "" -> "no", the shortest one
        integer                 "3.9" -> "3"; "25 cm" -> None
        float, precision 1      "0.25" -> "0.2"
        list                    as it stands: it compares characters
    """
    if item.kind == "choice":
        extraction = str(extraction).strip()
        inside = re.search(r"\(([a-zA-Z])\)", extraction)
        letter = inside[1].upper() if inside else extraction
        index = LETTERS.find(letter) if len(letter) == 1 else -1
        if 0 <= index < len(item.choices):
            return item.choices[index]
        return min(item.choices, key=lambda choice: levenshtein(letter, choice))  # the first of several
    try:
        if item.kind == "integer":
            return str(int(float(extraction)))
        if item.kind == "float":
            return str(round(float(extraction), item.precision))
    except (TypeError, ValueError, OverflowError):
        return None
    return str(extraction)


def judge(response: str, extraction: str, item: Item) -> Verdict:
    prediction = normalize(extraction, item)
    return Verdict(prediction, prediction == item.answer, prediction == item.answer)


BENCHMARK = Benchmark(
    hub="AI4Math/MathVista", split="testmini", columns=COLUMNS, groups=GROUPS, item=item_from_row, judge=judge,
    official="the authors' normaliser on our extraction: the nearest option stands in for a missing answer",
    strict="the same, and a response without an answer is wrong")
