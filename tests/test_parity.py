"""--parity release is the authors' release: every reward part of 3,500 generated responses, its prompt and settings.

`published` is written from the rules that the release's reward files (pebr_1.py, pebr_2.py) state, apart from ours.
"""
import dataclasses
import hashlib
import json
import random
import re

import pytest
import torch

import eval as evaluation
import rewards
import train
from data import INSTRUCTION, InputError, Sample, batches, chat_text, encode_solution
from grading.equal import correct
from plumbing import filters
from plumbing.release import RELEASE, RELEASE_PROMPT, prompt_id
from test_train import questions, stage_1
from train import STAGES, Config, group_advantages, read_config

__all__ = ["questions"]  # a fixture: rows of stage 1

pytestmark = pytest.mark.fast

# ---------------------------------------------------------------- 3,500 responses in 50 shapes

HEADERS = ["### {}:", "###{}:", "### {}", "#### {}:", "###\n{}:", "### **{}:**", "### {}：", "## {}:", "### {} :",
           "{}:"]
SECTIONS = ["Image Description", "Rationales", "Let's think step by step.", "Step 1", "Step 2", "The final answer is"]
STRUCTURES = {  # of the places in SECTIONS, and what stands between two sections
    "one a line": ([0, 1, 2, 3, 4, 5], "\n"), "all in one line": ([0, 1, 3, 4, 5], " "),
    "no rationales": ([0, 2, 3, 4, 5], "\n\n"), "answered first and last": ([5, 0, 1, 3, 5], "\n"),
    "described twice, answered twice": ([0, 0, 1, 3, 0, 1, 5, 5], "\n")}
SHAPES = [(header, structure) for header in HEADERS for structure in STRUCTURES]
TEXTS = ["", "  ", "A red circle.", "rendered squares", "x < 3 and y > 5", "1 / 2 of it", "<end_of_text> blue",
         "Tom's 10,000", "a\nb\n\nc", "it is 7", "### Notes: a Red square", "一个红色圆形", "&amp; </s>", "RED RED red",
         "\u00a0<\u2003", "  /\n/  "]
ANSWERS = {  # gold: how it is written, well or badly
    "7": ["7", "**7**", "\n7", "7\nbecause", "7 cm", "\\boxed{7}", "$7$", "x = 7", "7 or 8", "the 7", "seven", "",
          "7.", "8"],
    "B": ["B", "(B)", "B. 12", "b", "\\text{B}", "A", "B and C"],
    " 12 ": ["12", "12°", "12 degrees", "12.0", "21", "\t 12\n"],
    "1/2": ["1 / 2", "0.5", "\\frac{1}{2}", "1/2", "\\frac12", "50%", "2 / 4", "1/3"],
    "x<3": ["x < 3", "x<3", "x <\n3", "3 > x"],
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


def test_every_part_is_that_of_the_published_rules(generated):
    """Exact but for the last bit of a float32. By our own rules all but the length differ, of the first 500 as well."""
    expected = [published(*row, lambda given, gold: 0) for row in generated]
    release, own = ours(generated, rules="release"), ours(generated[:500])
    for part in ("clip", "keyword", "format", "length"):
        wanted = torch.tensor([row[part] for row in expected])
        torch.testing.assert_close(release[part], wanted, rtol=1e-6, atol=1e-6)
        assert ((own[part] - wanted[:500]).abs() > 1e-5).float().mean() > 0.2 or part == "length"


def test_accuracy_is_that_of_the_published_rule(generated):
    grade_answer = pytest.importorskip("mathruler.grader", reason="the release's grader is not installed").grade_answer
    expected = [published(*row, grade_answer)["accuracy"] for row in generated]
    assert 0.05 < sum(expected) / len(expected) < 0.95
    assert ours(generated, grader="release")["accuracy"].tolist() == expected


def test_below_zero_a_cosine_pays_less_than_nothing_of_the_first_image_and_the_empty_text():
    """-.2 / .4 = -.5; .1 / .4 = .25; .6 is bounded: 1. Ours: 0, .25 of both images' mean, 1, and 0 without a text."""
    class Clip:
        def score(self, images, texts, empty=False):
            known = {"a": -0.2, "b": 0.1, "c": 0.6, "": 0.3 if empty else 0.0}
            return torch.tensor([known[text] for text, group in zip(texts, images) if group == images[0]])

    responses = [f"### Image Description: {text} ### Rationales:" for text in "abc"] + ["a ### Rationales: without"]
    samples = [Sample(str(i), "?", ("1.png",)) for i in range(4)]
    for rules, expected in (("release", [-0.5, 0.25, 1.0, 0.75]), ("own", [0.0, 0.25, 1.0, 0.0])):
        _, parts = rewards.score(samples, responses, [1] * 4, {}, Clip(), rules=rules)
        torch.testing.assert_close(parts["clip"], torch.tensor(expected))


# ---------------------------------------------------------------- the prompt, the settings, the batches


def test_prompt_release_is_the_published_template():
    """A digest of pebr_format.jinja as it was published, so that no word of it can change."""
    template = (RELEASE_PROMPT + "{{ content | trim }}").encode()
    assert hashlib.sha256(template).hexdigest() == "f09ecff8286217a697d3c0d2713aa841eff79bebb512381d4e454b33024a669e"
    assert prompt_id("release") != prompt_id("own") == hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:8]


