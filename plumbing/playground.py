"""One response, every part of its reward, and why: the body of `python rewards.py`.

    python rewards.py --response answer.txt --image 1.png --answer 7 --key_words "red circle,blue square" --clip DIR
"""
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import data
import rewards
import train
from data import InputError, printable
from engine.clip import load_clip
from grading.equal import clean
from plumbing.flags import Flags, complain, refuse


@dataclass(frozen=True)
class Playground:
    """Settings of rewards.py; those of the reward are training's defaults."""

    response: str = ""  # a file, or the text itself
    answer: str = "(not given)"  # gold
    key_words: str = ""  # with commas between
    choices: str = ""  # of a multiple-choice question, as a list: ["3", "4"]
    image: str = ""  # what the description is compared with, if there is a --clip
    clip: str = ""  # as in training; empty: the clip part is 0


def show(config: Playground):
    """Prints the response's sections, its parts, what they were made from, and both stages' sums."""
    refuse([(bool(config.response), "--response is missing: give a file, or the text"),
            (bool(config.clip) == bool(config.image), "--clip and --image are compared: give both, or neither")])
    sample = data.sample_from_row({"question": "(not given)", **asdict(config)}, "the command line", "0", ".")
    path = Path(config.response)
    text = path.read_text(encoding="utf-8", errors="replace") if os.path.isfile(path) else config.response
    clip = load_clip(config.clip, "cpu") if config.clip else None
    sections, tokens = data.parse(text), len(text) // 4 + 1
    for name, content in asdict(sections).items():
        print(f"{name:<12}{'(missing)' if content is None else printable(content):.100}")
    missed = [word for word in sample.key_words if not rewards.keyword_reward(sections.description or "", (word,))]
    why = {"clip": f"1 from a cosine of {train.Config.clip_target:g} on" if clip else "no --clip",
           "keyword": f"missed: {', '.join(missed) or 'none'}", "format": "1 if no section is missing",
           "length": f"about {tokens} tokens; 1 up to {train.Config.length_limit}",
           "accuracy": f"answer {clean(sections.answer or '')!r}, gold {clean(sample.answer)!r}"}
    _, parts = rewards.score([sample], [text], [tokens], {}, clip)
    for part, reason in why.items():
        print(f"{part:<12}{parts[part].item():6.3f}   {printable(reason)}")
    for stage in ("1", "2"):
        weights = {part: train.STAGES[stage].get(f"{part}_weight", 0.0) for part in parts}
        total = sum(weight * parts[part].item() for part, weight in weights.items())
        print(f"stage {stage:<6}{total:6.3f}   = " + " + ".join(f"{w:g} {part}" for part, w in weights.items() if w))


def main() -> int:
    try:
        show(Flags(Playground, __doc__).read(sys.argv[1:], {}))
    except InputError as error:
        return complain(error)
    return 0
