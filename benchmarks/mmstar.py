"""MMStar: 1500 multiple-choice questions that cannot be answered without their picture, hub Lin-Chen/MMStar.

They are picked from other benchmarks in six categories of 250; the published figure is the mean over these.
"""
from benchmarks.common import (Benchmark, Item, Verdict, gold_letters, labels_of, listed_options, mean_of_groups,
                               text_of)


def item_from_row(row: dict, number: int) -> Item:
    question = text_of(row, "question")
    choices = listed_options(question)
    return Item(pid=str(row["index"]), question=question, kind="choice", choices=choices,
                answer=gold_letters(text_of(row, "answer"), choices),
                query=f"{question}\nPlease select the correct answer from the options above.",
                labels=labels_of(row, "category", "l2_category"))


def judge(response: str, extraction: str, item: Item) -> Verdict:
    return Verdict(extraction, extraction == item.answer, extraction == item.answer)


def means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    return {"mean of the categories": mean_of_groups(right, items, "category")}


BENCHMARK = Benchmark(
    hub="Lin-Chen/MMStar", config="val", split="val", groups=("category", "l2_category"),
    columns={"index": "string or number", "question": "string", "answer": "string", "category": "string",
             "l2_category": "string"},
    item=item_from_row, judge=judge, means=means,
    official="the letter as extracted, by rules in the place of the published judge",
    strict="the same, and a response without an answer is wrong")
