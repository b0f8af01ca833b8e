r"""Whether two answers are the same.

    same_answer(answer, gold, choices)   True when the answer says what the gold answer says: the rules, then algebra
    correct(candidate, gold, choices)    the rules of this file alone

`correct` is pure and never raises on model text. It fails closed: two answers, no answer, or anything it does not
understand is wrong, because a policy soon finds whatever is rewarded by mistake. What it understands:

    letter      gold "B":            B   (b)   B.   **B**   Option B   (B) 30°   and the text of option B
    option      gold "30°":          its text, as below, or the letter of an option with this text
    yes / no    gold "Yes":          yes   Yes.   yes, it is
    text        gold "red cube":     Red cube   red cube.   \boxed{\text{red cube}}
    list        gold "[1, 2]":       [1,2]   1, 2                order and brackets count; {2, 1} is {1, 2}
    number      gold "0.5":          1/2   \frac{1}{2}   .50   5*10^{-1}   50%   0.5 cm   x = 0.5

Numbers are exact fractions. That \sqrt{8} is 2\sqrt{2}, or x^2+2x+1 is (x+1)^2, is beyond the rules: `same_answer`
then asks algebra.py, if the gold answer is symbolic.
"""
import re
from fractions import Fraction


# ---------------------------------------------------------------- one spelling

SPELLING = {                                       # applied in this order
    "−": "-", "–": "-", "×": r"\times ", "π": r"\pi ", "∈": r"\in ", "≈": r"\approx ", "²": "^2", "³": "^3",
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\left": "", r"\right": "", r"\(": "", r"\)": "", r"\[": "", r"\]": "",
    r"^{\circ}": "°", r"^\circ": "°", r"\%": "%", r"\$": "$", r"\,": " ", "{,}": ",", "√{": r"\sqrt{",
}
ROOT = re.compile(r"√(\d+)")
FRACTION = re.compile(r"\\frac\{(-?[\d.,]+)\}\{([\d.,]+)\}")
WRAPPER = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf)\{((?:[^{}]|\{[^{}]*\})*)\}")
LEAD_IN = re.compile(r"^(?:the )?(?:final |correct )?answer(?: is:?|:) ?", re.IGNORECASE)
LEFT_SIDE = re.compile(r"[A-Za-z\\_∠ ]{0,20}?(?:=|\\in(?![a-z])|\\approx(?![a-z])) ?")


def clean(text: str) -> str:
    """The bare answer: no LaTeX or markdown around it, no "the answer is", no final period, no idle spaces."""
    for typed, plain in SPELLING.items():
        text = text.replace(typed, plain)
    text = FRACTION.sub(r" \1/\2 ", ROOT.sub(r"\\sqrt{\1}", text))       # spaces keep 1\frac{1}{2} from being 11/2
    text = WRAPPER.sub(r"\1", WRAPPER.sub(r"\1", text))                  # twice, for \boxed{\text{B}}
    text = LEAD_IN.sub("", " ".join(text.split()).strip(" *`$"))
    text = text.lstrip(" *`$").rstrip(" *`$.")
    return re.sub(r"(?<![\w.,]) | (?![\w.,])", "", text)                 # "x + 1" is "x+1", but "1. 5" is not "1.5"


def without_left_side(text: str, other: str) -> str:
    """`x = 25` is 25 when the other says plain 25; when both say what they give, both keep it."""
    match = LEFT_SIDE.match(text)
    return text[match.end():] if match and not LEFT_SIDE.match(other) else text


# ---------------------------------------------------------------- numbers and units

MAX_CHARACTERS = 200                               # a longer text is no final answer
MAX_EXPONENT = 300                                 # 1e999999 would be a number of a million digits
TOLERANCE = Fraction(1, 10**6)                     # relative; two whole numbers must be equal

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(
    rf"([+-]?)(?:(\d+) )?({DECIMAL})(?:/({DECIMAL}))?"                   # sign, whole of 1 1/2, top, bottom
    r"(?:e([+-]?\d{1,3})| ?(?:\\times|\\cdot|\*|x) ?10\^\{?([+-]?\d{1,3})\}?)?", re.IGNORECASE)

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: value for value, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, 2)}
WORDS |= {f"{ten}-{one}": WORDS[ten] + WORDS[one] for ten in TENS for one in ONES[1:10]}

