r"""Reading the answer out of any model's response, by rules: no judge model, no key, no network.

    extraction, rule = extract(response, problem)          ("B", "section: letter")

    problem.kind     extraction                            when nothing is found
    choice           the option's bare capital letter      the end of the response, as it stands
    integer, float   a bare number: 1000, -0.75            the end of the response
    list             as Python writes it: [1, 2]           the end of the response
    yesno            Yes or No                             the end of the response
    text             the bare text of the answer           ""

What is read, first hit wins:
1. a structured answer: the last "The final answer is" that begins a line, else <answer>, else the last \boxed{}.
   The rest of the response is then not looked at; only an empty one falls through.
2. a response in the trained format that ends before its answer section is unfinished: no answer, whatever it reasons.
3. prose: the rules of the kind in the order they stand below, each named after its function.

The name of the rule goes into every report, for a score is only as good as what it was read by. Those in NO_ANSWER found
nothing: a strict score counts them as wrong. The rules know languages (English, Chinese) and no data set.
Pure, deterministic, never raises on text, and takes linear time.
"""
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from answers import ANSWER_HEADER, FRACTION, SPECIAL_TOKEN, WORDS, clean, parse, quantity

VERSION = "1"                                      # of the rules: scores compare only under the same one
LETTERS = "ABCDEFGH"                               # as many options as the known benchmarks have
NO_ANSWER = ("empty", "unfinished", "out of range", "nothing")


@dataclass(frozen=True)
class Problem:
    """What a rule may know of a question; pid and answer are for the caller, no rule reads them."""
    pid: str
    question: str
    kind: str                                      # choice, integer, float, list, yesno or text
    choices: tuple[str, ...] = ()                  # of a choice: the texts of the options, A first
    answer: str = ""                               # gold, as the benchmark spells it
    precision: int | None = None                   # of a float: decimals
    unit: str = ""                                 # years, g


# ---------------------------------------------------------------- the response

MAX_TEXT = 40_000                                  # characters read: more than 4096 tokens hold
MAX_SENTENCE = 600
MAX_RAW = 100                                      # of a response in which nothing was found
CONTINUATION = re.compile(r"\n\s*(?:Hint: Please|Question(?: \d+)?:|Human:|User:|###? ?(?:Human|User|Question)\b)")
ANSWER_LINE = re.compile(rf"(?:^|#)[ *>_]*{ANSWER_HEADER.pattern}[ *:]*", re.IGNORECASE | re.MULTILINE)
SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n")
PLAIN = str.maketrans({"\r": "", "−": "-", "–": "-", "：": ":", "（": "(", "）": ")", "，": ",", "＝": "=", "\u00a0": " "})


def tidy(response: str) -> str:
    """One spelling of spaces, signs and brackets; nothing after a second problem that the model puts to itself."""
    if len(response) > MAX_TEXT:
        response = response[: MAX_TEXT // 4] + "\n" + response[-MAX_TEXT * 3 // 4 :]
    text = SPECIAL_TOKEN.sub(" ", response).translate(PLAIN).strip()
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"(?: ?\n ?)+", "\n", text)
    match = CONTINUATION.search(text, 1)
    return text[: match.start()] if match else text


def sentences(text: str) -> list[str]:
    parts = [part.strip() for part in SENTENCE_END.split(text)]
    return [part[-MAX_SENTENCE:] for part in parts if part.strip(" *_`#-|")]


