r"""Whether two answers are the same, and how the text of a model is read: by the reward and the evaluation alike.

`correct` is pure and never raises on model text. It fails closed: two answers, no answer, or anything it does not
understand is wrong, because a policy soon finds whatever is rewarded by mistake. What it understands:

    letter      gold "B":            B   (b)   B.   **B**   Option B   (B) 30°   and the text of option B
    option      gold "30°":          its text, as below, or the letter of an option with this text
    yes / no    gold "Yes":          yes   Yes.   yes, it is
    text        gold "red cube":     Red cube   red cube.   \boxed{\text{red cube}}
    list        gold "[1, 2]":       [1,2]   1, 2   1 and 2      order and brackets count; {2, 1} is {1, 2}
    number      gold "0.5":          1/2   \frac12   ½   .50   5*10^{-1}   50%   0.5 cm   x = 0.5

Numbers are exact fractions. That \sqrt{8} is 2\sqrt{2}, or x^2+2x+1 is (x+1)^2, is beyond these rules: `same_answer`
then asks algebra.py, if the gold answer is symbolic. Every pattern is bounded, so reading takes linear time.
"""
import math
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from string import ascii_uppercase

MAX_TEXT = 40_000                                  # characters of a response that are read: over 4096 tokens


def cut(text: str) -> str:
    """The first quarter and the last three quarters of what is read of a text: whoever reads responses begins here."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT // 4] + "\n" + text[-MAX_TEXT * 3 // 4 :]


# ---------------------------------------------------------------- characters

# Where NFKC says nothing, or something else: dashes, quotes, products, and the signs that end a Chinese sentence.
TYPED = {"-": "‐‑‒–—―−﹣－", "'": "‘’‚´ʼ′", '"': "“”„«»", r"\times ": "×", r"\cdot ": "·⋅∙•", r"\div ": "÷", "*": "∗＊",
         "/": "∕", "≤": "≦⩽", "≥": "≧⩾", r"\Delta ": "∆", "°": "º˚", ". ": "。｡", ", ": "、", "! ": "！",
         "? ": "？", "; ": "；", "...": "…", "No.": "№", "": "\u034f\u115f\u1160\u2800\u3164\uffa0"}
SPELLINGS = {character: text for text, characters in TYPED.items() for character in characters}


@lru_cache(maxsize=4096)
def spelled_character(character: str) -> str:
    r"""In ASCII or LaTeX where there is one: ² as ^{2}, ½ as 1/2, θ as \theta. Invisible ones are none."""
    if character.isascii() or character in SPELLINGS:
        return SPELLINGS.get(character, character)
    if unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f":
        return ""
    compatible, kind = unicodedata.normalize("NFKC", character), unicodedata.decomposition(character).split(" ")[0]
    greek = re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(compatible[0], ""))
    if greek:
        name = greek[2].replace("LAMDA", "LAMBDA")
        return "\\" + (name.capitalize() if greek[1] == "CAPITAL" else name.lower()) + " "
    if kind == "<super>" and re.fullmatch(r"[\d+−n]", compatible):
        return "^{" + compatible.replace("−", "-") + "}"
    return " " + compatible.replace("⁄", "/") + " " if kind == "<fraction>" else compatible


def characters(text: str) -> str:
    """One spelling of characters, composed, without the invisible ones."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", "".join(map(spelled_character, text))).replace("}^{", "")


# ---------------------------------------------------------------- LaTeX

