import re

from benchmarks.common import Item, Verdict, labels_of, present, text_of
from benchmarks.extraction import NO_ANSWER
from data import parse
from grading.equal import MAX_CHARACTERS


HANDWRITTEN = "Handwritten Mathematical Expression Recognition"


def ocrbench_item(row: dict, number: int) -> Item:
    golds = present(row, "answer")
    golds = () if golds is None else (golds,) if isinstance(golds, str) else tuple(map(str, golds))
    question, kind = text_of(row, "question"), text_of(row, "question_type")
    group = "Text Recognition" if kind.endswith("Recognition") and kind != HANDWRITTEN else kind
    return Item(pid=str(number), question=question, kind="text", answer=" or ".join(golds), query=question,
                labels={"group": (group,), "question_type": (kind,), "golds": golds} | labels_of(row, "dataset"))


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


def ocrbench_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    """OCRBench counts points: one a question, 1000 in all."""
    return {"score": float(sum(right.values()))}
