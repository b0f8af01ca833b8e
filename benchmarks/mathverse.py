from benchmarks.common import (
    Item,
    Verdict,
    labels_of,
    listed_options,
    mean_of_groups,
    metadata_of,
    percent,
    same_value,
    text_of,
)
from benchmarks.extraction import NO_ANSWER
from grading.equal import clean, quantity


def mathverse_item(row: dict, number: int) -> Item:
    """In the version Vision Only the question stands in the picture; what is asked then is query_wo (not verified)."""
    is_choice = row["question_type"] == "multi-choice"
    question, answer = text_of(row, "question_for_eval", "question", "query_wo"), text_of(row, "answer")
    gold = "letter" if is_choice else "number" if quantity(clean(answer)) else "other"
    return Item(pid=text_of(row, "sample_index") or str(number), question=question,
                kind="choice" if is_choice else "text", answer=answer,
                choices=listed_options(question) if is_choice else (),
                query=text_of(row, "question", "query_wo"),
                labels=labels_of(row, "problem_version", "question_type")
                | labels_of(metadata_of(row, number), "subject", "subfield") | {"gold": (gold,)})


def judge_mathverse(response: str, extraction: str, rule: str, item: Item) -> Verdict:
    same = clean(extraction) == clean(item.answer)  # our extraction of a text is in clean's spelling
    if item.kind == "choice":
        return extraction, same, same and rule not in NO_ANSWER
    return extraction, same, rule not in NO_ANSWER and same_value(extraction, item)


def mathverse_means(right: dict[str, bool], items: dict[str, Item]) -> dict[str, float]:
    only = {pid: item for pid, item in items.items() if item.labels["problem_version"] == ("Vision Only",)}
    return {"mean of the versions": mean_of_groups(right, items, "problem_version"),
            "Vision Only": percent([right[pid] for pid in only])}
