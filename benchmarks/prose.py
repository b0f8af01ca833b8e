r"""What sentences say about a question: the rules that read an answer out of free text, for extraction.py.

CHOICE_RULES and NUMBER_RULES name the rules of a kind in the order in which they are tried: functions (text, item) ->
answer or None. The name of the first that answers goes with the answer. The rules know English and some Chinese, the
question and its options, and nothing else.
"""
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from benchmarks.reading import (BOLD, MAX_RAW, MAX_SENTENCE, REJECTED_AFTER, Item, answer_number, equal_number,
                                in_range, letter_of, number_in, option_numbers, options_in, spelled)
from grading.equal import bare_number, clean, numbers


# ---------------------------------------------------------------- sentences and words

MAX_MATCHES = 20                                   # of a pattern that are tried, the last ones
SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n")
CONCLUSION = re.compile(r"\b(?:therefore|thus|hence|so|in conclusion|overall|answer|in summary|finally)\b|"
                        r"因此|所以|故|答案|综上", re.IGNORECASE)
REFUSAL = re.compile(r"\b(?:sorry|unable to|can(?:no|')t|not (?:possible|able|clear|enough)|impossible|insufficient)\b",
                     re.IGNORECASE)
# Said of the answer in a conclusion, this is no answer, unless an option says it too.
DECLINES = re.compile(
    r"\bcan(?:no|')t (?:be )?(?:determin|answer|predict|tell|calculat)\w*|\bunable to (?:determine|answer|calculate)\b|"
    r"\b(?:im|not )possible to (?:determine|answer|tell|calculate)\b|\binsufficient \w+|\bnot enough \w+|\bN/A\b|"
    r"\bnot (?:be )?(?:provided|given|specified|listed|determinable|applicable|available|among)\b|"
    r"\bnone of the (?:above|given)|不能确定|无法确定", re.IGNORECASE)
INTENTION = re.compile(r"(?:To (?!the\b)\w+ |Let(?:'s| us)? |Suppose|Assume)")
STOP_WORDS = frozenset("a an the is are was were of in on at to for and or that this it its there what which how do "
                       "does did has have be with by from as if".split())
ASKED_FOR = re.compile(
    r"\b(?:what(?:'s| is| are| was| were)|find|estimate|calculate|how many|which)(?: the)? (\w+)", re.IGNORECASE)


@lru_cache(maxsize=64)
def sentences(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in SENTENCE_END.split(text))
    return tuple(part[-MAX_SENTENCE:] for part in parts if part.strip(" *_`#-|"))


def conclusions(text: str) -> list[str]:
    """The sentences that draw a conclusion, the last first."""
    return [part for part in sentences(text)[::-1] if CONCLUSION.search(part)]


def last_matches(pattern: re.Pattern, text: str) -> list[re.Match]:
    """The matches to try, the last first."""
    return list(pattern.finditer(text))[: -MAX_MATCHES : -1]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def stem(word: str) -> str:
    """decreases, decreased, decreasing -> decreas; flipped -> flip."""
    return re.sub(r"(?:(?<=[^s])s|(?<=([^aeiou]))\1ed|e?d|ing|e)$", "", word) if len(word) > 3 else word


def content_words(text: str) -> set[str]:
    return {stem(word) for word in words_of(text) - STOP_WORDS}


def restating(text: str, item: Item) -> list[str]:
    """The sentences that repeat half of the words of what is asked, those that repeat most first, then the later ones.

    The word for what is asked, the "area" of "what is the area of the disk", counts as four; bold counts as one.
    """
    asked = content_words((sentences(item.question) or ("",))[-1])
    match = ASKED_FOR.search(item.question)
    head = stem(match[1].lower()) if match else None
    ranked = []
    for i, part in enumerate(sentences(text)):
        said = content_words(part)
        shared = len(asked & said) + 3 * (head in said)
        if shared and shared >= len(asked) / 2 and not INTENTION.match(part):
            ranked.append((shared + bool(BOLD.search(part)), i, part))
    return [part for _, _, part in sorted(ranked, reverse=True)]


# ---------------------------------------------------------------- rules: the letter of an option

