import re

from benchmarks.common import Item, Verdict, grouped, labels_of, percent, text_of
from benchmarks.extraction import NO_ANSWER
from data import InputError, parse


YES_NO = {"1": "Yes", "0": "No", "yes": "Yes", "no": "No"}  # that '1' is yes in HallusionBench is not verified


def hallusionbench_item(row: dict, number: int) -> Item:
    answer, question = text_of(row, "gt_answer"), text_of(row, "question")
    if answer.lower() not in YES_NO:
        raise InputError(f"row {number}: gt_answer is {answer!r}; expected 1, 0, yes or no")
    place = [text_of(row, name) for name in ("subcategory", "set_id")]
    groups = {name: (" ".join([*place, text_of(row, f"{name}_id")]),) for name in ("figure", "question")}
    return Item(pid=str(number), question=question, kind="yesno", answer=YES_NO[answer.lower()],
                query=f"{question} Please answer yes or no.", labels=labels_of(row, "category", "subcategory") | groups)


def judge_hallusionbench(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    """Nearly every reasoning holds the word "no": the published rule is put to the final section where there is one."""
    section = parse(response).answer
    words = set(re.findall(r"\w+", (response if section is None else section).lower()))
    official = words & {"yes", "no"} == {item.answer.lower()}
    return extraction, official, extraction == item.answer and rule not in NO_ANSWER


def hallusionbench_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    """aAcc over questions; fAcc and qAcc: share of figures, and of questions, with all answers right."""
    accuracies = {"aAcc": percent(list(right.values())),
                  "fAcc": percent([all(group) for group in grouped(right, items, "figure")]),
                  "qAcc": percent([all(group) for group in grouped(right, items, "question")])}
    return accuracies | {"mean of the three": sum(accuracies.values()) / 3}
