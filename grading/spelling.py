r"""One spelling of what models write, and the numbers in it: the reward and the evaluation read with this file.

    plain("（ｘ＝½）")               "(x= 1/2 )"            a response or a part of it: its lines and markdown stay
    clean(r"$\boxed{-\frac34}$.")    "-3/4"                 a short answer, bare
    quantity("25 cm")                (25, unit)             the number that a clean text is, None when it is none
    numbers("2 of 1,000, or 10^3")   [2, 1000, 1000]        the numbers in a plain text

Numbers are exact fractions. Every pattern is bounded, so all of this takes linear time. latex2sympy2_extended's
normaliser is not used: it takes "7 or 8" for a list, the "inf" of "information" for infinity, and quotes for nothing.
"""
import math
import re
import unicodedata
from collections import Counter
from fractions import Fraction
from functools import lru_cache


MAX_TEXT = 40_000                                  # characters of a response that are read: over 4096 tokens


def cut(text: str) -> str:
    """The first quarter and the last three quarters of what is read of a text: whoever reads responses begins here."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT // 4] + "\n" + text[-MAX_TEXT * 3 // 4 :]


# ---------------------------------------------------------------- characters

# Where NFKC says nothing, or something else: dashes, quotes, products, and the signs that end a Chinese sentence.
TYPED = {"-": "‐‑‒–—―−﹣－", "'": "‘’‚´ʼ′", '"': "“”„«»", r"\times ": "×", r"\cdot ": "·⋅∙•", r"\div ": "÷", "*": "∗＊",
         "/": "∕", "≤": "≦⩽", "≥": "≧⩾", r"\Delta ": "∆", "°": "º˚", ". ": "。｡", ", ": "、", "! ": "！",
         "? ": "？", "; ": "；", "": "\u034f\u115f\u1160\u2800\u3164\uffa0"}


def spelled_character(character: str) -> str:
    r"""In ASCII or LaTeX where there is one: ² as ^{2}, ½ as 1/2, θ as \theta. Invisible ones and half surrogates are
    none and U+FFFD."""
    category, kind = unicodedata.category(character), unicodedata.decomposition(character).split(" ")[0]
    compatible = unicodedata.normalize("NFKC", character)
    greek = re.fullmatch("GREEK (SMALL|CAPITAL) LETTER ([A-Z]+)", unicodedata.name(compatible[0], ""))
    if category in ("Cf", "Cs") or "\ufe00" <= character <= "\ufe0f":
        return "" if category != "Cs" else "\ufffd"
    if greek:
        name = greek[2].lower().replace("lamda", "lambda")
        return "\\" + (name.capitalize() if greek[1] == "CAPITAL" else name) + " "
    if kind == "<super>" and re.fullmatch(r"[\d+−n]", compatible):
        return "^{" + compatible.replace("−", "-") + "}"
    return " " + compatible.replace("⁄", "/") + " " if kind == "<fraction>" else compatible


CODES = (*range(0x80, 0x600), *range(0x1F00, 0x3100), *range(0xD800, 0xE000), *range(0xFE00, 0x10000),
         *range(0xE0000, 0xE0080))
CHARACTERS = {code: spelled_character(chr(code)) for code in CODES}
CHARACTERS |= {ord(character): text for text, characters in TYPED.items() for character in characters}
CHARACTERS[ord("…")], CHARACTERS[ord("№")] = "...", "No."


def characters(text: str) -> str:
    """One spelling of characters, composed, without the invisible ones."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text.translate(CHARACTERS)).replace("}^{", "")


# ---------------------------------------------------------------- LaTeX

COMMANDS = {                                       # what is written instead of a command
    "": "left right big Big bigl bigr displaystyle limits ! ( ) [ ]", " ": "quad qquad , ; : \\ \n",
    "°": "circ degree deg",
    "≤": "le leq leqslant", "≥": "ge geq geqslant", "≠": "ne neq", "±": "pm", "∠": "angle", "△": "triangle",
    "∞": "infty", "∪": "cup", "∩": "cap", "∈": "in", "≈": "approx", "→": "to rightarrow", "...": "ldots dots cdots",
    r"\frac": "dfrac tfrac cfrac", r"\boxed": "fbox", r"\{": "lbrace", r"\}": "rbrace",
    r"\phi ": "varphi", r"\epsilon ": "varepsilon",
    r"\text": "textrm textbf textit textsf texttt textnormal mathrm mathbf mathit mathsf mbox hbox operatorname "
              "underline emph",
}
COMMANDS = {name: text for text, names in COMMANDS.items() for name in names.split(" ")}
COMMANDS |= {" ": " "} | {escaped: escaped for escaped in "%$#&_"}
COMMAND = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
NUMERIC = re.compile(r"-?[\d.,]+")
ARGUMENT = r" ?(?:\{ ?([^{}]{0,60}?) ?\}|(\d))"
FRACTION = re.compile(r"((?<![\w)}])(?<![\w)}] )- ?)?\\frac(?![A-Za-z])" + ARGUMENT * 2)
LATEX = [(re.compile(pattern), text) for pattern, text in [         # in this order
    (r"\{\\(?:bf|it|rm|sf|tt|em) ([^{}]{0,60})\}", r"\1"), (COMMAND.pattern, None), (r"\{\}|~", " "),
    (r"\{,\}", ","), (r"\^(?:°|\{°\})|(?:\* ?| )°", "°"), (r"\\boxed ?(-?[\w.]+)", r"\\boxed{\1}"),
    (r"√ ?(\d+)|(?:√|\\?(?<![A-Za-z])sqrt) ?\(([^()]{0,60})\)|\\sqrt ?(\d)(?!\d)", r"\\sqrt{\1\2\3}"),
    (r"√ ?\{", r"\\sqrt{"),
    (r"\^ ?(?:\(([^()]{0,60})\)|([+-]?\d+|[A-Za-z](?![A-Za-z])))", r"^{\1\2}"),
    (r"(?<![\\\w])(?<![\d)}] )(?<!\b[A-Za-z] )(?i:minus|negative) (?=[\d.$]|\\frac|\\sqrt)", "-"),
    (r"((?:[=≈:(\[,]|\b(?:is|are|was|be|equals?|get|gives?)) ?)- (?=[\d.$]|\\frac|\\sqrt)", r"\1-"),
]]

LATEX_MARK = re.compile(r"[\\^~√{°]|- |sqrt|minus|negative", re.IGNORECASE)


def braced(match: re.Match) -> str:
    """Any spelling of a fraction as \\frac{1}{2}."""
    top, bottom = (match[i] if match[i] is not None else match[i + 1] for i in (2, 4))
    return rf"{match[1] or ''}\frac{{{top}}}{{{bottom}}}"


def fraction(match: re.Match) -> str:
    r"""\frac34 as 3/4, with the sign in front: \frac{3}{-4} is -3/4. Spaces keep 1\frac{1}{2} from being 11/2."""
    top, bottom = (match[i] if match[i] is not None else match[i + 1] for i in (2, 4))
    if not NUMERIC.fullmatch(top) or not NUMERIC.fullmatch(bottom):
        return braced(match)
    minus = "-" * ((bool(match[1]) + top.count("-") + bottom.count("-")) % 2)
    return f" {minus}{top.lstrip('-')}/{bottom.lstrip('-')} "


def plain(text: str, fractions: bool = True) -> str:
    r"""One spelling of characters and LaTeX. fractions: \frac{1}{2} becomes 1/2."""
    text = characters(text)
    if LATEX_MARK.search(text):
        for pattern, replacement in LATEX:
            text = pattern.sub(replacement or (lambda match: COMMANDS.get(match[1], match[0])), text)
        text = FRACTION.sub(fraction if fractions else braced, text) if "\\frac" in text else text
    return text


WRAPPER = re.compile(r"\\(?:boxed|text) ?\{((?:[^{}]|\{[^{}]{0,200}\}){0,200})\}")
LEAD_IN = re.compile(r"(?:the )?(?:final |correct )?answer(?: is:?|:) ?", re.IGNORECASE)
QUOTED = re.compile(r"""(["'])([^"']+)\1""")
IDLE_SPACE = re.compile(r"(?<![\w.,]) | (?![\w.,])")               # "x + 1" is "x+1", but "1. 5" is not "1.5"


@lru_cache(maxsize=4096)
def clean(text: str, fractions: bool = True) -> str:
    """The bare answer: no LaTeX, markdown or quotes around it, no "the answer is", no final period, no idle spaces."""
    text = plain(text, fractions)
    for _ in range(3 if "\\" in text else 0):                         # \boxed{\textbf{\text{B}}}
        text = WRAPPER.sub(r"\1", text)
    text = " ".join(text.split()).strip(" *`$:")
    lead = LEAD_IN.match(text)
    text = text[lead.end() if lead else 0:].lstrip(" *`$:").rstrip(" *`$.")
    quoted = QUOTED.fullmatch(text)
    return IDLE_SPACE.sub("", quoted[2].strip(" .") if quoted else text)


# ---------------------------------------------------------------- numbers

MAX_DIGITS = 300                                   # 1e999999 would be a number of a million digits
SCALE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(
    rf"([+-]?)[$€£¥]?(?:(\d+) (?=\d+/\d))?(?:\\sqrt\{{(\d+)\}}|({DIGITS}))"      # sign, whole of 2 1/2, root or top
    rf"(?: ?/ ?({DIGITS}))?"
    r"(?:e([+-]?\d{1,3})(?![\d.])| ?(?:\\times|\\cdot|\*|x) ?10\^\{([+-]?\d{1,3})\}|\^\{([+-]?\d{1,3})\})?"
    rf"(?: ?({'|'.join(SCALE)})(?![A-Za-z]))?", re.IGNORECASE)
# In a sentence neither 2nd, nor the 5 of 3-5, nor that of x5, x_5 or x^5.
IN_TEXT = re.compile(rf"(?<![A-Za-z0-9_.,^])(?<!\d-)(?<![_^]\{{)(?<!\^\{{-){NUMBER.pattern}(?!\d|(?:st|nd|rd|th)\b)",
                     re.IGNORECASE)
SPACED = re.compile(r"[+-]?\d{1,3}(?: \d{3})+(?![\d/])")           # 1 000 000

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: value for value, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, 2)}
WORDS |= {f"{ten} {one}": WORDS[ten] + WORDS[one] for ten in TENS for one in ONES[1:10]}
WORDS |= {f"{one} hundred {rest}".strip(): 100 * WORDS[one] + WORDS.get(rest, 0)
          for one in ONES[1:10] for rest in ("", *WORDS)}
