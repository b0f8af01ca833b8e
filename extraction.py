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


# ---------------------------------------------------------------- numbers

NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,])(?<!\d-)([+-]?)[$€£¥]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"        # sign, digits
    r"(?:/(\d+(?:\.\d+)?)(?![\d/]))?(?:e([+-]?\d{1,2})\b| ?(?:×|\*|\\times|x) ?10\^\{?([+-]?\d{1,2})\}?)?"  # bottom, power
    r"(?!(?:st|nd|rd|th)\b)(?: (million|billion|thousand)\b)?", re.IGNORECASE)
SCALE = {"thousand": 1000, "million": 10**6, "billion": 10**9}
BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")
STATES = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|gives?|get|have|has|of)\b|[:为是])[^\w-]{0,4}"
    r"(?:(?:also|still|then|about|around|approximately|exactly|roughly|nearly|only|just|likely|estimated|equal|at|to) ){0,3}"
    r"(?=\W{0,3}\d)", re.IGNORECASE)
ASKS_YEAR = re.compile(r"\b(?:which|what) years?\b|\bwhen\b|哪一?年", re.IGNORECASE)


def numbers(text: str) -> list[Fraction]:
    """The numbers in a text: 1,000, -3/4, $5, 1.2*10^3, 3.5 million."""
    text = FRACTION.sub(r" \1/\2 ", text.replace("{,}", ",").replace("dfrac", "frac"))
    found = []
    for sign, top, bottom, exponent, power, scale in NUMBER.findall(text):
        if len(top) > 40 or bottom and not float(bottom):
            continue
        value = Fraction(top.replace(",", "")) / Fraction(bottom or 1) * Fraction(10) ** int(exponent or power or 0)
        value *= SCALE.get(scale.lower(), 1)
        found.append(-value if sign == "-" else value)
    return found


def number_words(text: str) -> list[Fraction]:
    """twenty-five, three; one only where it counts something: neither "which one" nor "one of them"."""
    text = re.sub(r"\b(?:which|this|that|the|no|each|every|any) one\b|\bone (?:of|can|must|another|or)\b", " ", text.lower())
    return [Fraction(WORDS[word]) for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text) if word in WORDS]


def number_in(text: str, question: str = "") -> Fraction | None:
    """The number that a sentence states: the bold one, that after the last =, one after "is" or the last one unless the
    question has it, the first in words, the last."""
    asked = set(numbers(question))
    bold = [value for part in BOLD.findall(text) for value in numbers(part)]
    if bold:
        return bold[-1]
    text = text.replace("*", "")
    parts = re.split(r"=|≈|\\approx", text)
    if len(parts) > 1 and numbers(parts[-1]):
        return numbers(parts[-1])[0]
    for match in STATES.finditer(text):
        value = next(iter(numbers(text[match.end() :])), None)
        if value is not None and value not in asked:
            return value
    found, words = numbers(text), number_words(text)
    fresh = [value for value in found if value not in asked]
    return (fresh[-1:] or words[:1] or found[-1:] or [None])[0]


