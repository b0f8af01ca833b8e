"""The rules that read answers out of responses: every style they must understand, and all they must survive."""
import gc
import random
import re
import time
from fractions import Fraction

import pytest

import rewards
from benchmarks.extraction import NO_ANSWER, Item, extract, sentences, structured, tidy
from data import Sample, parse
from grading.algebra import expressions
from grading.equal import MAX_TEXT, bare_number, clean, correct, cut, numbers

pytestmark = pytest.mark.fast


ANGLE = Item("1", "What is the measure of angle BOC?", "choice", ("30°", "45°", "60°", "75°"))
YES_NO = Item("2", "Is Medium Blue the roughest?", "choice", ("yes", "no"))
ANIMAL = Item("3", "Which animal would starve first if the mice died out?", "choice",
                 ("Owl", "Grass", "Barn owl", "Rabbit"))
CHANGE = Item("4", "What would happen to the hawks if the snakes decreased?", "choice",
                 ("increase", "decrease", "stay the same", "can't tell"))
BLANK = Item("5", "The value at x=1 is ____ that at x=3.", "choice", ("larger than", "equal to", "smaller than"))
ODDS = Item("6", "What is the probability of drawing a red marble?", "choice", ("1/2", "3/8", "5/8", "1"))
CHINESE = Item("7", "如图，则∠BOC的度数是（）", "choice", ("30°", "40°", "50°", "60°"))
COUNT = Item("8", "How many red cubes are left on the table?", "integer")
AGE = Item("9", "What is the age gap between these two people in image?", "integer")
LENGTH = Item("10", "By what distance d is the spring compressed?", "float", precision=2)
YEAR = Item("11", "In which year was the sales figure the highest?", "integer")
CORNER = Item("12", "Give the coordinates of the corner as a list.", "list")
ILLUSION = Item("13", "Are the two lines in the picture parallel?", "yesno")
FORMULA = Item("14", "What is the equation of the line?", "text")
EIGHT = Item("15", "Which figure comes next?", "choice", tuple("ABCDEFGH"))
GRAPH = Item("17", "What is the value of y at x=-2?", "integer")

