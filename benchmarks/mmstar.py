"""MMStar: 1500 multiple-choice questions that cannot be answered without their picture, hub Lin-Chen/MMStar.

They are picked from other benchmarks in six categories of 250; the published figure is the mean over these.
"""
import re

from benchmarks.common import (Benchmark, Item, Verdict, gold_letters, labels_of, listed_options, mean_of_groups,
                               text_of)
from benchmarks.extraction import LETTERS


def item_from_row(row: dict, number: int) -> Item:
    question = text_of(row, "question")
    choices = listed_options(question)
    return Item(pid=str(row["index"]), question=question, kind="choice", choices=choices,
                answer=gold_letters(text_of(row, "answer"), choices),
                query=f"{question}\nPlease select the correct answer from the options above.",
                labels=labels_of(row, "category", "l2_category"))


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


def judge(response: str, extraction: str, item: Item) -> Verdict:
    return Verdict(extraction, can_infer(response, item.choices) == item.answer, extraction == item.answer)


def means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    return {"mean of the categories": mean_of_groups(right, items, "category")}


BENCHMARK = Benchmark(
    hub="Lin-Chen/MMStar", config="val", split="val", groups=("category", "l2_category"),
    columns={"index": "string or number", "question": "string", "answer": "string", "category": "string",
             "l2_category": "string"},
    item=item_from_row, judge=judge, means=means,
    official="VLMEvalKit's letter from the whole response, without its judge",
    strict="the letter as extracted")
