"""MathVerse: 788 geometry and function problems, each in 5 versions, hub AI4Math/MathVerse, testmini 3940.

The versions move what the text says into the picture, step by step: from Text Dominant to Vision Only, where the
question itself stands in the picture. So how far a model's score falls from version to version tells what it does not
see. Officially a judge model compares the answers; without one only equal texts count.
"""
from benchmarks.common import Benchmark, Item, Verdict, labels_of, listed_options, mean_of_groups, percent
from benchmarks.common import present, text_of
from data import InputError
from grading.equal import clean, quantity, same_answer


def item_from_row(row: dict, number: int) -> Item:
    """In the version Vision Only the column question is empty; what is asked then is query_wo (not verified)."""
    metadata = present(row, "metadata") or {}
    if not isinstance(metadata, dict):
        raise InputError(f"row {number}: metadata is {metadata!r}; expected an object")
    is_choice = row["question_type"] == "multi-choice"
    question, answer = text_of(row, "question_for_eval", "question", "query_wo"), text_of(row, "answer")
    gold = "letter" if is_choice else "number" if quantity(clean(answer)) else "other"
    return Item(pid=text_of(row, "sample_index") or str(number), question=question,
                kind="choice" if is_choice else "text", answer=answer,
                choices=listed_options(question) if is_choice else (),
                query=text_of(row, "question", "query_wo"),
                labels=labels_of(row, "problem_version", "question_type")
                | labels_of(metadata, "subject", "subfield") | {"gold": (gold,)})


def judge(response: str, extraction: str, item: Item) -> Verdict:
    same = clean(extraction) == clean(item.answer)  # our extraction of a text is in clean's spelling
    return Verdict(extraction, same, same if item.kind == "choice" else same_answer(extraction, item.answer))


def means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    only = [pid for pid, item in items.items() if item.labels["problem_version"] == ("Vision Only",)]
    return {"mean of the versions": mean_of_groups(right, items, "problem_version"),
            "Vision Only": percent([right[pid] for pid in only])}


BENCHMARK = Benchmark(
    hub="AI4Math/MathVerse", config="testmini", split="testmini",
    groups=("problem_version", "question_type", "gold", "subject", "subfield"),
    item=item_from_row, judge=judge, means=means,
    official="extraction and gold answer are the same text: the published rule where it asks no judge",
    strict="the same letter, or an equal value")
