"""MathVista as its authors score it: problems, prompt text, the official normaliser, and the official table of scores.

    problems[pid] = item_from_row(row, where)              Item; benchmarks.py reads the rows
    extraction, rule = extract(response, problems[pid])    extraction.py: our rules where the authors ask GPT
    prediction, official, strict = judge(extraction, rule, problems[pid])
    breakdown({pid: official, ...}, problems)              {"average": {"accuracy", "correct", "total"}, "task": ...}

official is the published rule (lupantech/MathVista, evaluation/calculate_score.py), quirk included: whatever text
stands in for an answer becomes the nearest option, so an empty response is right on 168 of the 540 multiple-choice
questions of testmini, 16.8 points for saying nothing. strict counts a response that holds no answer as wrong.
Deviations from the authors' scripts:
1. A missing response is wrong, instead of dropping out of the denominator.
2. Groups come from the data set, instead of the copy of its metadata in the file of responses.
3. Options are compared by their text, so of two equal options both are right (as the authors do; letters would not).
"""
import re

from benchmarks.reading import Problem

from benchmarks.common import Item, Verdict, present
from benchmarks.extraction import LETTERS, NO_ANSWER
from data import InputError


# ---------------------------------------------------------------- problems

GROUPS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
DECIMALS = {1: ("one decimal place", "1.2, 1.3, 1.4"), 2: ("two decimal places", "1.23, 1.34, 1.45")}  # by precision
KINDS = ("integer", "float", "list", "text")       # answer_type of the questions without options


def item_from_row(row: dict, where: str) -> Item:
    """Row of the hub or of testmini.json, read with json, datasets or pandas. InputError names what it lacks."""
    needed = ("pid", "question", "question_type", "answer_type", "metadata")
    missing = [name for name in needed if not present(row, name)]
    if missing or not isinstance(row["metadata"], dict):
        raise InputError(f"{where}: no {', '.join(missing) or 'object in metadata'}; expected a row of MathVista")
    choices = present(row, "choices")
    choices = () if choices is None else tuple(map(str, choices))        # an array cannot be asked whether it is empty
    is_choice = row["question_type"] == "multi_choice"
    if is_choice and not choices or not is_choice and row["answer_type"] not in KINDS:
        raise InputError(f"{where}: a {row['question_type']} question of type {row['answer_type']} with "
                         f"{len(choices)} choices; expected choices, or a type in {', '.join(KINDS)}")
    precision, answer = present(row, "precision"), present(row, "answer")
    if row["answer_type"] == "float" and precision not in DECIMALS:
        raise InputError(f"{where}: a float question without precision; expected 1 or 2")
    labels = {"question_type": row["question_type"], "answer_type": row["answer_type"]} | row["metadata"]
    groups = {name: present(labels, name) for name in GROUPS}
    return Item(
        pid=str(row["pid"]),
        question=row["question"],
        kind="choice" if is_choice else row["answer_type"],
        choices=choices if is_choice else (),
        answer="" if answer is None else str(answer),
        precision=None if precision is None else int(float(precision)),
        unit=present(row, "unit") or "",
        query=present(row, "query") or "",
        labels={name: tuple(map(str, [value] if isinstance(value, (str, int, float)) else value))
                for name, value in groups.items() if value is not None},
    )


# ---------------------------------------------------------------- the prompt text

HINT = "Hint: Please answer the question {kind} and provide the {what}, e.g., {examples}, at the end."


def hint(problem: Problem) -> str:
    if problem.kind == "choice":                                         # the one without a kind of answer
        return HINT.replace(" {kind}", "").format(what="correct option letter", examples="A, B, C, D")
    if problem.kind == "integer":
        return HINT.format(kind="requiring an integer answer", what="final value", examples="1, 2, 3")
    if problem.kind == "list":
        return HINT.format(kind="requiring a Python list as an answer", what="final list",
                           examples="[1, 2, 3], [1.2, 1.3, 1.4]")
    places, examples = DECIMALS[problem.precision]
    return HINT.format(kind=f"requiring a floating-point number with {places}", what="final value", examples=examples)


def query(problem: Item) -> str:
    """The prompt text: the hub's column where there is one, else built in its order, the hint first."""
    if problem.query:
        return problem.query
    unit = f" (Unit: {problem.unit})" if problem.unit else ""
    hints = [] if problem.kind == "text" else [hint(problem)]           # the authors have none for it
    lines = [*hints, f"Question: {problem.question}{unit}"]
    if problem.choices:
        lines += ["Choices:", *(f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(problem.choices))]
    return "\n".join(lines)


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


def nearest(text: str, choices: tuple[str, ...]) -> str:
    """The option at the least edit distance; the first of several."""
    return min(choices, key=lambda choice: levenshtein(text, choice))


def normalize(extraction, problem: Problem) -> str | None:
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
    if problem.kind == "choice":
        extraction = str(extraction).strip()
        inside = re.search(r"\(([a-zA-Z])\)", extraction)
        letter = inside[1].upper() if inside else extraction
        index = LETTERS.find(letter) if len(letter) == 1 else -1
        return problem.choices[index] if 0 <= index < len(problem.choices) else nearest(letter, problem.choices)
    try:
        if problem.kind == "integer":
            return str(int(float(extraction)))
        if problem.kind == "float":
            return str(round(float(extraction), int(problem.precision)))
    except (TypeError, ValueError, OverflowError):
        return None
    return str(extraction)


# ---------------------------------------------------------------- verdicts and scores


def judge(extraction: str, rule: str, problem: Problem) -> tuple[str | None, bool, bool]:
    """(prediction, official, strict) for what extraction.extract returned. strict is official and an answer found."""
    prediction = normalize(extraction, problem)
    official = prediction == problem.answer
    return prediction, official, official and rule not in NO_ANSWER


def breakdown(verdicts: dict[str, bool], problems: dict[str, Item], groups: tuple[str, ...] = GROUPS) -> dict:
    """The published scores_*.json: average, then per group every value's score, best first.

    A problem without a verdict is wrong. With several skills a problem counts in each of them.
    """
    right = {pid: bool(verdicts.get(pid)) for pid in problems}
    correct = sum(right.values())
    average = str(round(100 * correct / len(problems), 2))
    scores = {"average": {"accuracy": average, "correct": correct, "total": len(problems)}}
    for name in groups:
        values = sorted({value for item in problems.values() for value in item.labels.get(name, ())})
        counts = {}
        for value in values:
            members = [right[pid] for pid, item in problems.items() if value in item.labels.get(name, ())]
            counts[value] = {"accuracy": f"{100 * sum(members) / len(members):.2f}", "correct": sum(members),
                             "total": len(members)}
        scores[name] = dict(sorted(counts.items(), key=lambda pair: -float(pair[1]["accuracy"])))
    return scores


def mathvista_item(row: dict, number: int) -> Item:
    return item_from_row(row, f"row {number}")


def judge_mathvista(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    return judge(extraction, rule, item)
