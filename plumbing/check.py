"""What a data set holds and what a run would refuse: the body of `python data.py check`.

    python data.py check FILE [--stage sample] [--image_root FOLDER] [--model FOLDER] [any other flag of train.py]

Reads everything, decodes every image and writes nothing. With --model the prompts are measured as well. The exit code
is 2 where the stage would refuse the data at its start.
"""
import sys
from collections import Counter

import data
import train
from engine.weights import load_processor
from grading.equal import correct
from plumbing import filters
from plumbing.flags import complain

READ = set("problem question messages conversations images image file_name answer qid id key_words key_word keywords "
           "choices solution".split())  # the columns that `data.sample_from_row` knows


def describe(config):
    """Prints what there is, and the first of what will make trouble."""
    samples, refused, columns, broken = [], [], Counter(), []
    for row, *rest in data.named_rows(config.data, config.image_root, config.split):
        try:
            samples.append(data.sample_from_row(row, *rest))
            columns.update(name for name in row if not data.absent(row[name]))
        except data.InputError as error:
            refused.append(str(error))
    print(f"{config.data}: {len(samples) + len(refused)} rows")
    for name, count in columns.items():
        print(f"  column {data.printable(name)}: in {count} rows" + ("" if name in READ else ", not read"))
    lost = [f"{one.name}: {one.answer!r}, choices {one.choices}" for one in filters.unmatched(samples, correct)]
    for sample in samples:
        for image in sample.images:
            try:
                data.load_image(image)
            except data.ImageError as error:
                broken.append(f"{sample.name}: {error}")
    for name, found in (("rows that are refused", refused), ("gold answers that no response can match", lost),
                        ("images missing or broken", broken)):
        print(f"{name}: {len(found)}", *(f"    {each:.300}" for each in found[:3]), sep="\n")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        if len(words) < 2 or words[0] != "check":
            raise data.InputError("give: python data.py check FILE --stage STAGE, and what flags of train.py you like")
        config = train.read_config(["--stage", "sample", "--model", "", "--data", *words[1:]])
        describe(config)
        settings = config.min_pixels, config.max_pixels, config.prompt
        processor = load_processor(config.model, *settings) if config.model else None
        samples = data.load_samples(config.data, config.image_root, config.split)
        samples = filters.usable(samples, config, processor, correct)
        filters.held_out(config, processor)
        if config.stage != "sample":
            data.batches(len(samples), config.questions_per_rollout, config.epochs, config.seed, config.drop_last)
    except data.InputError as error:
        return complain(error)
    print(f"stage {config.stage} would start with this data" + ("" if processor else ", as far as no model is needed"))
    return 0
