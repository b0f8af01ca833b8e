"""One response, every part of its reward, and why: the body of `python rewards.py`.

    python rewards.py --response answer.txt --image 1.png --answer 7 --key_words "red circle,blue square" --clip DIR
    echo "### .." | python rewards.py --response - --answer 7
"""
import os
import sys
from dataclasses import asdict, dataclass

import data
import rewards
import train
from data import InputError, printable
from engine.clip import load_clip
from engine.weights import find_model, load_processor
from grading.algebra import check_rule
from grading.equal import clean, correct
from plumbing.flags import Flags, complain, refuse


@dataclass(frozen=True)
class Playground:
    """Settings of rewards.py; those of the reward are as in training."""

    # data
    response: str = ""  # a file, the text itself, or - for standard input
    question: str = "(not given)"  # a key word that it names is no sign of seeing
    answer: str = "(not given)"  # gold
    key_words: str = ""  # with commas between
    choices: str = ""  # of a multiple-choice question, as a list: ["3", "4"]
    image: str = ""  # what the description is compared with, if there is a --clip
    model: str = ""  # whose tokens count; empty: one for each 4 characters, about
    # rewards
    clip: str = ""  # as in training; empty: the clip part is 0
    clip_target: float = train.Config.clip_target  # cosine that earns the whole clip part
    length_limit: int = train.Config.length_limit  # tokens up to which the length part is 1
    keyword_scope: str = train.Config.keyword_scope  # where key words count: description, or response
    grader: str = train.Config.grader  # the accuracy rule: own, or release


def read_response(given: str) -> str:
    if given == "-":
        return sys.stdin.read()
    if not os.path.isfile(given):
        return given
    with open(given, encoding="utf-8", errors="replace") as file:
        return file.read()


def listed(sections: data.Sections) -> dict[str, str | None]:
    """Header -> what stands below it, as `format_reward` wants them."""
    steps = {f"{data.STEP} {i}": step for i, step in enumerate(sections.steps or [None], 1)}
    return {data.DESCRIPTION: sections.description, data.RATIONALES: sections.rationales, **steps,
            data.ANSWER: sections.answer}


def why(config: Playground, sample: data.Sample, text: str, tokens: int, cosine: float | None) -> dict[str, str]:
    """Of each part what it was computed from."""
    sections = data.parse(text)
    scope = text if config.keyword_scope == "response" else sections.description or ""
    hit = [word for word in sample.key_words if rewards.keyword_reward(scope, (word,))]
    missed = [word for word in sample.key_words if word not in hit]
    named = [word for word in hit if rewards.keyword_reward(config.question, (word,))]
    lacking = [name for name, below in listed(sections).items() if below is None]
    compared = "no final answer, or two different ones"
    if config.grader == "release":
        compared = "the release's own rule, see --help"
    elif sections.answer:
        same = ("the same by the rules" if correct(sections.answer, sample.answer, sample.choices) else
                "the same by algebra" if rewards.accuracy_reward(sections.answer, sample) else "not the same")
        compared = f"{clean(sections.answer)!r} and {clean(sample.answer)!r}: {same}"
    return {"clip": "no --clip" if cosine is None else f"cosine {cosine:.3f}; 1 from {config.clip_target:g} on",
            "keyword": f"hit: {', '.join(hit) or 'none'}; missed: {', '.join(missed) or 'none'}"
                       + (f"; the question itself names: {', '.join(named)}" if named else ""),
            "format": f"missing: {', '.join(lacking)}" if lacking else f"all sections, {len(sections.steps)} steps",
            "length": f"{tokens} tokens{'' if config.model else ' (about)'}; 1 up to {config.length_limit}",
            "accuracy": compared}


def show(config: Playground):
    """Prints the response's sections, its parts, why each is what it is, and both stages' sums."""
    refuse([(bool(config.response), "--response is missing: give a file, the text, or - for standard input"),
            (not config.clip or bool(config.image), "--clip compares with an image: give --image as well")])
    check_rule(config.grader)
    sample = data.sample_from_row(asdict(config), "the command line", "0", ".")
    for image in sample.images:
        data.image_size(image)
    text = read_response(config.response)
    tokens = len(text) // 4 + 1
    if config.model:
        tokens = len(load_processor(find_model(config.model), 784, 784, log=print).tokenizer(text).input_ids)
    clip = load_clip(config.clip, "cpu") if config.clip else None
    sections = data.parse(text)
    cosine = clip and clip.score([sample.images], [rewards.caption(sections.description)]).item()
    for name, below in listed(sections).items():
        print(f"{name:<22}{'(missing)' if below is None else printable(below)[:90] or '(empty)'}")
    settings = (config.clip_target, config.length_limit, config.keyword_scope, config.grader)
    _, parts = rewards.score([sample], [text], [tokens], {}, clip, *settings)
    for part, reason in why(config, sample, text, tokens, cosine).items():
        print(f"{part:<10}{parts[part].item():6.3f}   {printable(reason)}")
    for stage in ("1", "2"):
        weights = {part: train.STAGES[stage].get(f"{part}_weight", 0.0) for part in parts}
        total = sum(weight * parts[part].item() for part, weight in weights.items())
        print(f"stage {stage:<4}{total:6.3f}   = " + " + ".join(f"{w:g} {part}" for part, w in weights.items() if w))


def main() -> int:
    try:
        show(Flags(Playground, __doc__).read(sys.argv[1:], {}))
    except InputError as error:
        return complain(error)
    return 0
