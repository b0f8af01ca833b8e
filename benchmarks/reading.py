"""A question, and what a short text names of it: numbers, and options. The lowest step of the extraction.

    numbers("the 2nd of 1,000 costs $5")     [1000, 5]
    number_in("7 + 5 = 12 cubes")            12
    options_in("likely B-cells", item)       ["C"]      the letters of the options whose text stands there
    read_choice("(c) B-cells", item)         ("C", "letter")
"""
import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from grading.equal import FRACTION, WORDS, clean, quantity


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

NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,^])(?<!\d-)([+-]?)[$€£¥]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # sign, digits
    r"(?:/(\d+(?:\.\d+)?)(?![\d/]))?(?:e([+-]?\d{1,2})\b| ?(?:×|\*|\\times|x) ?10\^\{?([+-]?\d{1,2})\}?)?"  # /, power
    r"(?!(?:st|nd|rd|th)\b)(?: (million|billion|thousand)\b)?", re.IGNORECASE)
MAX_DIGITS = 40
SCALE = {"thousand": 1000, "million": 10**6, "billion": 10**9}
# "one" in words is no number here: "which one", "one of them".
NO_COUNT = re.compile(r"\b(?:which|this|that|the|no|each|every|any) one\b|\bone (?:of|can|must|another|or)\b")
BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")
STATES = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|gives?|get|have|has|of)\b|[:为是])[^\w-]{0,4}"
    r"(?:(?:also|still|then|about|around|approximately|exactly|roughly|nearly|only|just|likely|estimated|equal|at|to) )"
    r"{0,3}(?=\W{0,3}\d)", re.IGNORECASE)