# Dimension, factor to its base unit, names. Any other word after a number is no unit: 7 million, 7x, 7 or 8.
UNIT_TABLE = [
    ("length", "1/1000", "mm millimeter millimetre"),
    ("length", "1/100", "cm centimeter centimetre"),
    ("length", "1", "m meter metre"),
    ("length", "1000", "km kilometer kilometre"),
    ("length", "127/5000", "in inch inches"),
    ("length", "381/1250", "ft foot feet"),
    ("mass", "1/1000", "g gram"),
    ("mass", "1", "kg kilogram"),
    ("time", "1", "s sec second"),
    ("time", "60", "min minute"),
    ("time", "3600", "h hr hour"),
    ("time", "86400", "day"),
    ("years", "1", "yr year"),
    ("angle", "1", "° deg degree"),
    ("heat", "1", "°C"),
    ("money", "1/100", "¢ cent"),
    ("money", "1", "dollar"),
    ("share", "1/100", "% percent"),
    ("count", "1", "object item unit people"),
]
UNITS = {name: (dimension, Fraction(factor)) for dimension, factor, names in UNIT_TABLE for name in names.split()}


def unit_of(text: str) -> tuple[str, Fraction] | None:
    """(dimension, factor) of `cm`, `meters`, `cm^2` or `square cm`; None when it is no known unit."""
    match = re.fullmatch(r"(square |cubic )?(\D+?)(?:\^\{?([23])\}?)?", text)
    if match is None:
        return None
    name = match[2] if match[2] in UNITS else match[2].casefold()
    if name not in UNITS and len(name) > 3:                              # "ms" is not "m"
        name = name.removesuffix("s")
    if name not in UNITS:
        return None
    power = {"square ": 2, "cubic ": 3}.get(match[1]) or int(match[3] or 1)
    dimension, factor = UNITS[name]
    return f"{dimension}^{power}", factor**power


def quantity(text: str) -> tuple[Fraction, tuple[str, Fraction] | None] | None:
    """(number, unit) of `1,000`, `-3/4`, `1 1/2`, `1.2e3`, `3*10^{-4}`, `seven` or `25 cm`; None when it is neither."""
    if text.casefold() in WORDS:
        return Fraction(WORDS[text.casefold()]), None
    match = NUMBER.match(text)
    if match is None or len(text) > MAX_CHARACTERS:
        return None
    sign, whole, top, bottom, exponent, power_of_ten = match.groups()
    exponent = int(exponent or power_of_ten or 0)
    top, bottom_value = Fraction(top.replace(",", "")), Fraction((bottom or "1").replace(",", ""))
    if abs(exponent) > MAX_EXPONENT or bottom_value == 0 or whole and not bottom:
        return None
    number = (int(whole or 0) + top / bottom_value) * Fraction(10)**exponent
    number = -number if sign == "-" else number
    rest = text[match.end():].strip()
    if not rest or WORDS.get(rest.strip("()").casefold()) == number:     # 25 (twenty-five)
        return number, None
    unit = unit_of(rest)
    return (number, unit) if unit else None


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
    return close(number, wanted_number) or in_base_units and unit_of("%") in (unit, wanted_unit)


# ---------------------------------------------------------------- texts and lists


def either_case(text: str) -> bool:
    """Whether a symbol stands there in both cases, R-r or Aa, and no word does."""
    return len(set(text.casefold())) < len(set(text)) and not re.search("[A-Za-z]{3}", text)


def same_text(given: str, wanted: str) -> bool:
    if re.fullmatch("[A-H]{2,}", wanted):                                # several options: "A, C" is "AC"
        given = re.sub("[, ]", "", given)
    if re.fullmatch(r"\d?\d:\d\d", wanted):                              # a time whose gold asks for no am or pm
        given = re.sub(r" ?[ap]\.?m$", "", given, flags=re.IGNORECASE)
    if "\\" in wanted or either_case(given) or either_case(wanted):      # \Delta is not \delta, R-r not r-R
        return given == wanted
    return given.casefold() == wanted.casefold()