# item, response, extraction
STYLES = [
    # bare answers
    (ANGLE, "B", "B"), (ANGLE, "b.", "B"), (ANGLE, "(D) 75°", "D"), (ANGLE, "B. 45°", "B"), (ANGLE, "45°", "B"),
    (ANGLE, "45", "B"), (ANGLE, "45 degrees", "B"), (ANGLE, "$45^\\circ$", "B"), (ANGLE, "[C]", "C"),
    (ANGLE, "C) 60°", "C"),
    (ANGLE, "A: 30°", "A"), (ANGLE, "Choice (B)", "B"), (ANGLE, "**C**", "C"),
    (EIGHT, "H", "H"),
    (ANIMAL, "Barn owl", "C"), (BLANK, "larger than", "A"), (ODDS, "$\\frac{5}{8}$", "C"),
    # the letter is stated
    (ANGLE, "Answer: B", "B"), (ANGLE, "answer: (c)", "C"), (ANGLE, "ANSWER: C", "C"), (ANGLE, "Ans: C", "C"),
    (ANGLE, "The answer is (B).", "B"), (ANGLE, "The answer is B", "B"), (ANGLE, "The letter is C.", "C"),
    (ANGLE, "The correct answer is option C: 60°.", "C"), (ANGLE, "The correct option letter is D", "D"),
    (ANGLE, "The answer is 'C'", "C"), (ANGLE, 'The answer is "C".', "C"), (ANGLE, "The answer would be C", "C"),
    (ANGLE, "The answer is therefore (C).", "C"), (ANGLE, "The answer is likely to be C.", "C"),
    (ANGLE, "So the correct option is B.", "B"), (ANGLE, "Hence, option (D) is correct.", "D"),
    (ANGLE, "Therefore, (C) is the answer.", "C"), (ANGLE, "C is the correct answer.", "C"),
    (ANGLE, "I would choose C, since the arc is 120°.", "C"),
    (ANGLE, "The angle is 60°, which corresponds to choice C.", "C"),
    # markdown and LaTeX
    (ANGLE, "**Answer: (C) 60°**", "C"), (ANGLE, "**Answer:** C", "C"), (ANGLE, "**Final Answer**\n\n**C**", "C"),
    (ANGLE, "### Answer\nC. 60°", "C"), (ANGLE, "The final answer is $\\boxed{B}$.", "B"),
    (ANGLE, "\\boxed{\\text{C}}", "C"),
    (ANGLE, "so the result is $\\boxed{60^\\circ}$", "C"), (ANGLE, "\\(\\boxed{\\textbf{(C)}\\ 60^\\circ}\\)", "C"),
    (ANGLE, "<think>(A)? No.</think><answer> B </answer>", "B"), (ANGLE, "**The final answer is: B. 45°**", "B"),
    (ANGLE, "### The final answer is:\nThe angle is:\n60°", "C"),
    (ANGLE, "### The final answer is: Option C because 45° is too small", "C"),
    # reasoning first, or last
    (ANGLE, "The angle at the centre is twice that at the rim, so it is 2 x 30° = 60°. The answer is (C) 60°.", "C"),
    (ANGLE, "(C)\n\nThe arc is 120°, and an inscribed angle is half of it.", "C"),
    (ANGLE, "The answer is C\n\nExplanation: choice A is 30°, which is half.", "C"),
    (ANGLE, "Let's look: the triangle is isosceles.\n\nAngle BOC = 180° - 2 × 52.5° = 75°", "D"),
    (ANGLE, "Looking at the choices:\n(A) 30°\n(B) 45°\n(C) 60°\n(D) 75°\nthe arc is 120°, so half of it is 60°.", "C"),
    # options that are ruled out or only supposed
    (ANGLE, "Option A is incorrect because 30° is too small. Option C is the right one.", "C"),
    (ANGLE, "(A) is wrong, (B) is wrong, and (C) is correct.", "C"),
    (ANGLE, "The correct answer is not (A) but (B).", "B"),
    (ANGLE, "I would choose C. Option D is incorrect.", "C"),
    (ANGLE, "If the answer were (A), the sum would be 90°. It is 120°, so the answer must be (B).", "B"),
    (ANGLE, "The answer is A triangle with 60° angles, so C is correct.", "C"),
    # yes and no
    (YES_NO, "Yes", "A"), (YES_NO, "no", "B"), (YES_NO, "No, Medium Blue is not the roughest.", "B"),
    (YES_NO, "Medium Blue is not the roughest.", "B"), (YES_NO, "Medium Blue is the roughest.", "A"),
    (YES_NO, "The answer is (A) yes.", "A"),
    (YES_NO, "Red has no trend. Blue has many peaks. Therefore, the answer is Yes.", "A"),
    (ILLUSION, "No, they are not.", "No"), (ILLUSION, "### The final answer is: Yes.", "Yes"),
    (ILLUSION, "There is no vanishing point here. So the answer is yes.", "Yes"),
    (ILLUSION, "Yes, the two lines in the picture are parallel, and there is no angle between them.", "Yes"),
    (ILLUSION, "No. The two lines in the picture are curved.", "No"),
    (ILLUSION, "The two lines in the picture do not look parallel. Measured, they are, so the answer is yes.", "Yes"),
    # the text of an option
    (ANIMAL, "The barn owl would starve first, because it eats mice.", "C"), (ANIMAL, "The answer is Owl.", "A"),
    (CHANGE, "The hawk population would decrease.", "B"),
    (CHANGE, "They would likely increase in number since there is less competition.", "A"),
    (CHANGE, "If the snakes decreased, the hawks would increase.", "A"),
    (CHANGE, "The hawks would stay the same.", "C"),
    (BLANK, "The value at x=1 is smaller than that at x=3.", "C"),
    (ODDS, "There are 3 red marbles of 8. The probability is 3/8.", "B"),
    # Chinese
    (CHINESE, "因为∠A=25°，所以∠BOC=2×25°=50°，故选C。", "C"), (CHINESE, "答案是 B", "B"), (CHINESE, "答案：D", "D"),
    (CHINESE, "正确选项为（C）", "C"), (CHINESE, "所以∠BOC=40°", "B"), (CHINESE, "选项B正确", "B"),
    (CHINESE, "选C", "C"),
    (COUNT, "答案是 12", "12"), (COUNT, "所以一共有8个", "8"),
    # numbers
    (COUNT, "5", "5"), (COUNT, "5.0", "5"), (COUNT, "Five", "5"), (COUNT, "twenty-five", "25"), (COUNT, "**5**", "5"),
    (COUNT, "The answer is 5.", "5"), (COUNT, "There are five red cubes left.", "5"), (COUNT, "12 - 3 - 4 = 5", "5"),
    (COUNT, "There were 12 cubes. We remove 3 and 4. 12 - 3 - 4 = 5. So there are 5 left.", "5"),
    (COUNT, "After removing 3 of the 8 cubes, 5 remain.", "5"),
    (COUNT, "The answer is 1,000.", "1000"), (COUNT, "3.5 million", "3500000"), (COUNT, "The answer is $25.", "25"),
    (COUNT, "The answer is 25%.", "25"), (COUNT, "The answer is −3.", "-3"), (COUNT, "The final answer is: $-3$", "-3"),
    (COUNT, "### The final answer is: 12 of the 20 cubes", "12"),
    (COUNT, "### The final answer is: 5 cubes.<|im_end|>", "5"),
    (AGE, "Person A was born in 1924 and person B in 1930, so the age gap is 6 years.", "6"),
    (AGE, "1930 - 1924 = 6 years", "6"), (AGE, "Answer: 7 (Unit: years)", "7"),
    (AGE, "The left one looks about 60 and the other about 45. The age gap is approximately 15 years.", "15"),
    (LENGTH, "d = 0.12 m", "0.12"), (LENGTH, "The spring is compressed by a distance of about 0.12 m.", "0.12"),
    (LENGTH, "1.2 \\times 10^{-2} m", "0.012"), (LENGTH, "d = 1.2e-2 m", "0.012"),
    (LENGTH, "d \\approx 0.115 \\text{ m}", "0.115"),
    (LENGTH, "d = \\frac{1}{4} = 0.25", "0.25"), (LENGTH, "The final answer is: 1/4", "0.25"),
    (COUNT, "5 red cubes are left on the table. To see how many cubes are left there, we take 2 steps.", "5"),
    (GRAPH, "The value of y at x=-2 is 3.", "3"),
    # lists and texts
    (CORNER, "The corner is at [3,  -1.5].", "[3, -1.5]"),
    (CORNER, "### The final answer is: [2014,2016]", "[2014, 2016]"),
    (FORMULA, "### The final answer is: $y = 2x+1$.", "y=2x+1"),
    (FORMULA, "The slope is 2. The answer is y = 2x + 1.", "y=2x+1"),
]


