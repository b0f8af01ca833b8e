"""MathVerse: 788 geometry and function problems, each in 5 versions, hub AI4Math/MathVerse, testmini 3940.

The versions move what the text says into the picture, step by step: from Text Dominant to Vision Only, where the
question itself stands in the picture. So how far a model's score falls from version to version tells what it does not
see. Officially a judge model compares the answers; without one only equal texts count.
"""
from benchmarks.common import (Benchmark, Item, Verdict, gold_letters, labels_of, listed_options, mean_of_groups,
                               text_of)
from grading.equal import clean, quantity, same_answer


def item_from_row(row: dict, number: int) -> Item:
    """In the version Vision Only the column question is empty; what is asked then is query_wo. A gold answer of two
    letters wants both options."""
    question, answer = text_of(row, "question_for_eval", "question", "query_wo"), text_of(row, "answer")
    choices = listed_options(question) if row["question_type"] == "multi-choice" else ()
    answer = gold_letters(answer, choices) if choices else answer
    one = choices and len(answer) == 1
    gold = "letter" if one else "letters" if choices else "number" if quantity(clean(answer)) else "other"
    return Item(pid=str(row["sample_index"]), question=question, kind="choice" if one else "text", answer=answer,
                choices=choices if one else (), query=text_of(row, "question", "query_wo"),
                labels=labels_of(row, "problem_version", "question_type")
                | labels_of(row["metadata"], "subject", "subfield") | {"gold": (gold,)})


def judge(response: str, extraction: str, item: Item) -> Verdict:
    if item.labels["gold"] == ("letters",):
        extraction = gold_letters(extraction.replace("and", ","), ())
    same = clean(extraction) == clean(item.answer)  # our extraction of a text is in clean's spelling
    return Verdict(extraction, same, same if item.kind == "choice" else same_answer(extraction, item.answer))


def means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    return {"mean of the versions": mean_of_groups(right, items, "problem_version")}


BENCHMARK = Benchmark(
    hub="AI4Math/MathVerse", config="testmini", split="testmini",
    columns={"sample_index": "string or number", "problem_version": "string", "question": "string or null",
             "query_wo": "string or null", "question_for_eval": "string or null", "answer": "string or number",
             "question_type": "multi-choice or free-form", "metadata.subject": "string", "metadata.subfield": "string"},
    groups=("problem_version", "question_type", "gold", "subject", "subfield"),
    item=item_from_row, judge=judge, means=means,
    official="extraction and gold answer are the same text: the published rule where it asks no judge",
    strict="the same letter, or an equal value")