def bare_number(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def read_number(candidate: str, problem: Problem) -> tuple[str, str]:
    value = number_in(candidate)
    return (bare_number(value), "number") if value is not None else (candidate[:MAX_RAW], "nothing")


# ---------------------------------------------------------------- options


def spell(text: str) -> str:
    """The spelling in which options are looked up: that of answers.clean, no case, no markdown, no idle LaTeX."""
    text = re.sub(r"\*? ?\\degree", "°", text).replace("**", "").replace("$", "").replace("{ ", "{").replace(" }", "}")
    return clean(text).casefold()


@lru_cache(maxsize=256)
def spelled(choices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(spell, choices))


def letter_of(index: int) -> str:
    return chr(ord("A") + index)


def in_range(letter: str, problem: Problem) -> bool:
    return 0 <= ord(letter) - ord("A") < len(problem.choices)


def options_in(text: str, problem: Problem) -> list[str]:
    """Letters of the options that stand in the text as whole words, in order, without those within longer ones."""
    text, spans = spell(text), []
    for i, option in enumerate(spelled(problem.choices)):
        if len(option) > 1 or option.isdigit():                          # "a" is an article
            left = r"(?<![A-Za-z0-9_.\\{-])" if option[0].isalnum() else ""
            right = r"(?![A-Za-z0-9_\\}]|\.\d)" if option[-1].isalnum() else ""
            pattern = left + re.escape(option) + right
            spans += [(m.start(), m.end(), letter_of(i)) for m in re.finditer(pattern, text)]
    kept = []
    for start, end, letter in sorted(spans, key=lambda span: span[0] - span[1]):
        if not any(a < end and start < b for a, b, _ in kept):
            kept.append((start, end, letter))
    return [letter for _, _, letter in sorted(kept)]


def equal_option(text: str, problem: Problem) -> str | None:
    text = spell(text)
    return next((letter_of(i) for i, option in enumerate(spelled(problem.choices)) if option == text), None)


def equal_number(text: str, problem: Problem) -> str | None:
    """The first option with the number this text states, units aside."""
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
    if led and in_range((led[1] or led[2]).upper(), problem) and not REJECTED_AFTER.match(" " + led[3]):
        return (led[1] or led[2]).upper(), "letter"
    found = options_in(candidate, problem)
    if found:
        return found[0], "option"
    number = equal_number(candidate, problem)
    if number:
        return number, "number"
    return (letter[1].upper(), "out of range") if letter else (candidate[:MAX_RAW], "nothing")


# ---------------------------------------------------------------- prose: options

# A letter as an answer: (B), (b), [B], "B", B; but neither "A triangle" nor the B of AB, B' or B = 5.
LETTER = (r"[ *\"'`$]*(?:(?i:option|choice|answer|letter)\b|选项)?[ *\"`$:]*(?:\\(?:text|mathrm|mathbf|boxed)\{)*"
          r"(?:\(([A-Za-z])\)|\[([A-Z])\]|(?<=['‘])([A-Z])['’]|([A-Z])(?![A-Za-z0-9_'’°-]| ?[=<>+/^]|(?<=A) [a-z]))")
SUBJECT = r"(?:\b(?i:answer|ans|option|choice|solution|letter|correct(?: one)?)\b|答案|选项)"
IS = r"(?:\b(?:is|are|be|was)\b|[:=为是])"
STATED = re.compile(rf"{SUBJECT}[^.\n]{{0,80}}?{IS}(?: not \(?[A-Z]\)?,? but)?{LETTER}")
MENTIONED = re.compile(r"(?:\b(?i:option|choice|answer|ans|choose|select|pick)\b|故选|选[择项]?|答案)[: ]*" + LETTER)
CONFIRMED = re.compile(r"(?:\(([A-Za-z])\)[^.(\n]{0,60}?|\b([A-Z])\*{0,2}) is (?:the )?(?:correct|right|answer|best)")
REJECTED_AFTER = re.compile(
    r"[^.,;\n]{0,60}?(?:\b(?:is|are|was|be|would be)\b(?: \w+)?? ?(?:not|incorrect|wrong|false)\b|n't\b)")
REJECTED_BEFORE = re.compile(
    r"(?:\bnot\b|n't\b|\brules? out|\bruling out|\beliminat\w+|\bexclud\w+|\bif(?: the)?(?: correct)? ?)[^.,;\n]{0,20}$",
    re.IGNORECASE)
CONCLUSION = re.compile(r"\b(?:therefore|thus|hence|so|in conclusion|overall|answer|in summary|finally)\b|因此|所以|故|答案|综上",
                        re.IGNORECASE)
NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|none|cannot)\b|n't\b|不|没有", re.IGNORECASE)
REFUSAL = re.compile(r"\b(?:sorry|unable to|can(?:no|')t (?:see|help|answer|determine|provide|access|process)|impossible to|"
                     r"not (?:possible|able|clear) |insufficient|not enough)\b", re.IGNORECASE)
ANTONYMS = [("greater", "less"), ("more", "fewer"), ("more", "less"), ("larger", "smaller"), ("bigger", "smaller"),
            ("higher", "lower"), ("above", "below"), ("longer", "shorter"), ("maximum", "minimum"), ("increase", "decrease"),
            ("most", "least"), ("even", "odd"), ("older", "younger"), ("left", "right"), ("highest", "lowest"), ("largest", "smallest"), ("smoothest", "roughest"),
            ("best", "worst"), ("before", "after"), ("same", "different"), ("longest", "shortest"), ("greatest", "least")]


def last_letter(pattern: re.Pattern, text: str) -> str | None:
    """The letter of the last match that is neither ruled out nor supposed."""
    for match in list(pattern.finditer(text))[::-1]:
        before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() : match.end() + 80]
        if not REJECTED_AFTER.match(after) and not REJECTED_BEFORE.search(before):
            return next(filter(None, match.groups())).upper()
    return None