SLOPE = Item("18", "What is the slope?", "choice", ("3/4", "-3/4", "4/3", "-4/3"))
ANGLE_R = Item("19", "P = 100 and Q = 80. What is the size of angle R?", "choice", ("50°", "80°", "100°", "200°"))
STYLES += [
    # signs, mixed numbers, powers, roots and words
    (LENGTH, r"### The final answer is: $-\frac{3}{4}$", "-0.75"), (LENGTH, r"\boxed{-\frac34}", "-0.75"),
    (LENGTH, r"<answer>-\dfrac{3}{4}</answer>", "-0.75"), (LENGTH, "The answer is - 5.", "-5"),
    (CORNER, "### The final answer is: [- 0.5, 3]", "[-0.5, 3]"),
    (LENGTH, "### The final answer is: - 5", "-5"),
    (LENGTH, "The answer is − 5.", "-5"), (LENGTH, "The answer is —5", "-5"), (LENGTH, "The answer is minus 5", "-5"),
    (LENGTH, "It is negative 5 there.", "-5"), (COUNT, "- 3", "3"), (COUNT, "The cubes:\n- 3", "3"),
    (LENGTH, "12 - 3 is 9", "9"), (LENGTH, r"The answer is \frac{3}{-4}", "-0.75"), (LENGTH, "d = 2 1/2", "2.5"),
    (LENGTH, r"The answer is 2\frac{1}{2}.", "2.5"), (LENGTH, "The answer is 2½.", "2.5"),
    (LENGTH, "The answer is 3 / 4.", "0.75"), (LENGTH, "The answer is 5×10².", "500"),
    (COUNT, "The answer is 10^3.", "1000"), (COUNT, "The answer is 2^5.", "32"), (COUNT, r"It is \sqrt{16}.", "4"),
    (COUNT, "### The final answer is: 1 000", "1000"), (COUNT, "The answer is twenty five.", "25"),
    (COUNT, r"\boxed{3} is wrong, the answer is 5", "5"),
    (COUNT, r"\fbox{3}", "3"), (SLOPE, r"Thus the slope equals $-\frac{6}{8}$", "B"),
    (SLOPE, r"Thus the slope equals $\frac{6}{8}$", "A"),
    (ANGLE_R, "Since the given angles are P = 100.0 and Q = 80.0, we can deduce that the size of angle R is 50.0.",
     "A"),
    (ANGLE, "### The final answer is：（Ｂ）", "B"), (ANGLE, "### The final answer is: \u200bB", "B"),
]


