"""HallusionBench: 951 yes-or-no questions about pictures and their altered copies, hub lmms-lab/HallusionBench.

A figure is asked several questions, and a question is put to several figures. Whoever guesses is right now and then,
but seldom on all of a figure or of a question: these shares are published as fAcc and qAcc beside the plain aAcc.
"""
import re

from benchmarks.common import Benchmark, Item, Verdict, grouped, labels_of, percent, text_of
from data import parse


NAMES = ("category", "subcategory", "set_id", "figure_id", "question_id")


def item_from_row(row: dict, number: int) -> Item:
    """A figure, and a question, is named by its id within category, subcategory and set: 346 and 455 of them."""
    question, *place = (text_of(row, name) for name in ("question", *NAMES[:3]))
    groups = {name: (" ".join([*place, text_of(row, f"{name}_id")]),) for name in ("figure", "question")}
    answer = "Yes" if text_of(row, "gt_answer").lower() in ("1", "1.0", "yes") else "No"
    return Item(pid=str(number), question=question, kind="yesno", answer=answer,
                query=f"{question} Please answer yes or no.", labels=labels_of(row, "category", "subcategory") | groups)


def judge(response: str, extraction: str, item: Item) -> Verdict:
    """Officially right when just the right one of the words yes and no occurs. Nearly every reasoning holds the word
    "no", so only the final section is searched, where there is one."""
    section = parse(response).answer
    words = set(re.findall(r"\w+", (response if section is None else section).lower()))
    return Verdict(extraction, words & {"yes", "no"} == {item.answer.lower()}, extraction == item.answer)


def means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    """aAcc over questions; fAcc and qAcc: the share of figures, and of questions, with all answers right."""
    figures, questions = grouped(right, items, "figure").values(), grouped(right, items, "question").values()
    accuracies = {"aAcc": percent(right.values()), "fAcc": percent([all(figure) for figure in figures]),
                  "qAcc": percent([all(question) for question in questions])}
    return accuracies | {"mean of the three": sum(accuracies.values()) / 3}


BENCHMARK = Benchmark(
    hub="lmms-lab/HallusionBench", split="image", groups=("category", "subcategory"),
    columns={"question": "string", "gt_answer": "1 or 0 or yes or no"} | dict.fromkeys(NAMES, "string or number"),
    item=item_from_row, judge=judge, means=means,
    official="of the words yes and no just the right one, in the final section (in a response without one, in all)",
    strict="yes or no as extracted")