# A letter as an answer: (B), (b), [B], "B", B; but neither "A triangle" nor the B of AB, B' or B = 5.
# What may stand around it is bounded, here and in every rule: a pattern that may repeat has to end.
LETTER = (r"[ *\"'`$]{0,6}(?:(?i:option|choice|answer|letter)\b|选项)?[ *\"`$:]{0,6}(?:\\(?:text|boxed)\{){0,3}"
          r"(?:\(([A-Za-z])\)|\[([A-Z])\]|(?<=')([A-Z])'|([A-Z])(?![A-Za-z0-9_'°-]| ?[=<>+/^]|(?<=A) [a-z]))")
SUBJECT = r"(?:\b(?i:answer|ans|option|choice|solution|letter|correct(?: one)?)\b|答案|选项)"
IS = r"(?:\b(?:is|are|be|was)\b|[:=为是])"
STATED = re.compile(rf"{SUBJECT}[^.\n]{{0,80}}?(?:{IS}|\n)(?: not \(?[A-Z]\)?,? but)?{LETTER}")
MENTIONED = re.compile(
    r"(?:\b(?i:option|choice|answer|ans|choose|select|pick)\b|故选|选[择项]?|答案)[: ]{0,3}" + LETTER)
CONFIRMED = re.compile(r"(?:\(([A-Za-z])\)[^.(\n]{0,60}?|\b([A-Z])\*{0,2}) is (?:the )?(?:correct|right|answer|best)")
REJECTED_BEFORE = re.compile(
    r"(?:\bnot\b|n't\b|\brules? out|\bruling out|\beliminat\w+|\bexclud\w+|\bif(?: the)?(?: correct)? ?)"
    r"[^.,;\n]{0,20}$", re.IGNORECASE)


def last_letter(text: str, *patterns: re.Pattern) -> str | None:
    """The letter of the last match that is neither ruled out nor supposed, of the first pattern that has one."""
    for match in (match for pattern in patterns for match in last_matches(pattern, text)):
        before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() : match.end() + 80]
        if not REJECTED_AFTER.match(after) and not REJECTED_BEFORE.search(before):
            return next(filter(None, match.groups())).upper()
    return None


def only_letter(text: str, item: Item) -> str | None:
    """The one letter in parentheses in the whole response."""
    letters = {letter for letter in re.findall(r"\(([A-Z])\)", text.upper()) if in_range(letter, item)}
    return letters.pop() if len(letters) == 1 else None


# ---------------------------------------------------------------- rules: yes and no

NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|none|cannot)\b|n't\b|不|没有", re.IGNORECASE)
ANTONYMS = [pair.split("/") for pair in (
    "greater/less more/fewer more/less larger/smaller bigger/smaller higher/lower above/below longer/shorter "
    "older/younger maximum/minimum increase/decrease most/least even/odd left/right highest/lowest largest/smallest "
    "greatest/least longest/shortest smoothest/roughest best/worst before/after same/different").split()]


def yes_and_no(item: Item) -> dict[bool, str]:
    """The letters of the options that say yes (True) and no (False), if these, or true and false, are the options."""
    options = spelled(item.choices)
    pair = next((pair for pair in (("yes", "no"), ("true", "false")) if set(pair) == set(options)), ())
    return {word in ("yes", "true"): letter_of(options.index(word)) for word in pair}


def yes_or_no(text: str, item: Item) -> str | None:
    """The first word, or else the last yes or no of a conclusion."""
    leading = re.match(r"\W*(yes|no|true|false)\b", text, re.IGNORECASE)
    concluding = (re.findall(r"\b(?:yes|no|true|false)\b(?! \w)", part, re.IGNORECASE) for part in conclusions(text))
    words = leading.groups() if leading else next(filter(None, concluding), None)
    return yes_and_no(item).get(words[-1].lower() in ("yes", "true")) if words else None


def turned_round(question: str, statement: str) -> bool:
    """Whether the statement compares the other way, as "B is more than A" and "A is less than B" do for "is A more than
    B?"; both turns together are none."""
    asked, said = words_of(question), words_of(statement)
    opposite = any(a in asked - said and b in said - asked for x, y in ANTONYMS for a, b in ((x, y), (y, x)))
    swapped = False
    if " than " in question and " than " in statement:
        left, right = (words_of(part) for part in question.split(" than ", 1))
        last = words_of(statement.split(" than ", 1)[1])
        swapped = len(last & (left - right)) > len(last & (right - left))
    return opposite != swapped