def split_list(text: str) -> tuple[str, list[str]]:
    """Brackets and items of `(1, 2]`; square brackets for `1, 2`, and none for a text that is no list."""
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    match = re.fullmatch(r"([{\[(])(.*)([}\])])", text)
    brackets, inside = (match[1] + match[3], match[2]) if match else ("[]" if "," in text else "", text)
    return brackets, [item.strip() for item in inside.split(",")]


def same_list(given: str, wanted: str) -> bool:
    """Item by item, in order, in the same brackets: [1, 3] is not (1, 3). In {} the order is free."""
    if quantity(given) or quantity(wanted):                              # 1,000 is a number
        return False
    (brackets, items), (wanted_brackets, wanted_items) = split_list(given), split_list(wanted)
    if not brackets or brackets != wanted_brackets or len(items) != len(wanted_items):
        return False
    if brackets == "{}":
        items, wanted_items = sorted(items), sorted(wanted_items)
    return all(same_text(a, b) or same_quantity(a, b) for a, b in zip(items, wanted_items))


def same(given: str, wanted: str) -> bool:
    given, wanted = without_left_side(given, wanted), without_left_side(wanted, given)
    return same_text(given, wanted) or same_list(given, wanted) or same_quantity(given, wanted)


# ---------------------------------------------------------------- letters, yes and no, and the check itself

LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
OPTION = re.compile(r"(?:option|choice)? ?[(\[]?([A-Za-z])(?:[)\].:]+ ?(.*))?", re.IGNORECASE)     # letter, text


def same_letter(given: str, letter: str, choices: tuple[str, ...]) -> bool:
    """The letter alone, the letter with a text that names no other option, or the text of the right option."""
    options = [clean(choice) for choice in choices]
    index = ord(letter) - ord("A")
    right = options[index] if index < len(options) else None
    match = OPTION.fullmatch(given)
    if match is None:
        return right is not None and same(given, right)
    text = match[2]
    if match[1].upper() != letter:
        return False
    if not text or right is not None and same(text, right):
        return True
    named = re.findall(r"(?<![\w\\])(?:[A-H](?!\w)|[a-h][).])", text)
    return all(name[0].upper() == letter for name in named) and not any(same(text, option) for option in options)


def same_yes_no(given: str, wanted: str) -> bool:
    """The first word decides, unless the other word follows."""
    words = re.findall("[a-z]+", given.casefold())
    return words[:1] == [wanted.casefold()] and not {"yes", "no"} <= set(words)


def correct(candidate: str | None, gold: str, choices: tuple[str, ...] = ()) -> bool:
    """True when candidate and gold say the same. choices: the options' texts; gold is a letter or one of them."""
    if not candidate or len(candidate) > MAX_CHARACTERS:
        return False
    given, wanted = clean(candidate), clean(gold)
    if not given or not wanted:
        return False
    letter = LETTER.fullmatch(wanted)
    if letter:
        return same_letter(given, letter[1].upper(), choices)
    letters = [chr(ord("A") + i) for i, choice in enumerate(choices) if clean(choice) == wanted]
    if any(same_letter(given, letter, choices) for letter in letters):
        return True
    if wanted.casefold() in ("yes", "no"):
        return same_yes_no(given, wanted)
    return same(given, wanted)


# ---------------------------------------------------------------- with algebra


def bare(text: str) -> str:
    r"""The spelling of `clean`, but with \frac{1}{2} left as it is: written as 1/2, 1/2x would have two readings."""
    return clean(text.replace("frac{", "frac {"))


def symbolic(gold: str) -> bool:
    """Whether a gold answer, spelled by `bare`, may need algebra: something combined with something, so neither a
    letter nor a name nor a number."""
    combined = re.search(r"[A-Za-z^]", gold) and re.search(r"[-+*/^(\d]|\\sqrt|\\frac", gold)
    return bool(combined) and not LETTER.fullmatch(gold) and quantity(clean(gold)) is None


def same_answer(answer: str | None, gold: str, choices: tuple[str, ...] = ()) -> bool:
    """True when the answer says what gold says, by the rules or else by algebra. None and "" are no answer."""
    if correct(answer, gold, choices):
        return True
    if not answer or not symbolic(bare(gold)):
        return False
    from grading.algebra import process_grader     # it uses this file; and few gold answers need its process
    return process_grader("own").by_algebra(answer, gold)