def boxed(text: str) -> str | None:
    r"""Contents of the last \boxed{} whose braces balance."""
    for start in [match.end() for match in re.finditer(r"\\boxed ?\{", text)][:-4:-1]:
        depth = 1
        for end in range(start, min(len(text), start + MAX_SENTENCE)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def first_line(text: str) -> str:
    r"""The first line that says something: not a lone \[ or **."""
    inside = boxed(text)
    if inside is not None:
        return inside
    return next((line for line in text.split("\n") if clean(line)), "")


def structured(text: str) -> tuple[str, str]:
    """(kind of structure, what it holds), ("", "") without one."""
    headers = list(ANSWER_LINE.finditer(text))
    if headers:
        line = first_line(text[headers[-1].end():].split("###")[0])
        if line:
            return "section", line
    tagged = re.split("<answer>", text, flags=re.IGNORECASE)
    if len(tagged) > 1:
        line = first_line(re.split("</answer>", tagged[-1], flags=re.IGNORECASE)[0])
        if line:
            return "tag", line
    inside = boxed(text)
    return ("boxed", inside) if inside else ("", "")


# ---------------------------------------------------------------- options


def spell(text: str) -> str:
    """The spelling in which options are looked up: that of answers.clean, no case, no markdown, no idle LaTeX."""
    text = re.sub(r"\\(?:degree|circ)\b|\^\\circ", "°", re.sub(r"\*?\\degree", "°", text))
    return clean(text.replace("**", "").replace("$", "").replace("{ ", "{").replace(" }", "}")).casefold()


@lru_cache(maxsize=256)
def spelled(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(spell, choices))


def letter_of(index: int) -> str:
    return chr(ord("A") + index)


def in_range(letter: str, problem: Problem) -> bool:
    return 0 <= ord(letter) - ord("A") < len(problem.choices)


def found_in(text: str, problem: Problem) -> list[tuple[int, str]]:
    """[(position, letter)] of the options that stand in the text as whole words, without those within longer ones."""
    text, spans = spell(text), []
    for i, option in enumerate(spelled(problem.choices)):
        if len(option) < 2 and not option.isdigit():                     # "a" is an article
            continue
        pattern = rf"(?<![\w.\\-]){re.escape(option)}(?![\w\\]|\.\d)"
        spans += [(m.start(), m.end(), letter_of(i)) for m in re.finditer(pattern, text)]
    longest = sorted(spans, key=lambda span: span[0] - span[1])
    kept = []
    for start, end, letter in longest:
        if not any(a < end and start < b for a, b, _ in kept):
            kept.append((start, end, letter))
    return sorted((start, letter) for start, end, letter in kept)


def equal_option(text: str, problem: Problem) -> str | None:
    text = spell(text)
    return next((letter_of(i) for i, option in enumerate(spelled(problem.choices)) if option == text), None)


def equal_number(text: str, problem: Problem) -> str | None:
    """The one option with this number, units aside."""
    given = number_in(text)
    values = [quantity(option) for option in spelled(problem.choices)]
    hits = [i for i, value in enumerate(values) if given is not None and value and value[0] == given]
    return letter_of(hits[0]) if hits else None


BARE_LETTER = re.compile(r"(?:option |choice |answer |letter |选项)?[(\[{]?([A-Za-z])[)\]}]?[.:,]?", re.IGNORECASE)
LETTER_THEN_TEXT = re.compile(r"(?:option |choice )?(?:[(\[]([A-Za-z])[)\]][.:,]?|([A-Z])[.:,)])\s*(.+)", re.IGNORECASE)


def read_choice(candidate: str, problem: Problem) -> tuple[str, str]:
    """(letter, how) of a text that is nothing but the answer; (raw text, "nothing") when it names no option."""
    bare = clean(candidate.replace("**", ""))
    letter = BARE_LETTER.fullmatch(bare)
    if letter and letter[1].isupper() and in_range(letter[1], problem):
        return letter[1], "letter"
    text = equal_option(candidate, problem)
    if text:
        return text, "option"
    if letter and in_range(letter[1].upper(), problem):
        return letter[1].upper(), "letter"
    led = LETTER_THEN_TEXT.fullmatch(bare)
    if led and in_range((led[1] or led[2]).upper(), problem):
        return (led[1] or led[2]).upper(), "letter"
    found = found_in(candidate, problem)
    if found:
        return found[0][1], "option"
    number = equal_number(candidate, problem)
    if number:
        return number, "number"
    return (letter[1].upper(), "out of range") if letter else (candidate[:MAX_RAW], "nothing")


# ---------------------------------------------------------------- numbers

NUMBER = re.compile(
    r"(?<![\w.,])(?<!\d-)([+-]?) ?[$€£¥]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/(\d+(?:\.\d+)?)(?![\d/]))?(?: ?(?:×|\*|\\times|x) ?10\^\{?([+-]?\d{1,2})\}?)?"
    r"(?!\w*(?:st|nd|rd|th)\b)(?: (million|billion|thousand))?", re.IGNORECASE)
SCALE = {"thousand": 1000, "million": 10**6, "billion": 10**9}


def numbers(text: str) -> list[tuple[int, Fraction]]:
    """[(position, value)] of the numbers in a text."""
    text = FRACTION.sub(r" \1/\2 ", text.replace("{,}", ",").replace("dfrac", "frac"))
    found = []
    for match in NUMBER.finditer(text):
        sign, top, bottom, power, scale = match.groups()
        if len(top) > 40 or bottom and not float(bottom):
            continue
        value = Fraction(top.replace(",", "")) / Fraction(bottom or 1) * Fraction(10) ** int(power or 0)
        value *= SCALE.get((scale or "").lower(), 1)
        found.append((match.start(), -value if sign == "-" else value))
    return found


def number_in(text: str) -> Fraction | None:
    """The number a sentence states: after its last =, after its last "is", else its last; words when no digits."""
    for part in re.split(r"[=≈]|\\approx", text)[::-1]:
        found = numbers(part)
        if found:
            return found[0][1] if part is not text else found[-1][1]
    words = [WORDS[word] for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text.lower()) if word in WORDS]
    return Fraction(words[-1]) if words else None


def bare_number(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.10g}"


def read_number(candidate: str, problem: Problem) -> tuple[str, str]:
    value = number_in(candidate)
    return (bare_number(value), "number") if value is not None else (candidate[:MAX_RAW], "nothing")


# ---------------------------------------------------------------- extract


def read(candidate: str, problem: Problem) -> tuple[str, str]:
    if problem.kind == "choice":
        return read_choice(candidate, problem)
    if problem.kind in ("integer", "float"):
        return read_number(candidate, problem)
    return clean(candidate), "text"


def extract(response: str, problem: Problem) -> tuple[str, str]:
    """(extraction, name of the rule that found it); see the head of this file."""
    text = tidy(response)
    if not text:
        return "", "empty"
    structure, candidate = structured(text)
    if structure:
        extraction, how = read(candidate, problem)
        return extraction, how if how in NO_ANSWER else f"{structure}: {how}"
    sections = parse(text)
    if sections.description is not None or sections.rationales is not None:
        return "", "unfinished"
    return read(text[-MAX_RAW:], problem)