EQUALS = re.compile(r"(?:=|≈|\\approx)(?=[^\w=]{0,6}(?:\d|\\d?frac))")
ORDINAL = re.compile(r"\b(\d{1,4})(?:st|nd|rd|th)\b")


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text: 1,000, -3/4, $5, 1.2*10^3, 3.5 million; neither 2nd nor the 5 of 3-5."""
    text = FRACTION.sub(r" \1/\2 ", text.replace("{,}", ",").replace("dfrac", "frac"))
    found = []
    for sign, top, bottom, exponent, power, scale in NUMBER.findall(text):
        if len(top + bottom) > MAX_DIGITS or bottom and not float(bottom):
            continue
        value = Fraction(top.replace(",", "")) / Fraction(bottom or 1) * Fraction(10) ** int(exponent or power or 0)
        value *= SCALE.get(scale.lower(), 1)
        found.append(-value if sign == "-" else value)
    return found


def number_in(text: str, question: str = "") -> Fraction | None:
    """The number that a sentence states. In this order: the bold one; the last one after = or else the first one after
    "is" that the question does not have; the last one that the question does not have; the first in words, as
    twenty-five; the last; that of 4th."""
    bold = [value for part in BOLD.findall(text) for value in numbers(part)]
    if bold:
        return bold[-1]
    text, asked = text.replace("*", ""), set(numbers(question))
    after_equals = [match.end() for match in EQUALS.finditer(text)][::-1]
    for end in (*after_equals, *(match.end() for match in STATES.finditer(text))):
        value = next(iter(numbers(text[end : end + MAX_RAW])), None)
        if value is not None and value not in asked:
            return value
    found = numbers(text)
    fresh = [value for value in found if value not in asked]
    words = re.findall(r"[a-z]+(?:-[a-z]+)?", NO_COUNT.sub(" ", text.lower()))
    in_words = [Fraction(WORDS[word]) for word in words if word in WORDS]
    ordinal = [Fraction(digits) for digits in ORDINAL.findall(text)]
    return (fresh[-1:] or in_words[:1] or found[-1:] or ordinal[-1:] or [None])[0]


def answer_number(text: str, question: str = "") -> Fraction | None:
    """The number of a text that is nothing but an answer: 12 of the 20 cubes."""
    leading = numbers(text)[:1] if re.match(r"[*$ ~-]*\d", text) and "=" not in text else []
    return leading[0] if leading else number_in(text, question)


def bare_number(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


# ---------------------------------------------------------------- options


def spell(text: str) -> str:
    """The spelling in which options are looked up: that of equal.clean, no case, no markdown, no idle LaTeX."""
    text = re.sub(r"\*? ?\\degree", "°", text).replace("**", "").replace("$", "").replace("{ ", "{").replace(" }", "}")
    return clean(text).casefold()


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
def option_pattern(choices: tuple[str, ...]) -> tuple[re.Pattern, str]:
    """(pattern, letters): group i of a match is the option letters[i - 1]. Options of one letter are left out, because
    "a" is an article; longer ones come first, because a shorter one may stand within them."""
    options = sorted((-len(option), option, letter_of(i)) for i, option in enumerate(spelled(choices))
                     if len(option) > 1 or option.isdigit())
    patterns = []
    for _, option, _ in options:
        left = r"(?<![A-Za-z0-9_.\\{-])" if option[0].isalnum() else ""
        right = r"(?![A-Za-z0-9_\\}]|\.\d)" if option[-1].isalnum() else ""
        patterns.append(f"({left}{re.escape(option)}{right})")
    return re.compile("|".join(patterns) or "(?!)"), "".join(letter for _, _, letter in options)


def options_in(text: str, item: Item) -> list[str]:
    """Letters of the options that stand in the text as whole words, in their order."""
    pattern, letters = option_pattern(item.choices)
    return [letters[match.lastindex - 1] for match in pattern.finditer(spell(text[-MAX_SENTENCE:]))]


def equal_option(text: str, item: Item) -> str | None:
    """The letter of the first option with this text."""
    options, text = spelled(item.choices), spell(text[:MAX_SENTENCE])
    return letter_of(options.index(text)) if text in options else None


def equal_number(value: Fraction | None, item: Item) -> str | None:
    """The letter of the first option with this number, units aside."""
    values = option_numbers(item.choices)
    return letter_of(values.index(value)) if value is not None and value in values else None


REJECTED_AFTER = re.compile(
    r"[^.,;\n]{0,60}?(?:\b(?:is|are|was|be|would be)\b(?: \w+)?? ?(?:not|incorrect|wrong|false)\b|n't\b)")
BARE_LETTER = re.compile(r"(?:option |choice |answer |letter |选项)?[(\[{]?([A-Za-z])[)\]}]?[.:,]?", re.IGNORECASE)
LETTER_THEN_TEXT = re.compile(
    r"(?:option |choice |选项)?(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Za-z])(?:[.:,)-]| (?=\S)))\s*(.+)", re.IGNORECASE)


def read_choice(candidate: str, item: Item) -> tuple[str, str] | None:
    """(letter, form) of a text that is nothing but the answer: B, (b), B. 30°, Option B, 30°; else None.

    A letter with the text of another option is that letter, save "A: 30°", which says that the answer is 30°.
    """
    bare = clean(candidate[:MAX_SENTENCE].replace("**", ""))
    match = BARE_LETTER.fullmatch(bare)
    letter = match[1].upper() if match else ""
    option = equal_option(candidate, item)
    if in_range(letter, item) and (match[1].isupper() or not option):    # a lower-case letter may be an option's text
        return letter, "letter"
    if option:
        return option, "option"
    led = LETTER_THEN_TEXT.fullmatch(bare)
    if led and in_range((led[1] or led[2]).upper(), item):
        option = equal_option(led[3], item)
        if option and bare.startswith("A:"):
            return option, "option"
        if option or not REJECTED_AFTER.match(led[3]) and not bare.startswith(f"{led[2]} "):
            return (led[1] or led[2]).upper(), "letter"
    value = quantity(spell(candidate))
    option = equal_number(value[0], item) if value else None
    if option:
        return option, "number"
    return (letter, "out of range") if letter else None
