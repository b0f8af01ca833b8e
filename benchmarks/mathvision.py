"""MATH-Vision: problems of mathematics competitions with a picture, hub MathLLMs/MathVision, test 3040, testmini 304.

Answers are a letter, a number or an expression. VLMEvalKit's is_equal runs both texts as code to get their numbers;
here they are read as numbers.
"""
import re
from fractions import Fraction

from benchmarks.common import Benchmark, Item, Verdict, gold_letters, labels_of, lettered, text_of
from benchmarks.extraction import LETTERS
from grading.equal import clean, quantity, same_answer


def item_from_row(row: dict, number: int) -> Item:
    """Options that are just letters stand in the picture. <image1> marks where the one picture was: it goes first. One
    question of the test split is nothing but its picture."""
    asked, options = text_of(row, "question"), tuple(row["options"])
    question = re.sub(r" ?<image\d+>", "", asked).strip()
    listed = [] if "".join(options) == LETTERS[: len(options)] else lettered(options)
    return Item(pid=str(row["id"]), question=question or asked, kind="choice" if options else "text", choices=options,
                answer=gold_letters(text_of(row, "answer"), options) if options else text_of(row, "answer"),
                query="\n".join(filter(None, [question, *listed])), labels=labels_of(row, "subject", "level"))


def judge(response: str, extraction: str, item: Item) -> Verdict:
    if item.kind == "choice":
        return Verdict(extraction, extraction == item.answer, extraction == item.answer)
    given, wanted = clean(extraction), clean(item.answer)
    numbers = quantity(given), quantity(wanted)
    close = None not in numbers and abs(numbers[0][0] - numbers[1][0]) < Fraction(1, 10**6)
    return Verdict(extraction, close or given.lower() == wanted.lower(), same_answer(extraction, item.answer))


BENCHMARK = Benchmark(
    hub="MathLLMs/MathVision", split="test", groups=("subject", "level"), item=item_from_row, judge=judge,
    columns={"id": "string or number", "question": "string", "options": "strings", "answer": "string or number",
             "subject": "string", "level": "string or number"},
    official="the same letter, the same text, or numbers within 1e-6",
    strict="the same letter, or an equal value")
