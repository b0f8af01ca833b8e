"""MathVista's official normaliser, quirks included: lupantech/MathVista, evaluation/calculate_score.py."""
import re

from benchmarks.extraction import LETTERS
from benchmarks.reading import Item


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions, 1 each."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


def normalize(extraction, item: Item) -> str | None:
    """The prediction the authors compare with the gold answer (calculate_score.py:normalize_extracted_answer).

        kind, options                extraction       -> prediction
        choice, ("20", "30")         "B"              -> "30"
        choice, ("20", "30")         "the (b) one"    -> "30"        the first letter in parentheses
        choice, ("yes", "no")        "B."             -> "no"        no letter: the nearest option
        choice, ("yes", "no")        ""               -> "no"        so is an empty one: the shortest option
        integer                      "3.9"            -> "3"
        integer                      "25 cm"          -> None
        float, precision 1           "0.25"           -> "0.2"
        list                         "[1,2]"          -> "[1,2]"     not "[1, 2]": it compares characters
    """
    if item.kind == "choice":
        extraction = str(extraction).strip()
        inside = re.search(r"\(([a-zA-Z])\)", extraction)
        letter = inside[1].upper() if inside else extraction
        index = LETTERS.find(letter) if len(letter) == 1 else -1
        if 0 <= index < len(item.choices):
            return item.choices[index]
        return min(item.choices, key=lambda choice: levenshtein(letter, choice))  # the first of several
    try:
        if item.kind == "integer":
            return str(int(float(extraction)))
        if item.kind == "float":
            return str(round(float(extraction), item.precision))
    except (TypeError, ValueError, OverflowError):
        return None
    return str(extraction)
