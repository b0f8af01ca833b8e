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
3. prose: the RULES of each kind in their order.

The name of the rule goes into every report, for a score is only as good as what it was read by. Pure, deterministic,
never raises on text, and takes linear time.
"""
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from string import ascii_uppercase as LETTERS  # of the options, in their order

from data import ANSWER_HEADER, GAP, SPECIAL_TOKEN, parse
from grading.equal import (IN_WORDS, LETTER, WORDS, bare_number, clean, cut, numbers, plain, quantity, said_lines,
                           same_letter, without_left_side)


VERSION = "6"                                      # of the rules: scores compare only under the same one
MAX_SENTENCE = 600                                 # characters of a sentence that are read, the last ones
MAX_RAW = 100                                      # characters handed over where nothing was found
NO_ANSWER = ("empty", "unfinished", "out of range", "nothing")       # rules that found none: strictly wrong


@dataclass(frozen=True)
class Item:
    """One question of a benchmark. The rules of extraction look at question, kind and choices, at nothing else."""
    pid: str                                       # unique in its benchmark
    question: str
    kind: str                                      # choice, integer, float, list, yesno or text
    choices: tuple[str, ...] = ()                  # of a choice: the texts of the options, A first
    answer: str = ""                               # gold, as the benchmark spells it; "" where it is withheld
    precision: int | None = None                   # of a float: decimals
    query: str = ""                                # what the model is asked: the question with its options and hints
    labels: dict = field(default_factory=dict)     # group -> tuple of its values: one, but of skills several


# ---------------------------------------------------------------- numbers

def number_in(text: str, question: str = "") -> Fraction | None:
    """The number that a sentence states: the last one that the question does not have, or else the first in words, as
    twenty-five, or else the last."""
    asked, found, word = set(numbers(question)), numbers(text.replace("*", "")), IN_WORDS.search(text)
    fresh = [value for value in found if value not in asked]
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


@lru_cache(maxsize=256)
def spelled(choices: tuple[str, ...]) -> tuple[str, ...]:
    """The options as they are looked up, as many as have a letter."""
    return tuple(clean(choice).casefold() for choice in choices[: len(LETTERS)])


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
    found = option_pattern(item.choices).findall(clean(text[-MAX_SENTENCE:]).casefold())
    return [LETTERS[spelled(item.choices).index(option)] for option in found]


def equal_number(value: Fraction | None, item: Item) -> str | None:
    """The letter of the first option with this number, units aside."""
    values = [(quantity(option) or [None])[0] for option in spelled(item.choices)]
    return LETTERS[values.index(value)] if value is not None and value in values else None


REJECTED_AFTER = re.compile(
    r"[^.,;\n]{0,60}?(?:\b(?:is|are|was|be|would be)\b(?: \w+)?? ?(?:not|incorrect|wrong|false)\b|n't\b)")


def read_choice(candidate: str, item: Item) -> tuple[str, str] | None:
    """(letter, form) of a text that is nothing but the answer: B, (b), B. 30°, Option B, 30°; else None. What the
    reward takes for a letter's option is that letter; the text of an option, as (a) may be, comes before."""
    given, options = clean(candidate[:MAX_SENTENCE].replace("**", "")), spelled(item.choices)
    if given.casefold() in options and not given.isupper():
        return LETTERS[options.index(given.casefold())], "option"
    letters = [letter for letter in LETTERS[: len(options)] if same_letter(given, letter, item.choices)]
    alone = LETTER.fullmatch(given)
    return (letters[0], "letter") if letters else (alone[1].upper(), "out of range") if alone else None


# ---------------------------------------------------------------- the response

ANSWER_LINE = re.compile(r"(?:^|#)[ *>_]*" + ANSWER_HEADER.pattern.removeprefix(GAP) + "[ *:]*",
                         re.IGNORECASE | re.MULTILINE)
BOXED = re.compile(r"\\boxed ?\{((?:[^{}]|\{(?:[^{}]|\{[^{}]{0,99}\}){0,99}\}){0,600})\}")  # \frac{\sqrt{3}}{2} in it


