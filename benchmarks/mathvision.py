import re
from fractions import Fraction

from benchmarks.common import Item, Verdict, labels_of, present, same_value, text_of
from benchmarks.extraction import LETTERS, NO_ANSWER
from grading.equal import clean, quantity


def mathvision_item(row: dict, number: int) -> Item:
    """Options that are just letters stand in the picture. <image1> marks where the one picture was: it goes first."""
    options = present(row, "options")
    options = () if options is None else tuple(map(str, options))        # an array cannot be asked whether it is empty
    question = re.sub(r" ?<image\d+>", "", text_of(row, "question")).strip()
    lettered = "".join(options) == LETTERS[: len(options)]
    listed = [] if lettered else [f"({LETTERS[i]}) {option}" for i, option in enumerate(options)]
    answer = text_of(row, "answer")
    if options and answer not in LETTERS[: len(options)] and answer in options:
        answer = LETTERS[options.index(answer)]
    return Item(pid=text_of(row, "id") or str(number), question=question, kind="choice" if options else "text",
                choices=options, answer=answer, query="\n".join([question, *listed]),
                labels=labels_of(row, "subject", "level"))


def judge_mathvision(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    """VLMEvalKit's is_equal runs both texts as code to get numbers; here they are read as numbers."""
    if item.kind == "choice":
        same = extraction == item.answer
        return extraction, same, same and rule not in NO_ANSWER
    given, wanted = quantity(clean(extraction)), quantity(clean(item.answer))
    equal = given is not None and wanted is not None and abs(given[0] - wanted[0]) < Fraction(1, 10**6)
    same = clean(extraction).lower() == clean(item.answer).lower()
    return extraction, same or equal, rule not in NO_ANSWER and same_value(extraction, item)