COMMANDS = {                                       # what is written instead of a command
    "": "left right big Big bigl bigr displaystyle limits ! ( ) [ ]", " ": "quad qquad , ; : \\ \n",
    "°": "circ degree deg",
    "≤": "le leq leqslant", "≥": "ge geq geqslant", "≠": "ne neq", "±": "pm", "∠": "angle", "△": "triangle",
    "∞": "infty", "∪": "cup", "∩": "cap", "∈": "in", "≈": "approx", "→": "to rightarrow", "...": "ldots dots cdots",
    r"\frac": "dfrac tfrac cfrac", r"\boxed": "fbox", r"\{": "lbrace", r"\}": "rbrace",
    r"\text": "textrm textbf textit textsf texttt mathrm mathbf mathit mathsf mbox operatorname underline emph",
}
COMMANDS = {name: text for text, names in COMMANDS.items() for name in names.split(" ")}
COMMANDS |= {" ": " "} | {escaped: escaped for escaped in "%$#&_"}
ARGUMENT = r" ?(?:\{ ?([^{}]{0,60}?) ?\}|(\d))"
LATEX = [(re.compile(pattern), text) for pattern, text in [         # in this order
    (r"\\([A-Za-z]+|[^A-Za-z])", None), (r"\{\}|~", " "), (r"\{,\}", ","),
    (r"\^(?:°|\{°\})|(?:\* ?| )°", "°"), (r"\\boxed ?(-?[\w.]+)", r"\\boxed{\1}"),
    (r"√ ?(\d+)|(?:√|\\?(?<![A-Za-z])sqrt) ?\(([^()]{0,60})\)|\\sqrt ?(\d)(?!\d)", r"\\sqrt{\1\2\3}"),
    (r"√ ?\{", r"\\sqrt{"),
    (r"\^ ?(?:\(([^()]{0,60})\)|([+-]?\d+|[A-Za-z](?![A-Za-z])))", r"^{\1\2}"),
    (r"(?<![\\\w])(?<![\d)}] )(?<!\b[A-Za-z] )(?i:minus|negative) (?=[\d.$]|\\frac|\\sqrt)", "-"),
    (r"((?:[=≈:(\[,]|\b(?:is|are|was|be|equals?|get|gives?)) ?)- (?=[\d.$]|\\frac|\\sqrt)", r"\1-"),
    (r"\\frac(?![A-Za-z])" + ARGUMENT * 2, r"\\frac{\1\2}{\3\4}"),
]]
LATEX_MARK = re.compile(r"[\\^~√{°]|- |sqrt|minus|negative", re.IGNORECASE)


def plain(text: str) -> str:
    """One spelling of characters and LaTeX."""
    text = characters(text)
    if LATEX_MARK.search(text):
        for pattern, replacement in LATEX:
            text = pattern.sub(replacement or (lambda match: COMMANDS.get(match[1], match[0])), text)
    return text


WRAPPER = re.compile(r"\\(?:boxed|text) ?\{((?:[^{}]|\{[^{}]{0,200}\}){0,200})\}")
LEAD_IN = re.compile(r"^(?:the )?(?:final |correct )?answer(?: is:?|:) ?", re.IGNORECASE)
QUOTED = re.compile(r"""(["'])([^"']+)\1""")
IDLE_SPACE = re.compile(r"(?<![\w.,]) | (?![\w.,])")               # "x + 1" is "x+1", but "1. 5" is not "1.5"


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """The bare answer: no LaTeX, markdown or quotes around it, no "the answer is", no final period, no idle spaces."""
    text = plain(text)
    for _ in range(3 if "\\" in text else 0):                         # \boxed{\textbf{\text{B}}}
        text = WRAPPER.sub(r"\1", text)
    text = LEAD_IN.sub("", " ".join(text.split()).strip(" *`$:")).lstrip(" *`$:").rstrip(" *`$.")
    quoted = QUOTED.fullmatch(text)
    return IDLE_SPACE.sub("", quoted[2].strip(" .") if quoted else text)


# ---------------------------------------------------------------- numbers

MAX_DIGITS = 300                                   # 1e999999 would be a number of a million digits
SCALE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(
    r"([+-]?)[$€£¥]?(?:(\d+)(?: (?=\d+/\d)| ?(?=\\frac\{\d+\}\{\d)))?"  # sign, whole of 2 1/2
    rf"(?:\\sqrt\{{(\d+)\}}|\\frac\{{(-?(?:{DIGITS}))\}}\{{(-?(?:{DIGITS}))\}}|({DIGITS})(?: ?/ ?({DIGITS}))?)"
    r"(?:e([+-]?\d{1,3})(?![\d.])| ?(?:\\times|\\cdot|\*|x) ?10\^\{([+-]?\d{1,3})\}|\^\{([+-]?\d{1,3})\})?"
    rf"(?: ?({'|'.join(SCALE)})(?![A-Za-z]))?", re.IGNORECASE)
# In a sentence neither 2nd, nor the 5 of 3-5, nor that of x5, x_5 or x^5.
IN_TEXT = re.compile(rf"(?<![A-Za-z0-9_.,^])(?<!\d-)(?<![_^]\{{)(?<!\^\{{-){NUMBER.pattern}(?!\d|(?:st|nd|rd|th)\b)",
                     re.IGNORECASE)