def tidy(response: str) -> str:
    """The spelling that all rules read, cut to what they read."""
    lines = (" ".join(line.split()) for line in plain(SPECIAL_TOKEN.sub(" ", cut(response))).split("\n"))
    return "\n".join(filter(None, lines))


def boxed(text: str) -> str | None:
    r"""Contents of the last \boxed{} that is not called wrong."""
    found = (match for match in reversed(list(BOXED.finditer(text)))
             if not REJECTED_AFTER.match(text[match.end() : match.end() + MAX_RAW]))
    return next((match[1] for match in found), None)


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


# ---------------------------------------------------------------- prose: sentences

SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n")
CONCLUSION = re.compile(r"\b(?:therefore|thus|hence|so|in conclusion|overall|answer|in summary|finally)\b|"
                        r"因此|所以|故|答案|综上", re.IGNORECASE)
DECLINES = re.compile(r"\b(?:cannot|can't|(?:im|not )possible to|unable to) (?:be )?(?:determin|answer|tell)|\bN/A\b|"
                      r"\bnot (?:among|provided|given|listed|enough)\b|\bnone of the (?:options|choices|above)|"
                      r"不能确定|无法确定", re.IGNORECASE)  # said in the end of the answer, this is none
NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|none|cannot)\b|n't\b|不|没有", re.IGNORECASE)


@lru_cache(maxsize=64)
def sentences(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in SENTENCE_END.split(text))
    return tuple(part[-MAX_SENTENCE:] for part in parts if part.strip(" *_`#-|"))


def conclusions(text: str, pattern: re.Pattern = CONCLUSION) -> list[str]:
    """The sentences that draw a conclusion, the last first."""
    return [part for part in sentences(text)[::-1] if pattern.search(part)]


def restating(text: str, item: Item) -> list[str]:
    """The sentences with half of the words of what is asked, those with most of them first, then the later ones."""
    words = [set(re.findall(r"\w+", part.lower())) for part in sentences(text)]
    asked = set(re.findall(r"\w+", (sentences(item.question) or ("",))[-1].lower()))
    ranked = sorted(((len(asked & said), i) for i, said in enumerate(words)), reverse=True)
    return [sentences(text)[i] for shared, i in ranked if shared and shared >= len(asked) / 2]


# ---------------------------------------------------------------- prose: choices

# A letter as an answer: (B), (b), [B], "B", B; but neither "A triangle" nor the B of AB, B' or B = 5.
# What may stand around it is bounded, here and in every rule: a pattern that may repeat has to end.
A_LETTER = (r"[ *\"'`$]{0,6}(?:(?i:option|choice|answer|letter)\b|选项)?[ *\"`$:]{0,6}(?:\\(?:text|boxed)\{){0,3}"
            r"(?:\(([A-Za-z])\)|\[([A-Z])\]|(?<=')([A-Z])'|([A-Z])(?![A-Za-z0-9_'°-]| ?[=<>+/^]|(?<=A) [a-z]))")
SUBJECT = r"(?:\b(?i:answer|ans|option|choice|solution|letter|correct(?: one)?)\b|答案|选项)"
IS = r"(?:\b(?:is|are|be|was)\b|[:=为是])"
STATED = re.compile(rf"{SUBJECT}[^.\n]{{0,80}}?(?:{IS}|\n)(?: not \(?[A-Z]\)?,? but)?{A_LETTER}")
MENTIONED = re.compile(
    r"(?:\b(?i:option|choice|answer|ans|choose|select|pick)\b|故选|选[择项]?|答案)[: ]{0,3}" + A_LETTER)
CONFIRMED = re.compile(r"(?:\(([A-Za-z])\)[^.(\n]{0,60}?|\b([A-Z])\*{0,2}) is (?:the )?(?:correct|right|answer|best)")
IN_PARENTHESES = re.compile(r"\(([A-H])\)")
LISTED = re.compile(r"^[ *-]*\(?([A-Z])[).:] ?\S.*", re.MULTILINE)


def last_letter(text: str, pattern: re.Pattern) -> str | None:
    """The letter of the last match that is not called wrong."""
    right = (match for match in reversed(list(pattern.finditer(text)))
             if not REJECTED_AFTER.match(text[match.end() : match.end() + 80]))
    return next((next(filter(None, match.groups())).upper() for match in right), None)