def stated_letter(text: str, problem: Problem) -> str | None:
    """The correct answer is (B)."""
    return last_letter(STATED, text)


def mentioned_letter(text: str, problem: Problem) -> str | None:
    """Option B fits best. I would choose C. (B) is correct."""
    return last_letter(CONFIRMED, text) or last_letter(MENTIONED, text)


def only_letter(text: str, problem: Problem) -> str | None:
    """One letter in parentheses in the whole response, else in its last sentence that has any."""
    for part in [text, *sentences(text)[::-1]]:
        letters = {letter.upper() for letter in re.findall(r"\(([A-Za-z])\)", part)}
        letters = {letter for letter in letters if in_range(letter, problem)}
        if len(letters) == 1:
            return letters.pop()
        if letters and part is not text:
            return None
    return None


def leading_letter(text: str, problem: Problem) -> str | None:
    """A line that begins with B. or B), when no other line begins with another letter."""
    letters = set(re.findall(r"^[ *]*([A-Z])(?:[.):]|\*\*| ?$)", text, re.MULTILINE))
    return letters.pop() if len(letters) == 1 else None


def is_yes_no(problem: Problem) -> bool:
    return set(spelled(problem.choices)) in ({"yes", "no"}, {"true", "false"})


def letter_of_word(word: str, problem: Problem) -> str:
    """The option that says yes, or no: true and false are other words for it."""
    same = ("yes", "true") if word.lower() in ("yes", "true") else ("no", "false")
    return letter_of(next(i for i, option in enumerate(spelled(problem.choices)) if option in same))


def yes_or_no(text: str, problem: Problem) -> str | None:
    """The first word, or the last yes or no of a conclusion."""
    if not is_yes_no(problem):
        return None
    leading = re.match(r"\W*(yes|no|true|false)\b", text, re.IGNORECASE)
    if leading:
        return letter_of_word(leading[1], problem)
    for part in sentences(text)[::-1]:
        if CONCLUSION.search(part):
            words = re.findall(r"\b(?:yes|no|true|false)\b(?! \w)", part, re.IGNORECASE)
            if words:
                return letter_of_word(words[-1], problem)
    return None


def stated_option(text: str, problem: Problem) -> str | None:
    """The answer is <text of an option>."""
    for match in list(re.finditer(rf"(?:\b(?i:(?<!other )answer|correct \w+)\b|答案)[^.\n]{{0,60}}?{IS}", text))[::-1]:
        found = options_in(re.split(r"\n|\. ", text[match.end() : match.end() + 200])[0], problem)
        if found:
            return found[0]
    return None


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def turned_round(question: str, statement: str) -> bool:
    """Does the statement compare the other way: B is more than A, or A is less than B, for "is A more than B"?"""
    asked, said = words_of(question), words_of(statement)
    opposite = any(a in asked - said and b in said - asked for x, y in ANTONYMS for a, b in ((x, y), (y, x)))
    swapped = False
    if " than " in question and " than " in statement:
        (a, b), (_, last) = ([words_of(part) for part in text.lower().split(" than ", 1)] for text in (question, statement))
        swapped = len(last & (a - b)) > len(last & (b - a))
    return opposite != swapped


def affirmed(text: str, problem: Problem) -> str | None:
    """Yes or no by whether the first statement affirms what was asked: an odd number of negations is a no."""
    if not is_yes_no(problem) or not sentences(text):
        return None
    statement = sentences(text)[0]
    if REFUSAL.search(statement):
        return None
    negative = bool(NEGATION.search(statement)) != bool(NEGATION.search(problem.question))
    negative ^= turned_round(problem.question, statement)
    return letter_of_word("no" if negative else "yes", problem)


def off_the_list(text: str, problem: Problem) -> str | None:
    """The number that the last conclusion states, where options are numbers and it is none of them."""
    if not all(quantity(option) for option in spelled(problem.choices)):
        return None
    for part in sentences(text)[::-1]:
        if CONCLUSION.search(part) and numbers(part):
            if options_in(part, problem) or equal_number(part, problem):
                return None
            return bare_number(number_in(part))
    return None


def concluded_option(text: str, problem: Problem) -> str | None:
    """An option's text in the last conclusion, in the first sentence, in the last one, or alone in the whole."""
    parts = sentences(text)
    conclusions = [part for part in parts if CONCLUSION.search(part)]
    for part in [*conclusions[::-1], *parts[:1], *parts[::-1]]:
        found = options_in(part, problem)
        asked = set(options_in(problem.question, problem))
        fresh = [letter for letter in found if letter not in asked]
        if found:
            return (fresh or found)[-1]
    return None