@pytest.mark.parametrize("item, response, expected", STYLES)
def test_extract_reads_every_style(item, response, expected):
    extraction, rule = extract(response, item)
    assert extraction == expected and rule not in NO_ANSWER


@pytest.mark.parametrize("item, response, expected, rule", [
    (ANGLE, "", "", "empty"),
    (ANGLE, " <|im_end|>\n", "", "empty"),
    (YES_NO, "D", "D", "out of range"),                                  # handed over: the official rule decides
    (YES_NO, "The answer is (F).", "F", "out of range"),
    (ANGLE, "Therefore, the angle is 90°.", "Therefore, the angle is 90°.", "nothing"),
    (ANIMAL, "I can't help with that.", "I can't help with that.", "nothing"),
    (COUNT, "Sorry, there is no image.", "Sorry, there is no image.", "nothing"),
    (ANIMAL, "The web has no mice. Therefore, the answer cannot be determined.",
     "The web has no mice. Therefore, the answer cannot be determined.", "nothing"),
    (YES_NO, "The answer would be (A) Yes. Without the image, it is not possible to tell.",
     "The answer would be (A) Yes. Without the image, it is not possible to tell.", "nothing"),
    (COUNT, "There are 8 cubes in total. So the answer is N/A.", "There are 8 cubes in total. So the answer is N/A.",
     "nothing"),
    (ANGLE, "(A) 30°\n(B) 45°\n(C) 60°\n(D) 75°", "(A) 30°\n(B) 45°\n(C) 60°\n(D) 75°", "nothing"),
    (YES_NO, "The image is of a bus and a truck.", "The image is of a bus and a truck.", "nothing"),
    (COUNT, "There are one hundred five cubes.", "There are one hundred five cubes.", "nothing"),
    (ANGLE, "It is wide; none of the options is right.", "It is wide; none of the options is right.", "nothing"),
    (ANGLE, "So the answer is not among the choices.", "So the answer is not among the choices.", "nothing"),
])
def test_extract_says_when_there_is_no_answer(item, response, expected, rule):
    assert extract(response, item) == (expected, rule)


