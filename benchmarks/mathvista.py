"""MathVista as its authors score it: questions on pictures, hub AI4Math/MathVista, testmini 1000, test 5141.

    item = item_from_row(row, 1)                          the question and its prompt text
    extraction, rule = extract(response, item)            extraction.py: our rules where the authors ask GPT
    prediction, official, strict = judge(response, extraction, item)

official is the published rule (lupantech/MathVista, evaluation/calculate_score.py), quirk included: whatever text
stands in for an answer becomes the nearest option, so an empty response is right on 168 of the 540 multiple-choice
questions of testmini, 16.8 points for saying nothing. strict counts a response that holds no answer as wrong.
Deviations from the authors' scripts:
1. A missing response is wrong, instead of dropping out of the denominator.
2. Groups come from the data set, instead of the copy of its metadata in the file of responses.
3. Options are compared by their text, so of two equal options both are right (as the authors do; letters would not).
"""
import re

from benchmarks.common import Benchmark, Item, Verdict, lettered, present, texts_of
from benchmarks.extraction import LETTERS
from data import InputError


GROUPS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
SHORT = {                                          # the authors' names for tasks and skills
    "figure question answering": "FQA", "geometry problem solving": "GPS", "math word problem": "MWP",
    "textbook question answering": "TQA", "visual question answering": "VQA", "algebraic reasoning": "ALG",
    "arithmetic reasoning": "ARI", "geometry reasoning": "GEO", "logical reasoning": "LOG",
    "numeric commonsense": "NUM", "scientific reasoning": "SCI", "statistical reasoning": "STA",
}

# ---------------------------------------------------------------- the question and its prompt text

HINT = "Hint: Please answer the question {}, e.g., {}, at the end."
NUMBER = "requiring a floating-point number with {} and provide the final value"
HINTS = {                                          # by kind, of a decimal by its precision; the kind text has none
    "choice": HINT.format("and provide the correct option letter", "A, B, C, D"),
    "integer": HINT.format("requiring an integer answer and provide the final value", "1, 2, 3"),
    "float 1": HINT.format(NUMBER.format("one decimal place"), "1.2, 1.3, 1.4"),
    "float 2": HINT.format(NUMBER.format("two decimal places"), "1.23, 1.34, 1.45"),
    "list": HINT.format("requiring a Python list as an answer and provide the final list",
                        "[1, 2, 3], [1.2, 1.3, 1.4]"),
}


def query(question: str, kind: str, choices: tuple[str, ...], precision: int | None, unit: str) -> str:
    """The prompt text as the hub has it in its column query: the hint first, then question, unit and options."""
    hint = HINTS.get(f"float {precision}" if kind == "float" else kind)
    lines = [hint] if hint else []
    lines.append(f"Question: {question}" + (f" (Unit: {unit})" if unit else ""))
    return "\n".join([*lines, "Choices:", *lettered(choices)] if choices else lines)


def item_from_row(row: dict, number: int) -> Item:
    """Row of the hub or of testmini.json, read with json, datasets or pandas. InputError names what it lacks."""
    needed = ("pid", "question", "question_type", "answer_type", "metadata")
    missing = [name for name in needed if not present(row, name)]
    if missing or not isinstance(row["metadata"], dict):
        raise InputError(f"row {number}: no {', '.join(missing) or 'object in metadata'}; expected a row of MathVista")
    is_choice = row["question_type"] == "multi_choice"
    kind, choices = "choice" if is_choice else row["answer_type"], texts_of(row, "choices")
    if kind not in ("choice", "integer", "float", "list", "text") or is_choice and not choices:
        raise InputError(f"row {number}: a {row['question_type']} question of type {row['answer_type']} with "
                         f"{len(choices)} choices; expected choices, or the type integer, float, list or text")
    precision, answer = present(row, "precision"), present(row, "answer")
    if kind == "float" and precision not in (1, 2):
        raise InputError(f"row {number}: a float question without precision; expected 1 or 2")
    choices, unit = choices if is_choice else (), present(row, "unit") or ""
    precision = None if precision is None else int(float(precision))
    labels = {"question_type": row["question_type"], "answer_type": row["answer_type"]} | row["metadata"]
    groups = {name: present(labels, name) for name in GROUPS}
    return Item(
        pid=str(row["pid"]), question=row["question"], kind=kind, choices=choices,
        answer="" if answer is None else str(answer), precision=precision, unit=unit,
        query=present(row, "query") or query(row["question"], kind, choices, precision, unit),
        labels={name: tuple(map(str, [value] if isinstance(value, (str, int, float)) else value))
                for name, value in groups.items() if value is not None},
    )


# ---------------------------------------------------------------- the official normaliser


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

        kind, options                extraction       -> prediction
        choice, ("20", "30")         "B"              -> "30"
        choice, ("20", "30")         "the (b) one"    -> "30"        the first letter in parentheses
        choice, ("yes", "no")        "B."             -> "no"        no letter: the nearest option
        choice, ("yes", "no")        ""               -> "no"        so is an empty one: the shortest option
        integer                      "3.9"            -> "3"
        integer                      "25 cm"          -> None
        float, precision 1           "0.25"           -> "0.2"
        list                         "[1,2]"          -> "[1,2]"     not "[1, 2]": it compares characters
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
    hub="AI4Math/MathVista", split="testmini", groups=GROUPS, item=item_from_row, judge=judge, short=SHORT,
    official="the authors' normaliser on our extraction: the nearest option stands in for a missing answer",
    strict="the same, and a response without an answer is wrong")
