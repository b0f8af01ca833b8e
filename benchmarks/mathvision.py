"""MATH-Vision: problems of mathematics competitions with a picture, hub MathLLMs/MathVision, test 3040, testmini 304.

Answers are a letter, a number or an expression. VLMEvalKit's is_equal runs both texts as code to get their numbers;
here they are read as numbers.
"""
import re
from fractions import Fraction

from benchmarks.common import Benchmark, Item, Verdict, labels_of, lettered, text_of, texts_of
from benchmarks.extraction import LETTERS
from grading.equal import clean, quantity, same_answer


def item_from_row(row: dict, number: int) -> Item:
    """Options that are just letters stand in the picture. <image1> marks where the one picture was: it goes first."""
    options, answer = texts_of(row, "options"), text_of(row, "answer")
    question = re.sub(r" ?<image\d+>", "", text_of(row, "question")).strip()
    letters = LETTERS[: len(options)]
    listed = [] if "".join(options) == letters else lettered(options)
    if answer not in letters and answer in options:
        answer = LETTERS[options.index(answer)]
    return Item(pid=text_of(row, "id") or str(number), question=question, kind="choice" if options else "text",
                choices=options, answer=answer, query="\n".join([question, *listed]),
                labels=labels_of(row, "subject", "level"))


def judge(response: str, extraction: str, item: Item) -> Verdict:
    if item.kind == "choice":
        return Verdict(extraction, extraction == item.answer, extraction == item.answer)
    given, wanted = clean(extraction), clean(item.answer)
    numbers = quantity(given), quantity(wanted)
    close = None not in numbers and abs(numbers[0][0] - numbers[1][0]) < Fraction(1, 10**6)
    return Verdict(extraction, close or given.lower() == wanted.lower(), same_answer(extraction, item.answer))


BENCHMARK = Benchmark(
    hub="MathLLMs/MathVision", split="test", groups=("subject", "level"), item=item_from_row, judge=judge,
    official="the same letter, the same text, or numbers within 1e-6",
    strict="the same letter, or an equal value")
