"""OCRBench: 1000 questions about text in pictures, hub echo840/OCRBench.

The published score counts points, one a question: an answer is right when the response contains it. So reasoning that
quotes half of the picture earns points; strictly, the answer has to stand in the final section.
"""
import re

from benchmarks.common import Benchmark, Item, Verdict, labels_of, text_of
from data import parse
from grading.equal import MAX_CHARACTERS


FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}  # of ASCII, as Chinese has it


def item_from_row(row: dict, number: int) -> Item:
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    golds = tuple(answer for answer in answers if answer.strip())  # an empty one would be part of any text
    question = text_of(row, "question")
    return Item(pid=str(number), question=question, kind="text", answer=" or ".join(golds), query=question,
                labels={"golds": golds} | labels_of(row, "question_type", "dataset"))


def final_text(response: str, item: Item) -> tuple[str, str]:
    """(extraction, rule): the final section as it stands, for the text to read may be anything; in a response without
    one the whole, if it is short enough to be nothing but an answer."""
    answer = parse(response).answer
    if answer is not None:
        return answer, "section" if answer else "nothing"
    return (response.strip(), "whole") if 0 < len(response.strip()) <= MAX_CHARACTERS else ("", "nothing")


def contains(text: str, item: Item) -> bool:
    """Is any gold answer part of the text? Case counts in the handwritten formulas of HME100k only, and spaces do not.
    Elsewhere full-width ASCII is ASCII, as in lmms-eval since July 2026; the authors' own script tells them apart."""
    if item.labels["dataset"] == ("HME100k",):
        return any(re.sub(r"\s", "", gold) in re.sub(r"\s", "", text) for gold in item.labels["golds"])
    text, *golds = (part.translate(FULL_WIDTH).lower().strip().replace("\n", " ")
                    for part in (text, *item.labels["golds"]))
    return any(gold in text for gold in golds)


def judge(response: str, extraction: str, item: Item) -> Verdict:
    return Verdict(extraction, contains(response, item), contains(extraction, item))


def means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    return {"score": float(sum(right.values()))}


BENCHMARK = Benchmark(
    hub="echo840/OCRBench", split="test", groups=("question_type", "dataset"),
    columns={"dataset": "string", "question": "string", "question_type": "string", "answer": "string or strings"},
    item=item_from_row, judge=judge, means=means, extract=final_text,
    official="a gold answer is part of the whole response, reasoning included",
    strict="a gold answer is part of the final section")