def test_extract_an_option_may_say_that_there_is_no_answer():
    assert extract("Therefore, we can't tell.", CHANGE) == ("D", "concluded")


SKELETON = """### Image Description: A figure with options (B) and (A), an angle of 45° and 12 objects.
### Rationales: Option (A) looks close, and some would say the answer is 99. 有人会选 B。
### Let's think step by step.
### Step 1: If the answer is (B), then x = 7, which is wrong.
### Step 2: Option C is not correct. 3 + 4 = 7. 答案不是 A。
"""
ENDINGS = [
    "### The final answer is: {}", "### The final answer is:\n{}\n", "**The final answer is: {}**",
    "### The final answer is: {}.", "### The final answer is: $\\boxed{{{}}}$", "### The final answer is: **{}**",
    "The final answer is: {}", "So \\boxed{{{}}}", "<answer>{}</answer>", "### The final answer is: {}<|im_end|>",
    "### The final answer is: 99\n### The final answer is: {}",
]


def spellings(item, value):
    """How a model may write the value, an option's text or a number, in the answer section."""
    if item.kind == "choice":
        letter = chr(ord("A") + item.choices.index(value))
        return [letter, f"({letter})", f"{letter}. {value}", f"({letter}) {value}", value, f"Option {letter}"]
    if item.kind == "list":
        return [value]
    numbers = [value, f"${value}$", f"{value} cm", f"{value}%", f"x = {value}", f"{value}°"]
    return numbers + ([f"{value}.0", f"{int(value):,}"] if item.kind == "integer" else [])


def wrapped(item, values):
    """[(value, response)]: every spelling of every value in every ending, after reasoning full of decoys."""
    return [(value, SKELETON + ending.format(spelling)) for value in values
            for spelling in spellings(item, value) for ending in ENDINGS]


@pytest.mark.parametrize("item", [ANGLE, YES_NO, ANIMAL, CHANGE, BLANK, ODDS, CHINESE, EIGHT])
def test_extract_reads_the_trained_format_past_every_decoy(item):
    for value, response in wrapped(item, item.choices):
        assert extract(response, item)[0] == chr(ord("A") + item.choices.index(value)), response


@pytest.mark.parametrize("item, values", [
    (COUNT, ("0", "5", "-3", "1234567")), (LENGTH, ("0.12", "-7.5", "1234.5")), (CORNER, ("[1, 2]", "[0.5, -3]"))])
def test_extract_reads_numbers_in_the_trained_format(item, values):
    for value, response in wrapped(item, values):
        assert extract(response, item)[0] == value, response


def test_extract_options_in_parentheses_are_read_as_letters_only_in_capitals():
    shuffled = Item("1", "Which picture?", "choice", ("(c)", "(a)", "(b)"))
    assert extract("### The final answer is: (b)", shuffled)[0] == "C"                 # the third option's text
    assert extract("### The final answer is: (B)", shuffled)[0] == "B"                 # the second option


@pytest.mark.parametrize("cut", range(1, 6))
def test_extract_a_response_cut_before_its_answer_section_has_no_answer(cut):
    response = "".join(SKELETON.splitlines(keepends=True)[:cut])
    assert extract(response, ANGLE) == ("", "unfinished")
    assert extract(response + "### The final answer is:", COUNT) == ("", "unfinished")


@pytest.mark.parametrize("item, response, expected", STYLES)
def test_extract_ignores_spaces_and_end_tokens(item, response, expected):
    windows = response.replace("\n", "\r\n")
    for same in (response + "<|im_end|>", response + " \n\n", "\n " + response + "</s>", windows):
        assert extract(same, item) == extract(response, item)


@pytest.mark.parametrize("item, response, expected", STYLES)
def test_extract_does_not_look_at_pid_or_gold(item, response, expected):
    other = Item("999", item.question, item.kind, item.choices, "gold", item.precision)
    assert extract(response, other) == extract(response, item)