WORD = rf"(?:{'|'.join(ONES[::-1] + TENS + list(SCALE))})\b"
IN_WORDS = re.compile(rf"(?<![\w-]){WORD}(?:(?:[- ]| and ){WORD})*(?!-?\w)", re.IGNORECASE)


def in_words(text: str) -> Fraction | None:
    """The number of `seven`, `twenty-five` or `two thousand one hundred and five`."""
    text, value = text.casefold().replace("-", " ").replace(" and ", " "), 0
    for scale in list(SCALE)[:0:-1]:
        more, found, rest = text.partition(" " + scale)
        if found and more in WORDS:
            value, text = value + WORDS[more] * SCALE[scale], rest.strip()
    return Fraction(value + WORDS.get(text, 0)) if text in WORDS or value and not text else None


def value_of(match: re.Match) -> Fraction | None:
    """The number of a match; None for one that is not exact, divides by 0 or is too large."""
    sign, whole, root, top, bottom, exponent, power_of_ten, power, scale = match.groups()
    top, exponent = (root or top).replace(",", ""), int(exponent or power_of_ten or 0)
    if len(top) * max(1, abs(int(power or 1))) + len(bottom or "") + abs(exponent) > MAX_DIGITS:
        return None
    value, divisor = Fraction(top), Fraction((bottom or "1").replace(",", ""))
    if root:
        value = Fraction(math.isqrt(int(top)))
    inexact = root and value**2 != int(top)
    if inexact or not divisor or power and (bottom or not value):  # 1/2^{2} has two readings
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

