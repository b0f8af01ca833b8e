r"""Reading the answer out of any model's response, by rules: no judge model, no key, no network.

    extraction, rule = extract(response, item)             ("B", "section: letter")

    item.kind        extraction; where nothing is found, the end of the response
    choice           the option's bare capital letter
    integer, float   a bare number: 1000, -0.75
    list             as Python writes it: [1, 2]
    yesno            Yes or No
    text             the bare text of the answer

What is read, first hit wins:
1. a structured answer: the last "The final answer is" that begins a line, else <answer>, else the last \boxed{}.
   The rest of the response is then not looked at; only an empty one falls through.
2. a response in the trained format that ends before its answer section is unfinished: no answer, whatever it reasons.
3. prose: the rules of prose.py, each named after its function.

The name of the rule goes into every report, for a score is only as good as what it was read by. Those in NO_ANSWER
found nothing: a strict score counts them as wrong. The rules know languages (English, Chinese) and no data set.
Pure, deterministic, never raises on text, and takes linear time.
"""
import re
from dataclasses import replace
from itertools import accumulate

from benchmarks.prose import read_prose
from benchmarks.reading import MAX_RAW, MAX_SENTENCE, REJECTED_AFTER, Item, answer_number, read_choice
from data import ANSWER_HEADER, GAP, SPECIAL_TOKEN, parse
from grading.equal import bare_number, clean, cut, plain, said_lines


VERSION = "5"                                      # of the rules: scores compare only under the same one
LETTERS = "ABCDEFGH"                               # as many options as the known benchmarks have
NO_ANSWER = ("empty", "unfinished", "out of range", "nothing")

# ---------------------------------------------------------------- the response

CONTINUATION = re.compile(r"\n\s*(?:Hint: Please|Question(?: \d+)?:|Human:|User:|###? ?(?:Human|User|Question)\b)")
ANSWER_LINE = re.compile(r"(?:^|#)[ *>_]*" + ANSWER_HEADER.pattern.removeprefix(GAP) + "[ *:]*",
                         re.IGNORECASE | re.MULTILINE)


def tidy(response: str) -> str:
    """The spelling that all rules read, cut to what they read; nothing after a second question that the model puts to
    itself."""
    lines = (" ".join(line.split()) for line in plain(SPECIAL_TOKEN.sub(" ", cut(response))).split("\n"))
    text = "\n".join(filter(None, lines))
    match = CONTINUATION.search(text, 1)
    return text[: match.start()] if match else text


def boxed(text: str) -> str | None:
    r"""Contents of the last \boxed{} whose braces balance and that is not called wrong."""
    for start in [match.end() for match in re.finditer(r"\\boxed ?\{", text)][:-4:-1]:
        steps = ({"{": 1, "}": -1}.get(character, 0) for character in text[start : start + MAX_SENTENCE])
        end = next((start + i for i, depth in enumerate(accumulate(steps, initial=1)) if depth == 0), None)
        if end and not REJECTED_AFTER.match(text[end : end + MAX_RAW]):
            return text[start : end - 1]
    return None


def first_line(text: str) -> str:
    """What the section boxes, or else its first line that says something, cut to what is read of a sentence."""
    return boxed(text) or next(iter(said_lines(text)), "")[:MAX_SENTENCE]


def structured(text: str) -> tuple[str, str]:
    """(kind of structure, what it holds), ("", "") without one."""
    sections = [text[header.end():].split("###")[0] for header in list(ANSWER_LINE.finditer(text))[:-4:-1]]
    tagged = re.split("<answer>", text, flags=re.IGNORECASE)[1:][-1:]    # what follows the last one, if there is any
    tags = [re.split("</answer>", tag, flags=re.IGNORECASE)[0] for tag in tagged]
    found = [("section", first_line(section)) for section in sections] + [("tag", first_line(tag)) for tag in tags]
    return next((pair for pair in [*found, ("boxed", boxed(text))] if pair[1]), ("", ""))


# ---------------------------------------------------------------- extract

YES_NO = ("Yes", "No")


def read_short(candidate: str, item: Item) -> tuple[str, str] | None:
    """(extraction, form) of a text that is nothing but the answer, None when it is more than that."""
    if item.kind == "choice":
        return read_choice(candidate, item)
    if item.kind in ("integer", "float"):
        value = answer_number(candidate)
        return None if value is None else (bare_number(value), "number")
    return (clean(candidate), "text") if item.kind == "text" else None


def extract(response: str, item: Item) -> tuple[str, str]:
    """(extraction, name of the rule that found it); see the head of this file."""
    if item.kind == "yesno":
        extraction, rule = extract(response, replace(item, kind="choice", choices=YES_NO))
        return YES_NO["AB".index(extraction)] if extraction in ("A", "B") else extraction, rule
    text, item = tidy(response), replace(item, question=plain(item.question))
    if not text:
        return "", "empty"
    place, candidate = structured(text)
    extraction, form = "", "nothing"
    if place:
        extraction, form = read_short(candidate, item) or read_prose(candidate, item)
    if form == "nothing" and place in ("", "boxed"):
        sections = parse(text)
        if sections.description is not None or sections.rationales is not None:
            return "", "unfinished"
        alone = item.kind == "choice" and len(text) <= MAX_RAW and "\n" not in text
        short = read_choice(text, item) if alone else None
        if not short:
            return read_prose(text, item)
        place, (extraction, form) = "whole", short
    return extraction, form if form in NO_ANSWER else f"{place}: {form}"