def test_extract_reads_only_the_section_whatever_stands_before_it():
    for item, _, expected in STYLES:
        assert extract(SKELETON + f"### The final answer is: {expected}", item)[0] == expected


def test_extract_follows_the_options_when_their_order_changes():
    for order in [(1, 0, 3, 2), (3, 2, 1, 0), (2, 3, 0, 1)]:
        turned = Item("1", ANGLE.question, "choice", tuple(ANGLE.choices[i] for i in order))
        for value in ANGLE.choices:
            response = f"So the angle is {value}."
            assert turned.choices["ABCD".index(extract(response, turned)[0])] == value


PIECES = [
    "the answer is ", "answer", "(A)", "A", "### ", "**", "*", "\\boxed{", "{", "}", "[", "]", "1", "1,", "-", "=",
    "1/", "10^{", "\n", " ", "\t", "The final answer is", "### The final answer is:", "<answer>", "</answer>", "not ",
    "is ", "if ", "$", "option A is ", "\\frac{", "。", "答案", "选", "\\text{", "√", "one ", "twenty-", "1e9",
    "9" * 50, ".", "? ", "yes no ", "Step 1: ", "#", "_", "x10^", " than ", "\nQuestion:", "\x00", "\ud800",
    "²", "٣", "İ",
    "1/0", "cannot be determined. ",
]
KINDS = [ANGLE, YES_NO, EIGHT, ODDS, COUNT, AGE, LENGTH, YEAR, CORNER, ILLUSION, FORMULA,
         Item("1", "", "choice", ("", "(a)", "a"))]


def test_extract_survives_any_text_and_is_deterministic():
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 40)))
        for item in KINDS:
            extraction, rule = extract(text, item)
            assert isinstance(extraction, str) and rule
            assert (extraction, rule) == extract(text, item)


# What comes before, what is repeated, what comes after.
HOSTILE = [("", piece, "") for piece in (
    *"*$`\"' \n(#~^\\-.½²Ａ٣\u200b\ud800", "\n ", "\n\n ", " \n* ", "\u2028\n", "*!", "#*", "#>", "###", "### Step 1",
    "The final", "### The final answer is", "(A", "A ", "\\boxed{\\text{", "\\frac{", "\\frac{1}", "^(", "^{",
    "sqrt(", "{\\bf ", "minus ", "1 000 ", "1/1/", "1/0", "one hundred and ", "e1", "[1,", "a. ", "答案：", "<|a",
    "</s", "<answer>*", "&lt;", "[SEP", "e\u0301", "1 °", "is 1 ", "option A is ", "not (A) ", "9" * 50, "\nQuestion:",
    "ï¼œ")]
HOSTILE += [(before, piece, "!") for piece in ("*", "$", "`", '"', "'", "\\text{", "*$`", " a")
            for before in ("the answer is ", "so the correct option is (", "### The final answer is: ")]
READERS = {
    "parse": parse, "key words": lambda text: rewards.keyword_reward(text, ("red", "a*", "1", "[A]")),
    "caption": rewards.caption, "structured": structured, "numbers": numbers,
    "correct": lambda text: correct(text, "7"), "letter": lambda text: correct(text, "B", ("1", "2", "3")),
    "expressions": lambda text: expressions(text, "x+1"),
    "release": lambda text: rewards.release_parts([Sample("q", "?", key_words=("red", "<"))], [text], None, 0.4),
    "clean": clean.__wrapped__, "tidy": tidy} | {
    item.kind + item.pid: lambda text, item=item: extract(text, item)
    for item in (ANGLE, YES_NO, COUNT, CORNER, FORMULA, ILLUSION)}


def seconds(reader, text: str) -> float:
    """Processor time, which a busy machine does not change much; no garbage of other tests is collected within."""
    sentences.cache_clear()
    start = time.process_time()
    reader(text)
    return time.process_time() - start


