"""What a data set holds and what a run would refuse: the body of `python data.py check`.

    python data.py check FILE [--image_root FOLDER] [--split train] [--stage 1] [--model FOLDER]

Reads everything, decodes every image and writes nothing. With --model also the prompts are made. The exit code is 2
where the stage would refuse the data; --stage is sft where rows have solutions and no answers, else sample.
"""
import argparse
from collections import Counter
from collections.abc import Iterator
from itertools import chain

import data
import train
from engine.weights import load_processor
from grading.equal import LETTER, clean, correct, quantity, split_list, symbolic
from plumbing import filters
from plumbing.flags import complain

READ = set("problem question messages conversations images image file_name answer qid id key_words key_word keywords "
           "choices solution".split())  # the columns that `data.sample_from_row` knows


def kind_of(sample: data.Sample) -> str:
    """What kind of answer the gold one is."""
    answer = clean(sample.answer)
    kinds = {"none": not answer, "letter": LETTER.fullmatch(answer), "yes or no": answer.casefold() in ("yes", "no"),
             "choice": answer in map(clean, sample.choices), "number": quantity(answer), "list": split_list(answer)[0],
             "expression": symbolic(answer)}
    return next((kind for kind, holds in kinds.items() if holds), "text")


def unreadable(sample: data.Sample) -> Iterator[str]:
    """A line for each of its images that is missing or broken."""
    for image in sample.images:
        try:
            data.load_image(image)
        except data.ImageError as error:
            yield f"{sample.name}: {error}"


def describe(config) -> list[data.Sample]:
    """Prints what there is, and the first of what will make trouble; returns the rows that can be read."""
    samples, refused, columns = [], [], Counter()
    for row, *rest in data.named_rows(config.data, config.image_root, config.split):
        columns.update(name for name in (row if isinstance(row, dict) else {}) if not data.absent(row[name]))
        try:
            samples.append(data.sample_from_row(row, *rest))
        except data.InputError as error:
            refused.append(str(error))
    print(f"{config.data}: {len(samples) + len(refused)} rows")
    for name, count in columns.items():
        print(f"  column {data.printable(name)}: in {count} rows" + ("" if name in READ else ", not read"))
    kinds = Counter(map(kind_of, samples))
    print("answers: " + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    lost = [f"{one.name}: {one.answer!r}, choices {one.choices}" for one in filters.unmatched(samples, correct)]
    for name, found in (("rows that are refused", refused), ("gold answers that no response can match", lost),
                        ("images missing or broken", list(chain(*map(unreadable, samples))))):
        print(f"{name}: {len(found)}", *(f"    {each:.300}" for each in found[:3]), sep="\n")
    return samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("data", help="as --data of train.py")
    parser.add_argument("--stage", choices=list(train.STAGES), help="the stage whose needs are checked")
    for name, default in (("image_root", ""), ("split", "train"), ("model", "")):
        parser.add_argument(f"--{name}", default=default, help="as in train.py")
    given = parser.parse_args(argv)
    flags = {name: getattr(given, name) for name in ("data", "image_root", "split")}
    try:
        samples = describe(given)
        imitated = any(sample.solution for sample in samples) and not any(sample.answer for sample in samples)
        stage = given.stage or ("sft" if imitated else "sample")
        config = train.Config(**train.STAGES[stage] | flags, stage=stage)
        processor = load_processor(given.model, config.min_pixels, config.max_pixels) if given.model else None
        samples = data.load_samples(config.data, config.image_root, config.split)
        samples = filters.usable(samples, config, processor, correct)
        if stage != "sample":
            data.batches(len(samples), config.questions_per_rollout, config.epochs, config.seed)
    except data.InputError as error:
        return complain(error)
    print(f"stage {stage} would start with this data" + ("" if processor else ", as far as no model is needed"))
    return 0
