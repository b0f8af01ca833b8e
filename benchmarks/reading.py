"""A question, and what a short text names of it: numbers, and options. The lowest step of the extraction.

    number_in("7 + 5 = 12 cubes")            12
    options_in("likely B-cells", item)       ["C"]      the letters of the options whose text stands there
    read_choice("(c) B-cells", item)         ("C", "letter")
"""
import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from grading.equal import IN_WORDS, LETTERED, WORDS, clean, numbers, quantity, without_left_side


MAX_SENTENCE = 600                                 # characters of a sentence that are read, the last ones
MAX_RAW = 100                                      # characters handed over where nothing was found


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. The rules of extraction look at question, kind and choices, at nothing else."""
    pid: str                                       # unique in its benchmark
    question: str
    kind: str                                      # choice, integer, float, list, yesno or text
    choices: tuple[str, ...] = ()                  # of a choice: the texts of the options, A first
    answer: str = ""                               # gold, as the benchmark spells it; "" where it is withheld
    precision: int | None = None                   # of a float: decimals
    unit: str = ""                                 # years, g
    query: str = ""                                # what the model is asked: the question with its options and hints
    labels: dict = field(default_factory=dict)     # group -> tuple of its values: one, but of skills several


# ---------------------------------------------------------------- numbers

STATES = re.compile(r"\b(?:is|are|was|were|be|equals?|gives?|has|have)\b[^\w-]{0,4}"
                    r"(?:(?:about|approximately|only|just) )?(?=\W{0,3}\d)", re.IGNORECASE)
EQUALS = re.compile(r"[=≈](?=[^\w=]{0,6}\d)")


def number_in(text: str, question: str = "") -> Fraction | None:
    """The number that a sentence states: the last one after =, or else the first one after "is", that the question does
    not have; the last one that the question does not have; the first in words, as twenty-five; the last."""
    text, asked = text.replace("*", ""), set(numbers(question))
    equals, states = ([match.end() for match in pattern.finditer(text)] for pattern in (EQUALS, STATES))
    for end in (*equals[::-1], *states):
        value = next(iter(numbers(text[end : end + MAX_RAW])), None)
        if value is not None and value not in asked:
            return value
    found = numbers(text)
    fresh = [value for value in found if value not in asked]
    word = IN_WORDS.search(text)
    words = [WORDS[word[0].casefold()]] if word else []
    return (fresh[-1:] or words or found[-1:] or [None])[0]


def answer_number(text: str) -> Fraction | None:
    """The number of a text that is nothing but an answer: 12 of the 20 cubes."""
    short = quantity(without_left_side(clean(text), ""))
    if short:
        return short[0]
    leading = numbers(text)[:1] if re.match(r"[*$ ~]*-?\d", text) and "=" not in text else []
    return leading[0] if leading else number_in(text)


# ---------------------------------------------------------------- options


def spell(text: str) -> str:
    """The spelling in which options are looked up: that of `clean`, no case, no markdown, no idle spaces in braces."""
    return clean(text.replace("**", "").replace("$", "")).replace("{ ", "{").replace(" }", "}").casefold()


@lru_cache(maxsize=256)
def spelled(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(spell, choices))


@lru_cache(maxsize=256)
def option_numbers(choices: tuple[str, ...]) -> tuple[Fraction | None, ...]:
    return tuple(value[0] if value else None for value in map(quantity, spelled(choices)))


def letter_of(index: int) -> str:
    return chr(ord("A") + index)


def in_range(letter: str, item: Item) -> bool:
    return len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(item.choices)


@lru_cache(maxsize=256)
def option_pattern(choices: tuple[str, ...]) -> re.Pattern:
    """Finds options that stand as whole words. Those of one letter are left out, because "a" is an article; longer ones
    come first, because a shorter one may stand within them."""
    options = sorted((each for each in spelled(choices) if len(each) > 1 or each.isdigit()), key=len, reverse=True)
    return re.compile("|".join(
        (r"(?<![A-Za-z0-9_.\\{-])" if option[0].isalnum() else "") + re.escape(option)
        + (r"(?![A-Za-z0-9_\\}]|\.\d)" if option[-1].isalnum() else "") for option in options) or "(?!)")


def options_in(text: str, item: Item) -> list[str]:
    """Letters of the options that stand in the text as whole words, in their order."""
    found = option_pattern(item.choices).findall(spell(text[-MAX_SENTENCE:]))
    return [letter_of(spelled(item.choices).index(option)) for option in found]


def equal_number(value: Fraction | None, item: Item) -> str | None:
    """The letter of the first option with this number, units aside."""
    values = option_numbers(item.choices)
    return letter_of(values.index(value)) if value is not None and value in values else None


def option_of(text: str, item: Item) -> str | None:
    """The letter of the first option with this text, or else with this number."""
    options, text = spelled(item.choices), spell(text[:MAX_SENTENCE])
    value = quantity(text)
    return letter_of(options.index(text)) if text in options else equal_number(value[0] if value else None, item)


REJECTED_AFTER = re.compile(
    r"[^.,;\n]{0,60}?(?:\b(?:is|are|was|be|would be)\b(?: \w+)?? ?(?:not|incorrect|wrong|false)\b|n't\b)")


def read_choice(candidate: str, item: Item) -> tuple[str, str] | None:
    """(letter, form) of a text that is nothing but the answer: B, (b), B. 30°, Option B, 30°; else None.

    A letter with the text of another option is that letter, save "A: 30°", which says that the answer is 30°.
    """
    match = LETTERED.fullmatch(clean(candidate[:MAX_SENTENCE].replace("**", "")))
    letter, text = (match[1].upper(), match[2] or match[3]) if match else ("", "")
    option = option_of(candidate, item)
    if in_range(letter, item) and not text and (match[1].isupper() or not option):  # a lower-case one may be an option
        return letter, "letter"
    if option:
        return option, "option"
    if in_range(letter, item) and text:
        option = option_of(text, item)
        if option and match[0].startswith("A:"):
            return option, "option"
        if option or not REJECTED_AFTER.match(text) and not match[3]:
            return letter, "letter"
    return (letter, "out of range") if letter and not text else None