@pytest.mark.parametrize("name", READERS)
def test_reading_takes_time_linear_in_hostile_text(name):
    """From 4 to 16 thousand characters: 4 times the time if it is linear, 16 times if quadratic. What costs no more
    than 10 times as much as an ordinary text of that length, read in the same run, is not told from noise."""
    reader, gc_was_on = READERS[name], gc.isenabled()
    gc.disable()
    try:
        ordinary = "The red cube is 3.5 cm high. " * 552
        twin = min(seconds(reader, ordinary) for _ in range(3))
        for before, piece, after in HOSTILE:
            texts = [before + (piece * size)[:size] + after for size in (1000, 4000, 16_000)]
            for _ in range(3):
                short, middle, long = (seconds(reader, text) for text in texts)
                if linear := middle <= 8 * short + 10 * twin and long <= 8 * middle + 10 * twin:
                    break
            assert linear, (before, piece, short, middle, long, twin)
    finally:
        gc.enable() if gc_was_on else None


def test_megabytes_are_cut_where_reading_begins():
    for text in ("7" * 10**6, "### The final answer is: " + "B" * 10**6, "\ud800" * 10**5, "*\n" * 10**5):
        for reader in READERS.values():
            reader(text) if reader not in (numbers, structured, clean.__wrapped__, expressions) else None
    assert rewards.keyword_reward("a red circle", ("x" * 10**7, "red")) == 0.5
    assert rewards.keyword_reward("a red circle", tuple(f"red {i}" for i in range(100_000))) == 0
    assert len(cut("x" * 10**6)) == MAX_TEXT + 1


# ---------------------------------------------------------------- one reader: what is right is what is read

PLACES = ("### The final answer is: {}", "### The final answer is:\n{}\n", "**The final answer is: {}**",
          "<answer>{}</answer>", "### The final answer is: $\\boxed{{{}}}$", "### The final answer is: {}<|im_end|>")
FULL_WIDTH = str.maketrans("0123456789-./", "０１２３４５６７８９－．／")


def magnitude(value: Fraction) -> list[str]:
    """Spellings of a positive number."""
    top, bottom = value.numerator, value.denominator
    if bottom > 1:
        whole, rest = divmod(top, bottom)
        forms = [rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac {{{top}}}{{{bottom}}}", f"{top}/{bottom}",
                 f"{top} / {bottom}", rf"\tfrac{{{2 * top}}}{{{2 * bottom}}}",
                 rf"\frac{{{top}}}{bottom}" if bottom < 10 else f"{top}/{bottom}"]
        if whole:
            forms += [f"{whole} {rest}/{bottom}", rf"{whole}\frac{{{rest}}}{{{bottom}}}"]
        return forms + ([f"{whole or ''}½"] if value % 1 == Fraction(1, 2) else [])
    digits = str(top)
    forms = [digits, f"{top:,}", f"{top:,}".replace(",", " "), f"{top:,}".replace(",", "{,}"), f"{top}.0",
             f"{2 * top}/2", rf"{top} \times 10^0", f"{top}e0", rf"\sqrt{{{top * top}}}", rf"\text{{{top}}}",
             digits.translate(FULL_WIDTH), "\u200b".join(digits)]
    forms += [f"{top // 100}×10²", rf"{top // 100} \cdot 10^{{2}}"] * (top % 100 == 0)
    words = {3: "three", 5: "five", 25: "twenty five"}
    return forms + ([words[top], words[top].replace("y f", "y-f").capitalize()] if top in words else [])