def affirmed(text: str, item: Item) -> str | None:
    """Yes or no by the first sentence that repeats the question. A negation, or a comparison the other way, makes a yes
    a no, and both together make it a yes again."""
    letters = yes_and_no(item)
    statements = set(restating(text, item)) if letters else ()
    statement = next((part for part in sentences(text) if part in statements), None)
    if statement is None or REFUSAL.search(statement):
        return None
    negative = bool(NEGATION.search(statement)) != turned_round(item.question, statement)
    return letters[not negative]


# ---------------------------------------------------------------- rules: the text of an option

STATES_ANSWER = re.compile(rf"(?:\b(?i:(?<!other )answer|correct \w+)\b|答案)[^.\n]{{0,60}}?{IS}")
LISTED = re.compile(r"[ *-]*\(?([A-Z])[).:] ?\S")


def concluded(text: str, item: Item) -> str | None:
    """The last option that the last conclusion with an answer names, or that its number equals; where all options are
    numbers, also a number that is none of them. Else the same of a sentence that repeats the question, or of any."""
    drawn, numeric = set(conclusions(text)), None not in option_numbers(item.choices)
    for part in (*conclusions(text), *restating(text, item), *sentences(text)[::-1]):
        value = number_in(part)
        letter = (options_in(part, item) or [equal_number(value, item)])[-1]
        if letter or numeric and value is not None and part in drawn:
            return letter or bare_number(value)
    return None


def reworded_option(text: str, item: Item) -> str | None:
    """The one option whose words all stand in the first sentence, in any order and inflection, or else the one with the
    most words there that no other option has."""
    options = [set(map(stem, re.findall(r"\w+", option))) for option in spelled(item.choices)]
    first = next(iter(sentences(text)), "")
    said = set() if REFUSAL.search(first) else set(map(stem, words_of(first)))
    own = [option - set().union(*options[:i], *options[i + 1 :]) for i, option in enumerate(options)]
    whole = [len(option) if option <= said else 0 for option in options]
    told = [[len(words & heard) for words in own] for heard in (said - content_words(item.question), said)]
    for counts in (whole, *told):
        if max(counts) > 0 and counts.count(max(counts)) == 1:
            return letter_of(counts.index(max(counts)))
    return None


CHOICE_RULES = {
    "stated letter": lambda text, item: last_letter(text, STATED),                        # The correct answer is (B).
    "yes or no": yes_or_no,
    "mentioned letter": lambda text, item: last_letter(text, CONFIRMED, MENTIONED),       # (B) is right. I choose C.
    "only letter": only_letter, "affirmed": affirmed, "concluded": concluded, "reworded option": reworded_option}


def without_list(text: str) -> str:
    """The text without a copy of the options, a line each."""
    lines = text.split("\n")
    if len({match[1] for match in map(LISTED.match, lines) if match}) < 2:
        return text
    return "\n".join(line for line in lines if not LISTED.match(line))


def declined(text: str, item: Item) -> str | None:
    """The answer cannot be determined: the words for it in the last conclusion or sentence, if that names no answer."""
    asked = set(numbers(item.question))
    for part in (*conclusions(text)[:1], *sentences(text)[-1:]):
        match = DECLINES.search(part)
        named = set(options_in(part, item)) if item.choices else set(numbers(part)) - asked
        if match and (len(named) != 1 if item.choices else not named):
            return match[0][0].upper() + match[0][1:]
    return None


def first_answer(rules: dict[str, Callable], text: str, item: Item) -> tuple:
    """(answer, name of the rule that gave it) of the first rule that answers; (None, "nothing") when none does."""
    answers = ((rule(text, item), name) for name, rule in rules.items())
    return next((found for found in answers if found[0] is not None), (None, "nothing"))


