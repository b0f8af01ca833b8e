"""What a data set holds, how it is read, and what a run would refuse: the body of `python data.py check`.

    python data.py check FILE [--image_root FOLDER] [--split train] [--stage 1] [--model FOLDER]

Reads everything and writes nothing. With --model also the prompts are made. The exit code is 2 where the stage would
refuse the data at its start; --stage is sft where rows have solutions and no answers, else sample.
"""
import argparse
import dataclasses
import hashlib
import os
import time
from collections import Counter

import data
import train
from data import ImageError, InputError, Sample
from engine.weights import load_processor
from grading.equal import LETTER, clean, correct, quantity, split_list, symbolic
from plumbing import filters
from plumbing.flags import complain

READ = set("problem question messages conversations images image answer qid id key_words key_word keywords choices "
           "solution".split())  # the columns that `data.sample_from_row` knows
HUGE, TIMED, SHOWN = 50_000_000, 20, 3  # pixels; images that are timed, examples that are shown


def kind_of(sample: Sample) -> str:
    """What kind of answer the gold one is."""
    answer = clean(sample.answer)
    kinds = {"none": not answer, "letter": LETTER.fullmatch(answer), "yes or no": answer.casefold() in ("yes", "no"),
             "choice": answer in map(clean, sample.choices), "number": quantity(answer), "list": split_list(answer)[0],
             "expression": symbolic(answer)}
    return next((kind for kind, holds in kinds.items() if holds), "text")


def counted(values) -> str:
    """The values in their order and how often each occurs: "letter 3, number 1"."""
    return ", ".join(f"{value} {count}" for value, count in sorted(Counter(values).items())) or "none"


def examples(name: str, found: list[str]):
    """A line with how many there are, and the first few below it."""
    print(f"{name}: {len(found)}")
    for each in found[:SHOWN]:
        print(f"    {each:.300}")


def read_all(config) -> list[Sample]:
    """Prints which columns there are and how they are read; returns the rows that can be read."""
    samples, refused, columns, rows = [], [], Counter(), 0
    for path, root in data.sources_of(config.data, config.image_root):
        for name, row in data.read_rows(path, config.split):
            rows += 1
            columns.update(key for key in (row if isinstance(row, dict) else {}) if not data.absent(row[key]))
            try:
                samples.append(data.sample_from_row(row, f"{path} row {name}", str(name), root))
            except InputError as error:
                refused.append(str(error))
    print(f"{config.data}: {rows} rows")
    for name, count in columns.items():
        print(f"  column {data.printable(name)}: in {count} rows" + ("" if name in READ else ", not read"))
    examples("rows that are refused", refused)
    return samples


def content_of(image) -> str:
    """Equal for equal pictures, of files by their size and beginning."""
    if isinstance(image, str):
        with open(image, "rb") as file:
            image = b"%d " % os.path.getsize(image) + file.read(1 << 16)
    return hashlib.sha1(image).hexdigest()


def look_at_images(samples: list[Sample], processor):
    """Prints what is missing, broken, tiny or huge, the seconds per image, and duplicates. InputError: too many."""
    missing, broken, odd, seconds, twins, tiny = [], [], [], [], {}, filters.token_side(processor)
    for sample in samples:
        gone = [image for image in sample.images if isinstance(image, str) and not os.path.isfile(image)]
        missing += [f"{sample.name}: {image}" for image in gone]
        try:
            for image in () if gone else sample.images:
                began, (width, height) = time.perf_counter(), data.image_size(image)
                if len(seconds) < TIMED:
                    data.load_image(image)
                    seconds.append(time.perf_counter() - began)
                if min(width, height) < tiny or width * height > HUGE:
                    odd.append(f"{sample.name}: {width} x {height}")
            key = (" ".join(sample.question.split()), *map(content_of, () if gone else sample.images))
            twins.setdefault(key, []).append(sample.qid)
        except ImageError as error:
            broken.append(ImageError(f"{sample.name}: {error}"))
    print(f"rows by their number of images: {counted(len(sample.images) for sample in samples)}")
    examples("images missing", missing)
    examples("rows with a broken image", list(map(str, broken)))
    examples(f"images with a side below {tiny} pixels, or of over {HUGE:,}", odd)
    examples("rows with the text and images of an earlier one", [f"qid {qids[0]} is also {', '.join(qids[1:6])}"
                                                                 for qids in twins.values() if len(qids) > 1])
    if seconds:
        print(f"seconds to decode an image: {sum(seconds) / len(seconds):.4f} (mean of the first {len(seconds)})")
    filters.check_broken(broken, len(samples), "would be dropped:")


def look_at_texts(samples: list[Sample], processor):
    """Prints placeholders, answers, key words and, with a processor, prompts."""
    marks = [(sample.question.count(data.IMAGE), len(sample.images), sample.name) for sample in samples]
    examples(f"rows whose {data.IMAGE} placeholders do not fit their images", [
        f"{name}: {count} for {images} images" for count, images, name in marks if count not in (0, images)])
    print(f"answers: {counted(map(kind_of, samples))}")
    examples("gold answers that no response can match", [
        f"{lost.name}: {lost.answer!r}, choices {lost.choices}" for lost in filters.unmatched(samples, correct)])
    words = [len(sample.key_words) for sample in samples]
    print(f"key words: in {sum(map(bool, words))} of {len(samples)} rows; words a row: {counted(words)}")
    if processor is None:
        print("prompts: give --model to measure and show them")
        return
    lengths = []
    for sample in samples:
        try:
            lengths.append(data.prompt_length(sample, processor) // 256 * 256)
            text = data.chat_text(sample, processor)
        except InputError:  # the stage's own check below says it
            continue
        if len(lengths) <= SHOWN:
            print(f"--- prompt of qid {sample.qid}", *map(data.printable, text.splitlines()), sep="\n")
    print(f"rows by prompt tokens, from so many to 255 more: {counted(lengths)}")


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
        processor = load_processor(given.model, config.min_pixels, config.max_pixels) if given.model else None
        samples = read_all(config)
        imitated = any(sample.solution for sample in samples) and not any(sample.answer for sample in samples)
        stage = given.stage or ("sft" if imitated else "sample")
        config = dataclasses.replace(config, **train.STAGES[stage] | flags, stage=stage)
        look_at_texts(samples, processor)
        look_at_images(samples, processor)
        samples = data.load_samples(config.data, config.image_root, config.split, log=print)
        samples = filters.usable(samples, config, processor, correct)
        if config.stage != "sample":
            data.batches(len(samples), config.questions_per_rollout, config.epochs, config.seed)
    except InputError as error:
        return complain(error)
    print(f"stage {config.stage} would start with this data" + ("" if processor else ", as far as no model is needed"))
    return 0