def numbers_spelled(value: Fraction) -> list[str]:
    signs = ("-", "- ", "−", "—", "－", "minus ", "negative ") if value < 0 else ("",)
    forms = [sign + form for form in magnitude(abs(value)) for sign in signs
             if sign.strip("-−—－ ") == "" or not form[0].isalpha() and not form.startswith(("\\text", "{", "½"))]
    around = ("{}", "${}$", "**{}**", "x = {}", "{} cm", r"{}\,\text{{m}}", "“{}”", "{}.", r"\fbox{{{}}}", "{}°")
    return [frame.format(form) for form in forms for frame in around if "cm" not in frame or not form.startswith("$")]


VALUES = [Fraction(value) for value in (5, -3, 25, -100, 500, 1000, -12345, 1234567)]
VALUES += [Fraction(value) for value in ("3/4", "-3/4", "1/2", "-5/2", "7/4", "-1/3", "22/7")]
LETTERED = ("{}", "({})", "{}.", "**{}**", "[{}]", r"\text{{{}}}", "Option {}", "（{}）", "“{}”", r"\mathrm{{{}}}",
            "\ufeff{}")


def read(spelling, item, place):
    """(what the evaluation reads, what the reward reads) of a response that ends with this spelling."""
    response = SKELETON + place.format(spelling)
    return extract(response, item)[0], parse(response).answer or spelling


def test_what_is_right_is_what_is_read_and_what_is_read_is_right():
    """Of every spelling of every value, in every place: `correct` accepts it where `extract` reads the value, and what
    `extract` writes is `correct` itself. 500 of them are drawn; 98 of 100 must be accepted by both."""
    draw, accepted = random.Random(0), 0
    for _ in range(500):
        place = draw.choice(PLACES)
        if draw.random() < 0.8:
            value = draw.choice(VALUES)
            spelling, item, gold = draw.choice(numbers_spelled(value)), LENGTH, str(value)
            extraction, answer = read(spelling, item, place)
            try:
                same = abs(Fraction(extraction) - value) < 1e-9 * abs(value)
            except ValueError:
                same = False
            assert not same or correct(extraction, gold)
        else:
            gold = draw.choice("ABCD")
            spelling = draw.choice(LETTERED).format(gold)
            extraction, answer = read(spelling, ANGLE, place)
            same = extraction == gold
        assert correct(answer, gold) == correct(spelling, gold) == same, (spelling, place, gold, extraction)
        accepted += same
    assert accepted >= 490


def changed(draw, value: str) -> str:
    """One digit, sign, exponent, unit or letter other than it was."""
    place = draw.choice([i for i, character in enumerate(value) if character.isalnum() or character in "-./:^"])
    others = {True: "0123456789", value[place].isalpha(): "ABCDEFGHkmx"}.get(True) if value[place].isalnum() else "+-./"
    return value[:place] + draw.choice([other for other in others if other != value[place]]) + value[place + 1 :]


WRONG = ["12", "-3", "0.75", "3/4", "1,000", "25 cm", "36 km/h", "10^3", "1.2e3", "5:30", "2^5", "B", "AC", "x^2+1",
         r"\frac{3}{4}", r"-\frac{1}{2}", "[1, 2]", "(3, 4)", "30°", "50%", r"\theta", "2 1/2", "H2O", "5 kg"]


def value_of(text):
    """An independent reading of the plainer ones, to leave out the changes that change nothing."""
    text = re.sub(r"\\frac\{(.*?)\}\{(.*?)\}", r"\1/\2", re.sub(r"[,+ ]|\.(?!\d)", "", text))
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text.casefold()


def test_500_answers_with_one_sign_changed_are_wrong_on_both_sides():
    draw, tried = random.Random(1), 0
    while tried < 500:
        gold = draw.choice(WRONG)
        wrong = changed(draw, gold)
        if value_of(wrong) == value_of(gold) or not re.search(r"\w", wrong):
            continue
        tried += 1
        assert not correct(wrong, gold), (wrong, gold)
        if isinstance(value_of(gold), Fraction):
            assert extract("### The final answer is: " + wrong, LENGTH)[0] != bare_number(value_of(gold)), (wrong, gold)