SPACED = re.compile(r"^[+-]?\d{1,3}(?: \d{3})+(?![\d/])")           # 1 000 000

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: Fraction(i) for i, word in enumerate(ONES)} | {word: Fraction(10 * i) for i, word in enumerate(TENS, 2)}
WORDS |= {f"{ten}{dash}{one}": WORDS[ten] + WORDS[one] for ten in TENS for dash in " -" for one in ONES[1:10]}
# The longest first; neither the one nor the five of one hundred five, or of one hundred and five.
IN_WORDS = re.compile("".join(rf"(?<!{word} )" for word in ("and", *SCALE))
                      + rf"(?<![\w-])(?:{'|'.join(reversed(WORDS))})(?!-?\w| (?:{'|'.join(SCALE)}))", re.IGNORECASE)


def value_of(match: re.Match) -> Fraction | None:
    """The number of a match; None for one that is not exact, divides by 0 or is too large."""
    sign, whole, root, over, under, top, bottom, exponent, power_of_ten, power, scale = match.groups()
    top, bottom = (root or over or top).replace(",", ""), under or bottom
    exponent = int(exponent or power_of_ten or 0)
    if len(top) * max(1, abs(int(power or 1))) + len(bottom or "") + abs(exponent) > MAX_DIGITS:
        return None
    value = Fraction(math.isqrt(int(top)) if root else top)
    divisor = Fraction((bottom or "1").replace(",", ""))
    if root and value**2 != int(top) or not divisor or power and (bottom or not value):  # 1/2^{2} has two readings
        return None
    if power:
        value **= int(power)
    if bottom:
        value = int(whole or 0) + value / divisor
    if exponent or scale:
        value *= Fraction(10)**exponent * SCALE.get((scale or "").casefold(), 1)
    return -value if sign == "-" else value


def numbers(text: str) -> list[Fraction]:
    """The numbers in a plain text: 1,000, -3/4, 2 1/2, $5, 1.2*10^{3}, 2^{5}, 3.5 million."""
    return [value for value in map(value_of, IN_TEXT.finditer(text)) if value is not None]