# Dimension, then names and their factor to its base unit. Any other word after a number is no unit: 7x, 7 or 8.
UNIT_TABLE = """
length  mm,millimeter,millimetre=1/1000 cm,centimeter,centimetre=1/100 m,meter,metre=1 km,kilometer,kilometre=1000
length  in,inch,inches=127/5000 ft,foot,feet=381/1250 yd,yard=1143/1250 mi,mile=201168/125
mass    mg=1/1000000 g,gram=1/1000 kg,kilogram=1
pound   lb,lbs,pound,£=1
time    s,sec,second=1 min,minute=60 h,hr,hour=3600 day=86400 wk,week=604800
years   yr,year=1
months  month=1
angle   °,deg,degree=1
celsius °C=1
fahrenheit °F=1
money   ¢,cent=1/100 dollar,$=1
euro    €,euro=1
volume  mL,ml,milliliter,millilitre=1/1000 L,liter,litre=1
force   N,newton=1
share   %,percent=1/100
count   object,item,unit,people=1
"""
UNITS = {name: (line.split()[0], Fraction(factor)) for line in UNIT_TABLE.strip().split("\n")
         for names, factor in (entry.split("=") for entry in line.split()[1:]) for name in names.split(",")}
UNIT = re.compile(r"(square |cubic |sq\.? |cu\.? )?([^\d^]+?)(?:\^\{([1-3])\})?")