def stem(word: str) -> str:
    return re.sub(r"(?:(?<=[^s])s|(?<=([^aeiou]))\1ed|e?d|ing|e)$", "", word) if len(word) > 3 else word


STOP_WORDS = frozenset("a an the is are was were of in on at to for and or that this it its there what which how do does did "
                       "has have be with by from as if".split())


def content_words(text: str) -> set[str]:
    return {stem(word) for word in re.findall(r"\w+", text.lower()) if word not in STOP_WORDS}


def reworded_option(text: str, problem: Problem) -> str | None:
    """The one option all of whose words, or else most words of its own, stand in the first sentence or the last, in any
    order and inflection."""
    options = [set(map(stem, re.findall(r"\w+", option))) for option in spelled(problem.choices)]
    parts = sentences(text)
    for part in [*parts[:1], *parts[:-2:-1]]:
        said = set(map(stem, re.findall(r"\w+", part.lower())))
        hits = [(len(option), letter_of(i)) for i, option in enumerate(options) if option and option <= said]
        best = [letter for size, letter in hits if size == max(hits)[0]]
        if len(best) == 1:
            return best[0]
        if REFUSAL.search(part):
            continue
        apart = [len((option - set().union(*options[:i], *options[i + 1 :])) & said) for i, option in enumerate(options)]
        if max(apart) > 0 and apart.count(max(apart)) == 1:
            return letter_of(apart.index(max(apart)))
    return None


def concluded_number(text: str, problem: Problem) -> str | None:
    """A number in the conclusion, or else in the last sentence that has one, that equals an option."""
    parts = sentences(text)
    conclusions = [part for part in parts if CONCLUSION.search(part)]
    for part in [*conclusions[::-1], *parts[::-1]]:
        letter = equal_number(part, problem)
        if letter:
            return letter
    return None


CHOICE_RULES = (stated_letter, yes_or_no, stated_option, mentioned_letter, only_letter, leading_letter, affirmed,
                off_the_list, concluded_option, reworded_option, concluded_number)


def without_list(text: str) -> str:
    """The text without a copy of the options, a line each."""
    lines = text.split("\n")
    letters = [re.match(r"[ *-]*\(?([A-Z])[).:] ?\S", line) for line in lines]
    listed = {match[1] for match in letters if match}
    if len(listed) < 2:
        return text
    return "\n".join(line for line, match in zip(lines, letters) if not match) or text


def choice_in_prose(text: str, problem: Problem) -> tuple[str, str]:
    if len(text) < MAX_RAW:
        letter, how = read_choice(text, problem)
        if how == "letter" or how == "option" and equal_option(text, problem):
            return letter, "whole: " + how
    text = without_list(text)
    for rule in CHOICE_RULES:
        letter = rule(text, problem)
        if letter:
            known = len(letter) == 1 and in_range(letter, problem)
            return letter, rule.__name__.replace("_", " ") if known else "out of range"
    if len(text) > MAX_RAW and REFUSAL.search(text):
        return "N/A", "nothing"
    return text[-MAX_RAW:], "nothing"


# ---------------------------------------------------------------- prose: numbers


def stated_number(text: str, problem: Problem) -> Fraction | None:
    """The answer is 5."""
    for match in list(re.finditer(r"(?:\b(?i:answer)\b|答案)[^.\n]{0,80}?(?:\b(?:is|are)\b|[:=为是])", text))[::-1]:
        clause = SENTENCE_END.split(text[match.end() : match.end() + 200].strip())[0]
        value = numbers(clause)[0] if re.match(r"[*$ ~-]*\d", clause) and "=" not in clause else number_in(clause)
        if value is not None:
            return value
    return None


def filled_blank(text: str, problem: Problem) -> Fraction | None:
    """The number where the question has its blank: There are (_) dots."""
    match = re.search(r"((?:[\w']+ ){1,3})\(?_+\)?", problem.question)
    if not match:
        return None
    found = re.findall(re.escape(match[1]) + r"(?:about |approximately )?[*$(_ ]*([\d.,/]+|[a-z-]+)", text, re.IGNORECASE)
    values = [numbers(word) for word in found]
    return next((value[0] for value in values[::-1] if value), None)