def yes_or_no(text: str, item: Item) -> str | None:
    """Where yes and no, or true and false, are the options: the first word, or else the last of a conclusion, or else
    the sentence that repeats the question, which a negation makes a no."""
    if set(spelled(item.choices)) not in ({"yes", "no"}, {"true", "false"}):
        return None
    letters = {option in ("yes", "true"): letter for letter, option in zip(LETTERS, spelled(item.choices))}
    leading = re.match(r"\W*(yes|no|true|false)\b", text, re.IGNORECASE)
    concluding = (re.findall(r"\b(?:yes|no|true|false)\b(?! \w)", part, re.IGNORECASE) for part in conclusions(text))
    words = leading.groups() if leading else next(filter(None, concluding), None)
    if words:
        return letters[words[-1].lower() in ("yes", "true")]
    statement = next(iter(restating(text, item)), None)
    return letters[not NEGATION.search(statement)] if statement else None


def concluded(text: str, item: Item) -> str | None:
    """The last option that the last conclusion with an answer names, or that its number equals; else the same of any
    sentence."""
    letters = ((options_in(part, item) or [equal_number(number_in(part, item.question), item)])[-1]
               for part in (*conclusions(text), *sentences(text)[::-1]))
    return next(filter(None, letters), None)


# ---------------------------------------------------------------- prose: numbers, lists and texts

ANSWER = re.compile("answer|答案", re.IGNORECASE)
STATES_ANSWER = re.compile(rf"(?:\b(?i:(?<!other )answer|correct \w+)\b|答案)[^.\n]{{0,60}}?{IS}")


def first_number(parts: list[str], item: Item) -> str | None:
    """The number of the first sentence that has one."""
    values = (number_in(part, item.question) for part in parts)
    return next((bare_number(value) for value in values if value is not None), None)


def last_list(text: str, item: Item) -> str | None:
    """The last [...] of plain numbers, as Python writes it."""
    found = re.findall(r"\[([-\d., ]{0,400}\d) ?\]", text)
    return "[" + ", ".join(map(str.strip, found[-1].split(","))) + "]" if found else None


def stated_text(text: str, item: Item) -> str | None:
    """What follows the last "answer is", to the end of the sentence."""
    rests = (text[match.end() : match.end() + MAX_SENTENCE] for match in reversed(list(STATES_ANSWER.finditer(text))))
    return next(filter(None, (clean(re.split(r"\n|\. ", rest)[0]) for rest in rests)), None)


# ---------------------------------------------------------------- prose: the order of the rules

NUMBER_RULES = {
    "stated number": lambda text, item: first_number(conclusions(text, ANSWER), item),    # The answer is 5.
    "restated": lambda text, item: first_number(restating(text, item), item),             # in the words of the question
    "last number": lambda text, item: first_number(sentences(text)[::-1], item)}
RULES = {
    "choice": {
        "stated letter": lambda text, item: last_letter(text, STATED),                    # The correct answer is (B).
        "yes or no": yes_or_no,
        "mentioned letter": lambda text, item: last_letter(text, CONFIRMED) or last_letter(text, MENTIONED),
        "last letter": lambda text, item: last_letter(text, IN_PARENTHESES), "concluded": concluded},
    "integer": NUMBER_RULES, "float": NUMBER_RULES, "list": {"list": last_list}, "text": {"stated text": stated_text}}


def read_prose(text: str, item: Item) -> tuple[str, str]:
    """(answer, name of the rule that gave it), of the first rule that answers; else the end of the text, "nothing"."""
    said = LISTED.sub("", text) if len(set(LISTED.findall(text))) > 1 else text  # options, a line each, are no answer
    last = (sentences(said) or ("",))[-1]
    declined = DECLINES.search(last) and not options_in(last, item)
    answers = ((rule(said, item), name) for name, rule in RULES[item.kind].items() if not declined)
    answer, name = next((found for found in answers if found[0]), (text[-MAX_RAW:], "nothing"))
    outside = item.kind == "choice" and name != "nothing" and answer not in tuple(LETTERS[: len(item.choices)])
    return answer, "out of range" if outside else name


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
