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

from grading.spelling import clean, number_and_rest, quantity, unit_of


MAX_CHARACTERS = 200                               # a longer text is no final answer
MAX_SECTION = 2000                                 # characters of an answer section that are read
LEFT_SIDE = re.compile(r"[A-Za-z\\_∠ ]{0,20}?[=∈≈] ?")


def said_lines(text: str) -> list[str]:
    r"""The lines that say something: neither a lone \[ or ** nor "The perimeter is:"."""
    return [line for line in text.split("\n") if clean(line) and not line.rstrip().endswith((":", ":**"))]


def answer_line(section: str) -> str:
    """The first line of an answer section, when the others explain it: each has two words. Else all in one line, which
    is refused unless it is one answer. "" for a line that is too long to be an answer."""
    lines = said_lines(section[:MAX_SECTION]) if "\n" in section else [section]
    explained = all(len(re.findall(r"[^\W\d_]{2,}", line)) > 1 for line in lines[1:])
    answer = lines[0] if lines and explained else " ".join(lines)
    return answer if len(answer) <= MAX_CHARACTERS else ""


def without_left_side(text: str, other: str) -> str:
    """`x = 25` is 25 when the other says plain 25; when both say what they give, both keep it."""
    match = LEFT_SIDE.match(text)
    return text[match.end():] if match and not LEFT_SIDE.match(other) else text


# ---------------------------------------------------------------- numbers

TOLERANCE = Fraction(1, 10**6)                     # relative; two whole numbers must be equal
PERCENT = unit_of("%")


def close(a: Fraction, b: Fraction) -> bool:
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= TOLERANCE * abs(b)


def same_quantity(given: str, wanted: str) -> bool:
    """Equal numbers. Two units must agree, 25 cm is 0.25 m; one may be left out; 50% is 50 and 0.5. Of what is no known
    unit, as in 7 apples, both must say the same."""
    a, b = quantity(given), quantity(wanted)
    if a is None or b is None:
        a, b = number_and_rest(given), number_and_rest(wanted)
        words = a and b and a[1].casefold() == b[1].casefold() and re.fullmatch("[A-Za-z]{2}[A-Za-z ]*", a[1])
        return bool(words) and close(a[0], b[0])
    (number, unit), (wanted_number, wanted_unit) = a, b
    in_base_units = close(number * (unit[1] if unit else 1), wanted_number * (wanted_unit[1] if wanted_unit else 1))
    if unit and wanted_unit:
        return unit[0] == wanted_unit[0] and in_base_units
    return close(number, wanted_number) or in_base_units and PERCENT in (unit, wanted_unit)


# ---------------------------------------------------------------- texts and lists


def either_case(text: str) -> bool:
    """Whether a symbol stands there in both cases, R-r or Aa, and no word does."""
    return len(set(text.casefold())) < len(set(text)) and not re.search("[A-Za-z]{3}", text)


LETTER_SET = re.compile("[A-H](?:(?:, ?| and | ?& ?)?[A-H])+")


def same_text(given: str, wanted: str) -> bool:
    if LETTER_SET.fullmatch(wanted) and LETTER_SET.fullmatch(given):     # several options: "A, C" is "AC"
        given, wanted = (re.sub("[^A-H]", "", text) for text in (given, wanted))
    if re.fullmatch(r"\d?\d:\d\d", wanted):                              # a time whose gold asks for no am or pm
        given = re.sub(r" ?[ap]\.?m$", "", given, flags=re.IGNORECASE)
    if "\\" in wanted or either_case(given) or either_case(wanted):      # \Delta is not \delta, R-r not r-R
        return given == wanted
    return given.casefold() == wanted.casefold()


SEPARATOR = re.compile(", ?(?:and|or) |[,;]| and | or ")


def split_list(text: str) -> tuple[str, list[str]]:
    """Brackets and items of `(1, 2]`; square brackets for `1, 2` and `1 and 2`, none for a text that is no list."""
    text = text.replace(r"\{", "{").replace(r"\}", "}")
    match = re.fullmatch(r"([{\[(])(.*)([}\])])", text)
    brackets, inside = (match[1] + match[3], match[2]) if match else ("[]" if SEPARATOR.search(text) else "", text)
    return brackets, [item.strip() for item in SEPARATOR.split(inside)]


def paired_items(given: str, wanted: str) -> list[tuple[str, str]]:
    """The items of two lists with the same brackets and length, in order; in {} the order is free. [] for anything
    else: [1, 3] is not (1, 3), and 1,000 is a number."""
    if quantity(given) or quantity(wanted):
        return []
    (brackets, items), (wanted_brackets, wanted_items) = split_list(given), split_list(wanted)
    if not brackets or brackets != wanted_brackets or len(items) != len(wanted_items):
        return []
    if brackets == "{}":
        items, wanted_items = sorted(items), sorted(wanted_items)
    return [(without_left_side(a, b), without_left_side(b, a)) for a, b in zip(items, wanted_items)]


def same_list(given: str, wanted: str) -> bool:
    pairs = paired_items(given, wanted)
    return bool(pairs) and all(same_text(a, b) or same_quantity(a, b) for a, b in pairs)


def same(given: str, wanted: str) -> bool:
    given, wanted = without_left_side(given, wanted), without_left_side(wanted, given)
    return same_text(given, wanted) or same_list(given, wanted) or same_quantity(given, wanted)


# ---------------------------------------------------------------- letters, yes and no, and the check itself

LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?")
# The letter of an option, the text after it, and that text where only a space parts them.
LETTERED = re.compile(r"(?:(?:option|choice|answer|letter)(?: |(?=[(\[{]))|选项 ?)?[(\[{]?([A-Za-z])"
                      r"(?:[)\]}.:]+ ?(.*)| (\S.*))?", re.IGNORECASE)


def same_letter(given: str, letter: str, choices: tuple[str, ...]) -> bool:
    """The letter alone, the letter with a text that names no other option, or the text of the right option."""
    options = [clean(choice) for choice in choices]
    index = ord(letter) - ord("A")
    right = options[index] if index < len(options) else None
    match = LETTERED.fullmatch(given)
    if match is None or match[3]:
        return right is not None and same(given, right)
    text = match[2]
    if match[1].upper() != letter:
        return False
    if not text or right is not None and same(text, right):
        return True
    named = re.findall(r"(?<![\w\\])(?:[A-H](?!\w)|[a-h][).])", text)
    return all(name[0].upper() == letter for name in named) and not any(same(text, option) for option in options)


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
    if letter:
        return same_letter(given, letter[1].upper(), choices)
    letters = [chr(ord("A") + i) for i, choice in enumerate(choices) if clean(choice) == wanted]
    if any(same_letter(given, letter, choices) for letter in letters):
        return True
    if wanted.casefold() in ("yes", "no"):
        return same_yes_no(given, wanted)
    return same(given, wanted) or not choices and same_lettered(given, wanted)


# ---------------------------------------------------------------- with algebra


def bare(text: str) -> str:
    r"""The spelling of `clean`, but with \frac{1}{2} left as it is: written as 1/2, 1/2x would have two readings."""
    return clean(text, fractions=False)


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