@lru_cache(maxsize=256)
def unit_of(text: str) -> tuple[tuple, Fraction] | None:
    """(dimension, factor) of `cm`, `meters`, `cm^{2}`, `square cm`, `km/h`; None when it is no known unit."""
    dimension, factor = Counter(), Fraction(1)
    for i, part in enumerate(re.split("/| per ", {"mph": "mi/h", "kmh": "km/h"}.get(text, text))):
        match = UNIT.fullmatch(part)
        name = match[2] if match else ""
        name = next((known for known in (name, name.casefold(), name.casefold().removesuffix("s"))
                     if known in UNITS and (known == name or len(name) > 2)), None)            # "ms" is not "m"
        if name is None:
            return None
        power = ({"s": 2, "c": 3}.get((match[1] or "-")[0]) or int(match[3] or 1)) * (-1 if i else 1)
        dimension[UNITS[name][0]] += power
        factor *= UNITS[name][1]**power
    return tuple(dimension.items()), factor


def number_and_rest(text: str) -> tuple[Fraction, str] | None:
    """(number, what follows it) of a clean text that begins with one."""
    spaced = SPACED.match(text)
    text = spaced[0].replace(" ", "") + text[spaced.end():] if spaced else text
    match = NUMBER.match(text)
    value = value_of(match) if match else None
    if match is None and (match := IN_WORDS.match(text.removeprefix("-"))):
        value, minus, text = in_words(match[0]), text[0] == "-", text.removeprefix("-")
        value = -value if minus and value is not None else value
    if value is None or re.match(r"[+-]?0\d", text):                 # 1 and 000 are 1,000 misread
        return None
    return value, text[match.end():].strip()


@lru_cache(maxsize=4096)
def quantity(text: str) -> tuple[Fraction, tuple | None] | None:
    """(number, unit) of a clean `1,000`, `-3/4`, `1 1/2`, `1.2e3`, `seven` or `25 cm`; None when it is neither."""
    found = number_and_rest(text)
    if found is None:
        return None
    number, rest = found
    if not rest or in_words(rest.strip("()")) == number:             # 25 (twenty-five)
        currency = re.match(r"[+-]?([€£$])", text)
        return number, unit_of(currency[1]) if currency else None
    unit = unit_of(rest)
    return (number, unit) if unit else None
