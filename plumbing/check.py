"""What a data set holds and what a run would refuse: the body of `python data.py check`.

    python data.py check FILE [--image_root FOLDER] [--split train] [--stage 1] [--model FOLDER]

Reads everything, decodes every image and writes nothing. With --model also the prompts are made. The exit code is 2
where the stage would refuse the data; --stage is sft where rows have solutions and no answers, else sample.
"""
import argparse
import dataclasses
import os
from collections import Counter

import data
import train
from engine.weights import load_processor
from grading.equal import LETTER, clean, correct, quantity, split_list, symbolic
from plumbing import filters
from plumbing.flags import complain

READ = set("problem question messages conversations images image file_name answer qid id key_words key_word keywords "
           "choices solution".split())  # the columns that `data.sample_from_row` knows
SHOWN = 3  # examples of each kind of trouble


def kind_of(sample: data.Sample) -> str:
    """What kind of answer the gold one is."""
    answer = clean(sample.answer)
    kinds = {"none": not answer, "letter": LETTER.fullmatch(answer), "yes or no": answer.casefold() in ("yes", "no"),
             "choice": answer in map(clean, sample.choices), "number": quantity(answer), "list": split_list(answer)[0],
             "expression": symbolic(answer)}
    return next((kind for kind, holds in kinds.items() if holds), "text")


def image_trouble(sample: data.Sample) -> str:
    """"missing: ..", "broken: .." or ""."""
    for image in sample.images:
        if isinstance(image, str) and not os.path.isfile(image):
            return f"missing: {sample.name}: image {image}"
        try:
            data.load_image(image)
        except data.ImageError as error:
            return f"broken: {sample.name}: {error}"
    return ""


def describe(config) -> list[data.Sample]:
    """Prints what there is, and the first of what will make trouble; returns the rows that can be read."""
    samples, refused, columns, rows = [], [], Counter(), 0
    for row, *rest in data.named_rows(config.data, config.image_root, config.split):
        rows += 1
        columns.update(key for key in (row if isinstance(row, dict) else {}) if not data.absent(row[key]))
        try:
            samples.append(data.sample_from_row(row, *rest))
        except data.InputError as error:
            refused.append(str(error))
    print(f"{config.data}: {rows} rows")
    for name, count in columns.items():
        print(f"  column {data.printable(name)}: in {count} rows" + ("" if name in READ else ", not read"))
    kinds = Counter(map(kind_of, samples))
    print("answers: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    unmatched = [f"{lost.name}: {lost.answer!r}, choices {lost.choices}" for lost in filters.unmatched(samples, correct)]
    for name, found in (("rows that are refused", refused), ("gold answers that no response can match", unmatched),
                        ("rows with an image missing or broken", list(filter(None, map(image_trouble, samples))))):
        print(f"{name}: {len(found)}", *(f"    {each:.300}" for each in found[:SHOWN]), sep="\n")
    return samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("data", help="as --data of train.py")
    for name, default in (("image_root", ""), ("split", "train"), ("model", "")):
        parser.add_argument(f"--{name}", default=default, help="as in train.py")
    parser.add_argument("--stage", choices=list(train.STAGES), help="the stage whose needs are checked")
    given = parser.parse_args(argv)
    flags = {name: getattr(given, name) for name in ("data", "image_root", "split")}
    try:
        config = train.Config(**flags)
        samples = describe(config)
        imitated = any(sample.solution for sample in samples) and not any(sample.answer for sample in samples)
        stage = given.stage or ("sft" if imitated else "sample")
        config = dataclasses.replace(config, **train.STAGES[stage] | flags, stage=stage)
        processor = load_processor(given.model, config.min_pixels, config.max_pixels) if given.model else None
        samples = data.load_samples(config.data, config.image_root, config.split)
        samples = filters.usable(samples, config, processor, correct)
        if config.stage != "sample":
            data.batches(len(samples), config.questions_per_rollout, config.epochs, config.seed)
    except data.InputError as error:
        return complain(error)
    print(f"stage {config.stage} would start with this data" + ("" if processor else ", as far as no model is needed"))
    return 0