def restating(text: str, problem: Problem) -> list[str]:
    """The sentences that repeat half of the words of what is asked, most first, then the later; bold counts as a word."""
    asked = content_words((sentences(problem.question) or [""])[-1])
    ranked = []
    for i, part in enumerate(sentences(text)):
        shared = len(asked & content_words(part))
        if shared and shared >= len(asked) / 2:
            ranked.append((shared + bool(BOLD.search(part)), i, part))
    return [part for _, _, part in sorted(ranked)[::-1]]


def asked_year(text: str, problem: Problem) -> Fraction | None:
    """The year, where one is asked for, of a sentence that repeats the question, else of the last sentence with one."""
    if not ASKS_YEAR.search(problem.question):
        return None
    for part in restating(text, problem) + sentences(text)[::-1]:
        years = re.findall(r"(?<!\d)[12]\d{3}(?!\d)", " ".join(BOLD.findall(part)) or part)
        if years:
            return Fraction(years[-1])
    return None


def restated(text: str, problem: Problem) -> Fraction | None:
    """The number of a sentence that repeats the question."""
    values = (number_in(part, problem.question) for part in restating(text, problem))
    return next((value for value in values if value is not None), None)


def concluded_in(text: str, problem: Problem) -> Fraction | None:
    """The number of the last conclusion."""
    for part in sentences(text)[::-1]:
        value = number_in(part, problem.question) if CONCLUSION.search(part) else None
        if value is not None:
            return value
    return None


def last_number(text: str, problem: Problem) -> Fraction | None:
    """The number of the last sentence that has one."""
    for part in sentences(text)[::-1]:
        value = number_in(part, problem.question)
        if value is not None:
            return value
    return None


def none_counted(text: str, problem: Problem) -> Fraction | None:
    """0 for "there are no cubes left", where a count is asked."""
    counts = re.search(r"\b(?:how many|number of)\b", problem.question, re.IGNORECASE)
    said = re.search(r"\b(?:no|none|zero|nothing)\b|没有", text, re.IGNORECASE)
    return Fraction(0) if counts and said and not REFUSAL.search(text) else None


NUMBER_RULES = (stated_number, filled_blank, asked_year, restated, concluded_in, last_number, none_counted)


def number_in_prose(text: str, problem: Problem) -> tuple[str, str]:
    for rule in NUMBER_RULES:
        value = rule(text, problem)
        if value is not None:
            return bare_number(value), rule.__name__.replace("_", " ")
    return text[-MAX_RAW:], "nothing"


# ---------------------------------------------------------------- extract


def list_in(text: str, problem: Problem) -> tuple[str, str]:
    """The last [...] as Python writes it, else the last two numbers."""
    inside = re.findall(r"\[([^\[\]]{1,400})\]", text)
    for items in inside[::-1]:
        values = [numbers(item) for item in items.split(",")]
        if all(values):
            return "[" + ", ".join(bare_number(value[0]) for value in values) + "]", "list"
    values = numbers(text)
    if len(values) > 1:
        return "[" + ", ".join(map(bare_number, values[-2:])) + "]", "last two numbers"
    return text[-MAX_RAW:], "nothing"


def read(candidate: str, problem: Problem) -> tuple[str, str]:
    """A structured answer: the short forms, else as prose."""
    if problem.kind == "choice":
        letter, how = read_choice(candidate, problem)
        return (letter, how) if how != "nothing" else choice_in_prose(candidate, problem)
    if problem.kind in ("integer", "float"):
        return read_number(candidate, problem)
    if problem.kind == "list":
        return list_in(candidate, problem)
    return clean(candidate), "text"


def read_prose(text: str, problem: Problem) -> tuple[str, str]:
    if problem.kind == "choice":
        return choice_in_prose(text, problem)
    if problem.kind in ("integer", "float"):
        return number_in_prose(text, problem)
    if problem.kind == "list":
        return list_in(text, problem)
    return clean(text[-MAX_RAW:]), "text"


def extract(response: str, problem: Problem) -> tuple[str, str]:
    """(extraction, name of the rule that found it); see the head of this file."""
    text = tidy(response)
    if not text:
        return "", "empty"
    structure, candidate = structured(text)
    if structure:
        extraction, how = read(candidate, problem)
        if how != "nothing" or structure != "boxed":
            return extraction, how if how in NO_ANSWER else f"{structure}: {how}"
    sections = parse(text)
    if sections.description is not None or sections.rationales is not None:
        return "", "unfinished"
    return read_prose(text, problem)