def choice_in_prose(text: str, item: Item) -> tuple[str, str]:
    """(letter, rule); with the rule "nothing" the words that decline to answer, or the end of the text."""
    said, rules = without_list(text), CHOICE_RULES
    declining = declined(said, item)
    if declining:
        for i, option in enumerate(spelled(item.choices)):
            if DECLINES.search(option):
                return letter_of(i), "declined"
        # What remains may still state a letter, but not: If the first is larger, the answer is (A). Otherwise, ..
        said = "\n".join(part for part in sentences(said) if not re.match("If|Otherwise", part))
        rules = {"stated letter": CHOICE_RULES["stated letter"]}
    answer, rule = first_answer(rules, said, item)
    if answer:
        return answer, rule if in_range(answer, item) else "out of range"
    return declining or (text[-MAX_RAW:] if said else text[:MAX_RAW]), "nothing"


# ---------------------------------------------------------------- rules: numbers

ASKS_YEAR = re.compile(r"\b(?:which|what) years?\b|\bwhen\b|哪一?年", re.IGNORECASE)
ASKS_COUNT = re.compile(r"\b(?:how many|number of)\b|多少|几", re.IGNORECASE)
NONE_SAID = re.compile(r"\b(?:no|none|zero|nothing)\b|没有", re.IGNORECASE)


def first_number(parts, item: Item) -> Fraction | None:
    """The number of the first sentence that has one."""
    values = (number_in(part, item.question) for part in parts)
    return next((value for value in values if value is not None), None)


def stated_number(text: str, item: Item) -> Fraction | None:
    """The answer is 5."""
    rests = (text[match.end() : match.end() + 200].strip() for match in last_matches(STATES_ANSWER, text))
    values = (answer_number(SENTENCE_END.split(rest)[0], item.question) for rest in rests)
    return next((value for value in values if value is not None), None)


def asked_year(text: str, item: Item) -> Fraction | None:
    """The year, where one is asked for, of a sentence that repeats the question, else of the last sentence with one."""
    parts = (*restating(text, item), *sentences(text)[::-1]) if ASKS_YEAR.search(item.question) else ()
    years = (re.findall(r"(?<!\d)[12]\d{3}(?!\d)", part) for part in parts)
    return next((Fraction(found[-1]) for found in years if found), None)


def none_counted(text: str, item: Item) -> Fraction | None:
    """0 for "there are no cubes left", where a count is asked."""
    counted = ASKS_COUNT.search(item.question) and NONE_SAID.search(text)
    return Fraction(0) if counted and not REFUSAL.search(text) else None


NUMBER_RULES = {
    "stated number": stated_number, "asked year": asked_year,
    "restated": lambda text, item: first_number(restating(text, item), item),             # in the words of the question
    "last number": lambda text, item: first_number(sentences(text)[::-1], item), "none counted": none_counted}


def number_in_prose(text: str, item: Item) -> tuple[str, str]:
    """(bare number, rule); with the rule "nothing" the words that decline to answer, or the end of the text."""
    declining = declined(text, item)
    value, rule = first_answer({"stated number": stated_number} if declining else NUMBER_RULES, text, item)
    return (declining or text[-MAX_RAW:] if value is None else bare_number(value)), rule


# ---------------------------------------------------------------- the other kinds


def list_in_prose(text: str, item: Item) -> tuple[str, str]:
    """The last [...] as Python writes it, else the last two numbers."""
    for items in re.findall(r"\[([^\[\]]{1,400})\]", text)[::-1]:
        values = [numbers(part) for part in items.split(",")]
        if all(values):
            return "[" + ", ".join(bare_number(value[0]) for value in values) + "]", "list"
    values = numbers(text[-MAX_SENTENCE:])
    if len(values) > 1:
        return "[" + ", ".join(map(bare_number, values[-2:])) + "]", "last two numbers"
    return text[-MAX_RAW:], "nothing"


def text_in_prose(text: str, item: Item) -> tuple[str, str]:
    """What follows the last "answer is", to the end of the sentence."""
    for match in last_matches(STATES_ANSWER, text):
        answer = clean(re.split(r"\n|\. ", text[match.end() : match.end() + MAX_SENTENCE])[0])
        if answer:
            return answer, "stated text"
    return text[-MAX_RAW:], "nothing"