def bare_number(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


# ---------------------------------------------------------------- units

# Dimension, then names and their factor to its base unit; each of the last two lines' has a dimension of its own. Any
# other word after a number is no unit: 7x, 7 or 8.
UNIT_TABLE = """
length  mm,millimeter,millimetre=1/1000 cm,centimeter,centimetre=1/100 m,meter,metre=1 km,kilometer,kilometre=1000
mass    mg=1/1000000 g,gram=1/1000 kg,kilogram=1
time    s,sec,second=1 min,minute=60 h,hr,hour=3600 day=86400 wk,week=604800
money   ¢,cent=1/100 dollar,$=1
-       %,percent=1/100 °,deg,degree=1 °C=1 °F=1 lb,pound,£=1 €,euro=1 yr,year=1 month=1 N,newton=1 L,liter,litre=1
-       mL,ml=1 in,inch,inches=1 ft,foot,feet=1 yd,yard=1 mi,mile=1 mph=1 object,item,unit,people=1
"""
UNITS = {name: (names if dimension == "-" else dimension, Fraction(factor))
         for dimension, *entries in map(str.split, UNIT_TABLE.strip().split("\n"))
         for names, factor in (entry.split("=") for entry in entries) for name in names.split(",")}
UNIT = re.compile(r"([^\d^]+?)(?:\^\{([1-3])\})?")


@lru_cache(maxsize=256)
def unit_of(text: str) -> tuple[tuple, Fraction] | None:
    """(dimension, factor) of `cm`, `meters`, `cm^{2}`, `square cm`, `km/h`; None when it is no known unit."""
    dimension, factor = (), Fraction(1)
    text = re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^{2}", re.sub(r"\bcubic (\w+)", r"\1^{3}", text))
    for i, part in enumerate(re.split("/| per ", text)):
        match = UNIT.fullmatch(part)
        name = match[1] if match else ""
        if name not in UNITS and len(name) > 2:                      # "ms" is not "m"
            name = name.casefold()
            name = name if name in UNITS else name.removesuffix("s")
        if name not in UNITS:
            return None
        power = int(match[2] or 1) * (-1 if i else 1)
        dimension += ((UNITS[name][0], power),)
        factor *= UNITS[name][1]**power
    return dimension, factor


@lru_cache(maxsize=4096)
def quantity(text: str) -> tuple[Fraction, tuple | None] | None:
    """(number, unit) of a clean `1,000`, `-3/4`, `1 1/2`, `1.2e3`, `seven` or `25 cm`; None when it is neither."""
    text = SPACED.sub(lambda spaced: spaced[0].replace(" ", ""), text)
    match = NUMBER.match(text) or IN_WORDS.match(text)
    number = None if match is None else value_of(match) if match.re is NUMBER else WORDS.get(match[0].casefold())
    if number is None or re.match(r"[+-]?0\d", text):                # 1 and 000 are 1,000 misread
        return None
    rest = text[match.end():].strip()
    if not rest or rest[0] == "(" and WORDS.get(rest.strip("()").casefold()) == number:  # 25 (twenty-five)
        currency = re.match(r"[+-]?([€£$])", text)
        return number, unit_of(currency[1]) if currency else None
    unit = unit_of(rest)
    return (number, unit) if unit else None


# ---------------------------------------------------------------- an answer section

MAX_CHARACTERS = 200                               # a longer text is no final answer
MAX_SECTION = 2000                                 # characters of an answer section that are read
LEFT_SIDE = re.compile(r"[A-Za-z\\_∠ ]{0,20}?[=∈≈] ?")


def said_lines(text: str) -> list[str]:
    r"""The lines that say something: neither a lone \[ or ** nor "The perimeter is:"."""
    lines = [line.rstrip() for line in text.split("\n") if clean(line[:MAX_CHARACTERS])]
    return [line for line in lines if not line.endswith((":", ":**"))]


def answer_line(section: str) -> str:
    """The first line of an answer section, when the others explain it: each has two words. Else all in one line, which
    is refused unless it is one answer. "" for a line that is too long to be an answer."""
    lines = said_lines(section[:MAX_SECTION]) if "\n" in section else [section]
    explained = all(len(re.findall(r"[^\W\d_]{2,}", line)) > 1 for line in lines[1:])
    answer = lines[0] if lines and explained else " ".join(lines)
    return answer if len(answer) <= MAX_CHARACTERS else ""


def without_left_side(text: str, other: str) -> str:
    """`x = 25` is 25 when the other says plain 25, or x as well; when both say what they give, both keep it."""
    match, others = LEFT_SIDE.match(text), LEFT_SIDE.match(other)
    return text[match.end():] if match and (not others or match[0] == others[0]) else text


# ---------------------------------------------------------------- numbers

TOLERANCE = Fraction(1, 10**6)                     # relative; two whole numbers must be equal
PERCENT = unit_of("%")


def close(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * abs(b)


def same_quantity(given: str, wanted: str) -> bool:
    """Equal numbers. Two units must agree, 25 cm is 0.25 m; one may be left out; 50% is 50 and 0.5."""
    a, b = quantity(given), quantity(wanted)
    if a is None or b is None:
        return False
    (number, unit), (wanted_number, wanted_unit) = a, b
    in_base_units = close(number * (unit[1] if unit else 1), wanted_number * (wanted_unit[1] if wanted_unit else 1))
    if unit and wanted_unit:
        return unit[0] == wanted_unit[0] and in_base_units
    return close(number, wanted_number) or in_base_units and PERCENT in (unit, wanted_unit)


# ---------------------------------------------------------------- texts and lists

LETTER_SET = re.compile("[A-H](?:(?:, ?| and | ?& ?)?[A-H])+")


def same_text(given: str, wanted: str) -> bool:
    if LETTER_SET.fullmatch(wanted) and LETTER_SET.fullmatch(given):     # several options: "A, C" is "AC"
        given, wanted = (re.sub("[^A-H]", "", text) for text in (given, wanted))
    if re.fullmatch(r"\d?\d:\d\d", wanted):                              # a time whose gold asks for no am or pm
        given = re.sub(r" ?[ap]\.?m$", "", given, flags=re.IGNORECASE)
    both_cases = (len(set(text.casefold())) < len(set(text)) and not re.search("[A-Za-z]{3}", text)
                  for text in (given, wanted))
    if "\\" in wanted or any(both_cases):                                # \Delta is not \delta, R-r not r-R
        return given == wanted
    return given.casefold() == wanted.casefold()


SEPARATOR = re.compile(r", ?(?:and|or) |[,;]| ?\band | ?\bor (?=[A-Za-z]=)")


def split_list(text: str) -> tuple[str, list[str]]:
    """Brackets and items of `(1, 2]`; square brackets for `1, 2` and `1 and 2`, none for a text that is no list."""
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    match = re.fullmatch(r"([{\[(])(.*)([}\])])", text)
    brackets, inside = (match[1] + match[3], match[2]) if match else ("[]" if SEPARATOR.search(text) else "", text)
    return brackets, [item.strip() for item in SEPARATOR.split(inside)]


def same(given: str, wanted: str) -> bool:
    """The same text, quantity or list: with the same brackets, and the same items in order, or in {} in any order."""
    given, wanted = without_left_side(given, wanted), without_left_side(wanted, given)
    if same_text(given, wanted) or same_quantity(given, wanted):
        return True
    (brackets, items), (wanted_brackets, wanted_items) = split_list(given), split_list(wanted)
    number = quantity(given) or quantity(wanted)                         # as 1,000 is
    if number or not brackets or brackets != wanted_brackets or len(items) != len(wanted_items):
        return False
    if brackets == "{}":
        items, wanted_items = sorted(items), sorted(wanted_items)
    return all(map(same, items, wanted_items))


# ---------------------------------------------------------------- letters, yes and no, and the check itself

LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
# The letter of an option, the text after it, and that text where only a space parts them.
LETTERED = re.compile(r"(?:(?:option|choice|answer|letter)(?: |(?=[(\[{]))|选项 ?)?[(\[{]?([A-Za-z])"
                      r"(?:[)\]}.:]+ ?(.*)| (\S.*))?", re.IGNORECASE)


def same_letter(given: str, letter: str, choices: tuple[str, ...]) -> bool:
    """The letter alone, the letter with a text that names no other option, or the text of the right option."""
    options = [clean(choice) for choice in choices]
    right = dict(zip(ascii_uppercase, options)).get(letter, "")
    match = LETTERED.fullmatch(given)
    if match is None or match[3]:
        return same(given, right)
    if match[1].upper() != letter or not match[2]:
        return match[1].upper() == letter
    named = re.findall(r"(?<![\w\\])(?:[A-H](?!\w)|[a-h][).])", match[2])
    others = any(name[0].upper() != letter for name in named) or any(same(match[2], option) for option in options)
    return same(match[2], right) or not others


def lettered(text: str) -> tuple[str, str]:
    """("B", "30°") of `B. 30°`, ("B", "") of `B`, and ("", the text) where no letter stands apart."""
    match = LETTERED.fullmatch(text)
    return (match[1], match[2] or "") if match and match[1].isupper() and not match[3] else ("", text)


def same_lettered(given: str, wanted: str) -> bool:
    """Without options: gold "B. 30°" or 30°, answered by B, B. 30° or 30°, but not by a letter with another text."""
    (letter, text), (wanted_letter, wanted_text) = lettered(given), lettered(wanted)
    if letter and wanted_letter and letter != wanted_letter:
        return False
    return same(text, wanted_text) if text else bool(letter and wanted_letter)


def same_yes_no(given: str, wanted: str) -> bool:
    """The first word decides, unless the other word follows; that there is no cube is not the other word."""
    words = re.findall("[a-z]+", re.sub(r"\b(is|are|was|were|has|have) no\b", r"\1", given.casefold()))
    return words[:1] == [wanted.casefold()] and not {"yes", "no"} <= set(words)


def correct(candidate: str | None, gold: str, choices: tuple[str, ...] = ()) -> bool:
    """True when candidate and gold say the same. choices: the options' texts; gold is a letter or one of them."""
    given, wanted = clean(answer_line(candidate or "")), clean(gold)
    if not given or not wanted:
        return False
    letter = LETTER.fullmatch(wanted)
    letters = [letter[1].upper()] if letter else [
        name for name, choice in zip(ascii_uppercase, choices) if clean(choice) == wanted]
    said = any(same_letter(given, each, choices) for each in letters)
    if letter or said:
        return said
    if wanted.casefold() in ("yes", "no"):
        return same_yes_no(given, wanted)
    return same(given, wanted) or not choices and same_lettered(given, wanted)


# ---------------------------------------------------------------- with algebra

def symbolic(gold: str) -> bool:
    """Whether a clean gold answer may need algebra: something combined with something, so neither a
    letter nor a name nor a number."""
    combined = re.search(r"[A-Za-z^]", gold) and re.search(r"[-+*/^(\d]|\\sqrt|\\frac", gold)
    return bool(combined) and not LETTER.fullmatch(gold) and quantity(gold) is None


def same_answer(answer: str | None, gold: str, choices: tuple[str, ...] = ()) -> bool:
    """True when the answer says what gold says, by the rules or else by algebra. None and "" are no answer."""
    if correct(answer, gold, choices):
        return True
    if not answer or not symbolic(clean(gold)):
        return False
    from grading.algebra import by_algebra         # it uses this file; and few gold answers need its process
    return by_algebra(answer, gold)
