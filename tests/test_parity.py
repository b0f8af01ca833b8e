"""--parity release is the authors' release: every reward part of 3,500 generated responses, its prompt and settings.

`published` is written from the rules that the release's reward files (pebr_1.py, pebr_2.py) state, apart from ours.
"""
import hashlib
import random
import re

import pytest
import torch

import rewards
from data import INSTRUCTION, Sample, batches, chat_text, encode_solution
from plumbing.release import RELEASE, RELEASE_PROMPT, prompt_id
from train import STAGES, Config, group_advantages, read_config

pytestmark = pytest.mark.fast

# ---------------------------------------------------------------- 3,500 responses in 50 shapes

HEADERS = ["### {}:", "###{}:", "### {}", "#### {}:", "###\n{}:", "### **{}:**", "### {}：", "## {}:", "### {} :", "{}:"]
SECTIONS = ["Image Description", "Rationales", "Let's think step by step.", "Step 1", "Step 2", "The final answer is"]
STRUCTURES = {  # of the places in SECTIONS, and what stands between two sections
    "one a line": ([0, 1, 2, 3, 4, 5], "\n"), "all in one line": ([0, 1, 3, 4, 5], " "),
    "no rationales": ([0, 2, 3, 4, 5], "\n\n"), "answered first and last": ([5, 0, 1, 3, 5], "\n"),
    "described twice, answered twice": ([0, 0, 1, 3, 0, 1, 5, 5], "\n")}
SHAPES = [(header, structure) for header in HEADERS for structure in STRUCTURES]
TEXTS = ["", "  ", "A red circle.", "rendered squares", "x < 3 and y > 5", "1 / 2 of it", "<end_of_text> blue", "Tom's 10,000",
         "a\nb\n\nc", "it is 7", "### Notes: a Red square", "一个红色圆形", "&amp; </s>", "RED RED red", "\u00a0<\u2003", "  /\n/  "]
ANSWERS = {  # gold: how it is written, well or badly
    "7": ["7", "**7**", "\n7", "7\nbecause", "7 cm", "\\boxed{7}", "$7$", "x = 7", "7 or 8", "the 7", "seven", "", "7.", "8"],
    "B": ["B", "(B)", "B. 12", "b", "\\text{B}", "A", "B and C"], " 12 ": ["12", "12°", "12 degrees", "12.0", "21", "\t 12\n"],
    "1/2": ["1 / 2", "0.5", "\\frac{1}{2}", "1/2", "\\frac12", "50%", "2 / 4", "1/3"], "x<3": ["x < 3", "x<3", "x <\n3", "3 > x"],
    "1000": ["1,000", "1000", "1 000", "10^3"], "\\sqrt{8}": ["2\\sqrt{2}", "2 \\sqrt 2", "\\sqrt{8}", "√8"]}
KEY_WORDS = ["red", "RED", "circle", "1/2", "1 / 2", "7", "10", "x<3", "红色", "square", "Tom's", "image", "red circle"]


def written(rng, header, structure, answers):
    """A response in this shape; now and then in another case, with a text in front of it, or without any section."""
    places, between = STRUCTURES[structure]
    if rng.random() < 0.05:
        return rng.choice(answers)
    names = [SECTIONS[place] for place in places]
    names = rng.choice([names, names, names, [name.lower() for name in names], [name.upper() for name in names]])
    parts = [header.format(name) + rng.choice([" ", "\n", ""]) + rng.choice(answers if place == 5 else TEXTS)
             for place, name in zip(places, names)]
    return rng.choice(["", "", rng.choice(TEXTS) + "\n"]) + between.join(parts)


@pytest.fixture(scope="module")
def generated():
    """Of each response: its question, its text, its tokens. 70 in each shape."""
    rng, rows = random.Random(0), []
    for i, (header, structure) in enumerate(SHAPES * 70):
        images = tuple(f"{i}-{k}.png" for k in range(rng.choice([1, 1, 1, 2])))
        key_words = tuple(rng.choices(KEY_WORDS, k=rng.randint(0, 4)))  # some of them twice
        gold = rng.choice(list(ANSWERS))
        response = written(rng, header, structure, ANSWERS[gold])
        rows.append((Sample(str(i), "?", images, gold, key_words), response, rng.randint(1, 2048)))
    assert len(rows) == 3500 and len(set(SHAPES)) == 50
    return rows


# ---------------------------------------------------------------- the published rules


def cosine(image, text):
    """Of a pretended CLIP: from -.5 to .7, of any text, the empty one as well."""
    return int(hashlib.md5(f"{image} {text}".encode()).hexdigest(), 16) % 1201 / 1000 - 0.5


class PretendedClip:
    def score(self, images, texts, empty=False):
        return torch.tensor([sum(cosine(image, text) for image in group) / len(group) if text or empty else 0.0
                             for group, text in zip(images, texts)])


def squeezed(text):
    """Every run of spaces beside a <, > or / is gone."""
    for sign in "<>/":
        text = sign.join(piece.strip() if 0 < i < text.count(sign) else piece.rstrip() if i == 0 else piece.lstrip()
                         for i, piece in enumerate(text.split(sign))) if sign in text else text
    return text


def published(sample, response, tokens, grade):
    """Each part as the reward files of the release say."""
    text = squeezed(response)
    asked = [r"image description", r"rationales", r"step\s*1", r"the final answer is"]
    there = [re.search(rf"(?i)###\s*{name}:", text) is not None for name in asked]
    between = re.search(r"(?is)###\s*image description:\s*(.*?)###\s*rationales:", text)
    paid = cosine(sample.images[0], between[1].strip() if between else "") / 0.4
    lowered, words = text.lower(), sample.key_words
    line = text.partition("### The final answer is:")[2].lstrip().split("\n")[0].strip()
    given = line if "### The final answer is:" in text else text.strip()
    return {"clip": min(paid, 1.0), "format": float(all(there)), "length": 1.0 if tokens <= 512 else 512 / tokens,
            "keyword": sum(lowered.count(word.lower()) > 0 for word in words) / len(words) if words else 0.0,
            "accuracy": float(grade(given, sample.answer.strip()))}


def ours(generated, **switches):
    samples, responses, lengths = zip(*generated)
    return rewards.score(list(samples), list(responses), list(lengths), {}, PretendedClip(), **switches)[1]


@pytest.mark.parametrize("part", ["clip", "keyword", "format", "length"])
def test_every_part_is_that_of_the_published_rules(generated, part):
    expected = [published(*row, lambda given, gold: 0)[part] for row in generated]
    assert len(set(expected)) > 1
    torch.testing.assert_close(ours(generated, rules="release")[part], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_accuracy_is_that_of_the_published_rule(generated):
    grade_answer = pytest.importorskip("mathruler.grader", reason="the release's grader is not installed").grade_answer
    expected = [published(*row, grade_answer)["accuracy"] for row in generated]
    assert 0.05 < sum(expected) / len(expected) < 0.95
    assert ours(generated, grader="release")["accuracy"].tolist() == expected
