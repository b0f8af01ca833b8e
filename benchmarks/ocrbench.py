"""OCRBench: 1000 questions about text in pictures, hub echo840/OCRBench.

The published score counts points, one a question: an answer is right when the response contains it. So reasoning that
quotes half of the picture earns points; strictly, the answer has to stand in the final section.
"""
import re

from benchmarks.common import Benchmark, Item, Verdict, labels_of, present, text_of, texts_of
from data import parse
from grading.equal import MAX_CHARACTERS


HANDWRITTEN = "Handwritten Mathematical Expression Recognition"


def item_from_row(row: dict, number: int) -> Item:
    golds = (row["answer"],) if isinstance(present(row, "answer"), str) else texts_of(row, "answer")
    question, kind = text_of(row, "question"), text_of(row, "question_type")
    group = "Text Recognition" if kind.endswith("Recognition") and kind != HANDWRITTEN else kind
    return Item(pid=str(number), question=question, kind="text", answer=" or ".join(golds), query=question,
                labels={"group": (group,), "question_type": (kind,), "golds": golds} | labels_of(row, "dataset"))


def final_text(response: str, item: Item) -> tuple[str, str]:
    """(extraction, rule): the final section as it stands, for the text to read may be anything; in a response without
    one the whole, if it is short enough to be nothing but an answer."""
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


def judge(response: str, extraction: str, item: Item) -> Verdict:
    return Verdict(extraction, contains(response, item), contains(extraction, item))


def means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    return {"score": float(sum(right.values()))}


BENCHMARK = Benchmark(
    hub="echo840/OCRBench", split="test", groups=("group", "question_type", "dataset"),
    item=item_from_row, judge=judge, means=means, extract=final_text,
    official="a gold answer is part of the whole response, reasoning included",
    strict="a gold answer is part of the final section")