PAD = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("question, images, asked", [
    ("<image>How many? ", 1, PAD + "How many?"), ("How many?", 2, PAD + PAD + "How many?"),
    (" Is <image> in <image>", 2, f"Is {PAD} in {PAD}"), ("2 + 2?", 0, "2 + 2?")])
def test_prompt_release_has_the_images_after_the_instruction(processor, monkeypatch, question, images, asked):
    monkeypatch.setattr(processor, "release_prompt", RELEASE_PROMPT)
    text = chat_text(Sample("1", question, ("x.png",) * images), processor)
    assert RELEASE_PROMPT + asked + "<|im_end|>" in text


@pytest.mark.parametrize("stage", STAGES)
def test_parity_is_over_the_stage_and_under_the_command_line(tmp_path, stage):
    inputs = ["--stage", stage, "--model", str(tmp_path), "--data", str(tmp_path)]
    same, other = read_config([*inputs, "--parity=release"]), read_config([*inputs, "--parity", "release"])
    plain, mixed = read_config(inputs), read_config([*inputs, "--parity", "release", "--prompt", "own"])
    changed = {name for name, value in vars(plain).items() if getattr(same, name) != value}
    assert same == other and changed == {"parity", *RELEASE[stage]} and mixed.prompt == "own"
    assert {name: getattr(same, name) for name in RELEASE[stage]} == RELEASE[stage]
    assert all(getattr(plain, name) == getattr(Config(), name) for name in ("prompt", "rules", "grader", "drop_last"))


def test_advantages_in_float32_turn_the_rounding_of_equal_rewards_into_a_signal():
    """In float32 the mean of eight times .9 is off by 6e-8, and 6e-8 / (6e-8 + 1e-6) is .056."""
    equal = torch.full((1, 8), 0.9)
    assert group_advantages(equal).abs().max() == 0
    assert group_advantages(equal, "float32").abs().max().item() == pytest.approx(0.056, abs=0.001)


def test_a_batch_spans_no_epochs_where_the_last_one_is_dropped():
    """10 samples, batches of 4: two an epoch, with 2 left over; otherwise 20 indices make 5."""
    assert len(batches(10, 4, 2, 0)) == 5
    dropped = batches(10, 4, 2, 0, drop_last=True)
    assert len(dropped) == 4 and len({*dropped[0], *dropped[1]}) == len({*dropped[2], *dropped[3]}) == 8


def test_a_solution_is_cut_to_the_room_that_the_prompt_leaves(processor):
    sample = Sample("1", "q", solution="### Step 1: two and two are four.")
    whole = encode_solution(sample, processor)
    assert encode_solution(sample, processor, -30) == whole  # no cutoff: 0 less the prompt
    assert encode_solution(sample, processor, 3) == whole[:3] and encode_solution(sample, processor, 99) == whole


@pytest.mark.parametrize("cutoff, refused", [
    ("0", False), ("2049", False), ("4096", False), ("2048", True), ("4097", True)])
def test_a_cutoff_leaves_room_for_a_solution_and_fits_the_memory_plan(tmp_path, cutoff, refused):
    argv = ["--stage", "sft", "--model", str(tmp_path), "--data", str(tmp_path), "--cutoff", cutoff]
    if not refused:
        assert read_config(argv).cutoff == int(cutoff)
        return
    with pytest.raises(InputError, match=f"--cutoff {cutoff} is not over --max_prompt, or is over"):
        read_config(argv)


def test_sampling_drops_the_last_partial_batch_and_says_so(tmp_path):
    """10 questions, batches of 4: 8 are asked, in the order of the file."""
    samples, said = [Sample(str(i), "?", answer="7") for i in range(10)], []
    config = Config(stage="sample", data="a.json", questions_per_rollout=4)
    assert filters.usable(samples, config, None, correct, said.append) == samples
    kept = filters.usable(samples, dataclasses.replace(config, drop_last=True), None, correct, said.append)
    assert len(kept) == 8 and kept == [sample for sample in samples if sample in kept]
    assert said[-1] == "left out: 2 questions that fill no batch of 4"


def test_a_stage_trains_by_the_release_s_choices_and_a_report_has_the_prompt_s_id(tiny_folder, questions, tmp_path):
    """With our accuracy rule, since theirs needs mathruler. Their prompt is the longer one."""
    argv = stage_1(tiny_folder, questions, tmp_path, "--parity", "release", "--grader", "own", "--max_prompt", "600")
    assert train.main(argv) == 0
    settings = json.loads((tmp_path / "stage1" / "config.json").read_text())
    assert [settings[name] for name in ("prompt", "rules", "grader")] == ["release", "release", "own"]
    asked = ["--model", str(tmp_path / "stage1" / "model"), "--data", questions, "--out", str(tmp_path / "out")]
    asked += ["--prompt", "release", "--max_prompt", "600", "--max_response", "2", "--max_pixels", "12544"]
    assert evaluation.main([*asked, "--min_pixels", "784", "--dtype", "float32"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["prompt_id"] == prompt_id("release")
