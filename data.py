"""What the model writes and how it is read; rows and images of data; prompts; the easy, medium and hard questions.

    file or hub set --load_samples--> Sample --encode_prompt--> Prompt --> sampler and training
    response --parse--> Sections --> rewards and evaluation
    Samples + right answers of each --write_buckets--> {easy,medium,hard}.jsonl --load_samples--> the RL stages

README.md shows a row of each kind, `sample_from_row` knows the columns. Images of a hub set stay in memory, compressed.
`python data.py check FILE` says what a file holds and what a run would refuse (plumbing/check.py).
P: prompt tokens. An image is cut into patches of 14 x 14 pixels (Qwen3-VL: 16 x 16); merge_size**2 = 4 are one token.
"""
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy
import torch
import transformers.utils
from PIL import Image, ImageOps

from plumbing.files import InputError, checked, printable, read_rows
from plumbing.files import read_file as read_file  # reading is no part of the method; others take it from here
from plumbing.files import read_json as read_json

# Hugging Face has a package named kernels as well, and where it is installed, transformers would import our folder of
# that name in its place. Here it is told that there is no such package: import this file before its model code.
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *version_range: False


# ---- the response format: what the model is asked to write, and the parser that reads it
DESCRIPTION = "Image Description"
RATIONALES = "Rationales"
THINK = "Let's think step by step."
STEP = "Step"  # followed by its number
ANSWER = "The final answer is"
INSTRUCTION = f"""First describe the image, guided by the question. Then give a rationale, reason in steps, \
and close with only the final result. Use these section headers:
### {DESCRIPTION}:
### {RATIONALES}:
### {THINK}
### {STEP} 1:
### {STEP} 2:
...
### {ANSWER}:

"""


@dataclass(frozen=True)
class Sections:
    """What stands below each header: None when the header is missing, "" when nothing stands below it."""
    description: str | None  # of the first such header
    rationales: str | None  # of the first such header
    step: str | None  # of the first Step 1
    answer: str | None  # "" also when there are two different ones


GAP = r"[\s\u200b-\u200d\u2060\ufeff]*"  # spaces, seen or not
# What stands after ###, in any case and spacing, with or without a colon.
*HEADERS, ANSWER_HEADER = (re.compile(GAP + name.replace(" ", GAP) + rf"(?!\w){GAP}[:：]?", re.IGNORECASE)
                           for name in (DESCRIPTION, RATIONALES, STEP + " [1１]", ANSWER))
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</s>")  # <|im_end|> belongs to no section


def texts_below(pattern: re.Pattern, chunks: list[str]) -> list[str]:
    """What stands below each header of this kind. A chunk is the text from one ### to the next."""
    return [chunk[match.end():].strip() for chunk in chunks if (match := pattern.match(chunk))]


def parse(response: str) -> Sections:
    """The sections of a response. A section ends at the next ###, whatever follows it, or at the end of the text."""
    chunks = re.split("#{3,}", SPECIAL_TOKEN.sub(" ", response))[1:]  # [0] stands before the first header
    before = list(itertools.takewhile(lambda chunk: not ANSWER_HEADER.match(chunk), chunks))  # only these count
    description, rationales, step = (next(iter(texts_below(header, before)), None) for header in HEADERS)
    answers = texts_below(ANSWER_HEADER, chunks)
    different = {re.sub(r"[\s*`$]+", " ", text.casefold()).strip(" ."): text for text in answers[::-1] if text}
    answer = None if not answers else next(iter(different.values())) if len(different) == 1 else ""
    return Sections(description, rationales, step, answer)


# ---- images
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no other is opened: Pillow would start Ghostscript


class ImageError(InputError):
    """An image that is there and cannot be used: its row may be left out."""


@contextlib.contextmanager
def opened(image):
    """The PIL image of a path, bytes or PIL image. What Pillow raises on a bad one becomes an ImageError."""
    name, source = (f"of {len(image)} bytes", io.BytesIO(image)) if isinstance(image, bytes) else (image, image)
    try:
        given = isinstance(image, Image.Image)
        with contextlib.nullcontext(image) if given else Image.open(source, formats=FORMATS) as picture:
            if picture.mode[0] in "IF":
                raise ValueError("its colours have more than 8 bits, and it does not say which is white; convert it")
            yield picture
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ImageError(f"image {name}: cannot be read ({error}); replace it or remove its row") from error


def image_size(image) -> tuple[int, int]:
    """(width, height) from the file's header. An EXIF rotation may swap the two; the number of tokens is the same."""
    with opened(image) as picture:
        return picture.size


def load_image(image) -> Image.Image:
    """Path, bytes or PIL image -> upright RGB: the one picture that policy, CLIP reward and evaluation see."""
    with opened(image) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.has_transparency_data:  # black lines on a transparent ground can be seen on white only
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        return upright.convert("RGB")


def save_image(image: bytes, folder: str) -> str:
    """-> path. Named by its content, as one picture may belong to many questions."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, hashlib.sha1(image).hexdigest())
    with open(path, "wb") as file:
        file.write(image)
    return path


# ---- rows to samples
IMAGE = "<image>"  # in a question: the next image belongs here
LEADING_IMAGES = re.compile(rf"(\s*{IMAGE})*\s*")
TEXT = (str, int, float)  # a number will do as a text: "answer": 3
AROUND_ANSWER = re.compile(r".*<answer>(.*)</answer>.*|.*####", re.DOTALL | re.IGNORECASE)  # no response repeats it


@dataclass(frozen=True)
class Sample:
    qid: str  # unique in its data set
    question: str  # may hold <image> where image i belongs
    images: tuple = ()  # absolute file paths; of a set that brings its images, their compressed bytes
    answer: str = ""  # gold
    key_words: tuple[str, ...] = ()  # what a good description mentions
    choices: tuple[str, ...] = ()  # of a multiple-choice question
    solution: str = ""  # response to imitate (warm-up)
    where: str = field(default="", compare=False)  # "train.json row 3", for messages

    @property
    def name(self) -> str:  # for messages
        return f"{self.where}: qid {self.qid!r}"


def absent(value) -> bool:
    """Whether a column is empty: null, NaN, [] or a blank text. Sets and tables fill what a row lacks with these."""
    return value is None or value == [] or value != value or isinstance(value, str) and not value.strip()


def column(row: dict, where: str, *names: str, types: tuple = TEXT, default=None):
    """The first of these columns that is not absent, else default. InputError: there is neither, or another type."""
    for name in names:
        if not absent(row.get(name)):
            return checked(row[name], types, f"{where}: {name} has", " or ".join(each.__name__ for each in types))
    if default is None:
        present = ", ".join(str(name) for name in row if not absent(row[name]))
        raise InputError(f"{where}: no {' or '.join(names)}; it has: {present or 'nothing'}; rename or add the column")
    return default


def texts(row: dict, where: str, *names: str) -> tuple[str, ...]:
    """A column with a list of texts, or such a list as one text, in brackets and quotes or not."""
    values = column(row, where, *names, types=(str, list), default=[])
    if isinstance(values, str) and values.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # it is no JSON, perhaps as Python prints a list
            values = json.loads(values)
    if isinstance(values, str):
        parts = re.split(r"[，、;；|\n]|,(?!\d{3}(?!\d))", values.strip("[] "))  # 1,000 is a number
        values = [part.strip("\"' ") for part in parts]
    return tuple(str(checked(value, TEXT, f"{where}: {names[0]} has an item of", "texts")).strip() for value in values)


def as_image(value, where: str, root: str):
    """A path, bytes, a PIL image, or {bytes, path} as parquet files hold it -> absolute path, bytes or PIL image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    checked(value, (str, bytes, Image.Image), f"{where}: an image has", "a path, or the bytes of a picture")
    return os.path.abspath(os.path.join(root, value)) if isinstance(value, str) else value


def first_turns(turns: list, where: str) -> tuple[str, str]:
    """-> (question, solution): the first user turn, and the first assistant turn or "".
    Mulberry-SFT puts an instruction of its own before the question, ending with the last header of the format. Every
    stage here asks with INSTRUCTION, so theirs is removed; the <image> markers in front of it stay."""
    first = {}
    for turn in turns:
        checked(turn, (dict,), f"{where}: a turn has", "an object with role and content")
        first.setdefault(column(turn, where, "role", "from"), column(turn, where, "content", "value", default=""))
    turn = str(column(first, f"{where} messages", "user", "human"))
    instruction, _, question = turn.rpartition(f"### {ANSWER}:")
    markers = IMAGE * LEADING_IMAGES.match(instruction)[0].count(IMAGE)
    return markers + question.strip(), str(column(first, where, "assistant", "gpt", default=""))


def sample_from_row(row, where: str, default_qid: str, root: str, prefix: str = "") -> Sample:
    """where, default_qid: of messages, and of a row without one. root: what image paths are relative to. prefix: of
    qids. InputError: what the row lacks, or a column of another type."""
    checked(row, (dict,), f"{where}: has", "an object with columns")
    qid = printable(prefix + str(column(row, where, "qid", "id", default=default_qid)))
    turns = column(row, where, "messages", "conversations", types=(list,), default=[])
    if turns:
        question, solution = first_turns(turns, where)
    else:
        question = str(column(row, where, "problem", "question"))
        solution = str(column(row, where, "solution", default=""))
    if not question.replace(IMAGE, "").strip():
        raise InputError(f"{where}: the question is empty; write one or remove the row")
    images = column(row, where, "images", "image", "file_name", types=(str, list, dict, bytes), default=[])
    images = images if isinstance(images, list) else [images]
    answer = str(column(row, where, "answer", default="" if turns else None))
    return Sample(qid=qid, question=question, images=tuple(as_image(image, where, root) for image in images),
                  answer=AROUND_ANSWER.sub(r"\1", answer).strip(), choices=texts(row, where, "choices"),
                  key_words=tuple(filter(None, texts(row, where, "key_words", "key_word", "keywords"))),
                  solution=solution.strip(), where=where)


def named_rows(source: str, image_root: str, split: str) -> Iterator[tuple]:
    """The arguments of `sample_from_row` for each row of --data. Image paths start from the folder of their file, or
    from image_root. Of several files, with commas between, each may have an image root of its own, and the number of
    its file stands in front of each qid."""
    paths, roots = list(filter(str.strip, source.split(","))), image_root.split(",")
    if not paths or len(roots) not in (1, len(paths)):
        raise InputError(f"--data names {len(paths)} sets, --image_root {len(roots)} folders: give one or one for each")
    for number, (path, root) in enumerate(zip(paths, roots * len(paths)), 1):
        root = root or (os.path.dirname(path) if os.path.isfile(path) else path)
        rows = read_rows(path, split)
        if not rows:
            raise InputError(f"{path}: no rows; give a file that has some")
        for name, row in rows:
            yield row, f"{path} row {name}", str(name), root, f"{number}/" if len(paths) > 1 else ""


def load_samples(source: str, image_root: str = "", split: str = "train") -> list[Sample]:
    """The rows of --data as Samples. Image files are not opened: plumbing/filters.py looks at them. InputError: what
    `sample_from_row` refuses, or a qid that two rows share."""
    samples, first = [sample_from_row(*row) for row in named_rows(source, image_root, split)], {}
    for sample in samples:
        twin = first.setdefault(sample.qid, sample)
        if twin is not sample:
            raise InputError(f"{sample.name} is also that of {twin.where}; make it unique")
    return samples


# ---- samples to prompts
# Refused in any text: an image token without an image, the end of a turn, half a surrogate pair (it has no tokens).
REFUSED = re.compile(r"<\|(im_start|im_end|endoftext|vision_(start|end|pad)|image_pad|video_pad)\|>|[\ud800-\udfff]")


@dataclass
class Prompt:
    sample: Sample
    input_ids: list[int]  # P tokens, ends where the response begins
    position_ids: torch.Tensor  # (3, P) time, row and column
    pixel_values: torch.Tensor | None  # (patches, patch_dim) float32, all images
    grid_thw: torch.Tensor | None  # (images, 3) patches along time, height, width


def chat_text(sample: Sample, processor) -> str:
    """The prompt as text, one image token per image. Images that lead the question come before the instruction, others
    stay where the question has them; without markers all lead. In the release's prompt the question stands as it is."""
    where, question, images = sample.name, sample.question, len(sample.images)
    if found := REFUSED.search(question):
        raise InputError(f"{where} has the control token or half a surrogate pair {found[0]!r} in its text; remove it")
    markers = question.count(IMAGE)
    if markers not in (0, images):
        raise InputError(f"{where} has {markers} {IMAGE} markers for {images} images; have one per image, or none")
    question = question if markers else IMAGE * images + question
    leading = LEADING_IMAGES.match(question)
    turn = IMAGE * leading[0].count(IMAGE) + INSTRUCTION + question[leading.end():]
    if release := getattr(processor, "release_prompt", ""):  # of engine.weights.load_processor
        turn = release + question.strip()
    content = [{"type": "image"} if part == IMAGE else {"type": "text", "text": part}
               for part in re.split(f"({IMAGE})", turn) if part]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def mrope_positions(input_ids: list[int], grid_thw, image_token_id: int, merge_size: int) -> torch.Tensor:
    """-> (3, P) time, row, column of each token (Qwen-VL: get_rope_index). grid_thw: (images, 3) patches, or None.

    Text counts on in all three. An image's tokens add their own three to the position where it starts; the text after
    it goes on one past the highest of these."""
    grids, start, blocks = iter([] if grid_thw is None else grid_thw.tolist()), 0, []
    for is_image, run in itertools.groupby(input_ids, lambda token: token == image_token_id):
        if is_image:
            time, height, width = next(grids)
            sides = (time, height // merge_size, width // merge_size)
            block = torch.cartesian_prod(*map(torch.arange, sides)).T  # (3, tokens), the column changes fastest
        else:
            block = torch.arange(len(list(run))).expand(3, -1)  # (3, tokens)
        blocks.append(start + block)
        start = int(blocks[-1].max()) + 1
    return torch.cat(blocks, dim=1)  # (3, P)


def encode_prompt(sample: Sample, processor) -> Prompt:
    """A sample's prompt as tokens, positions and pixels; it is never truncated."""
    text = chat_text(sample, processor)
    try:
        images = [load_image(image) for image in sample.images]
    except ImageError as error:
        raise ImageError(f"{sample.name}: {error}") from error
    # This is processor(text, images) in half its time: it would check all its settings anew for each prompt.
    encoded = processor.image_processor(images=images, return_tensors="pt") if images else {}
    grid_thw, merge = encoded.get("image_grid_thw"), processor.image_processor.merge_size
    sizes = iter([] if grid_thw is None else (grid_thw.prod(-1) // merge**2).tolist())
    input_ids = [copy for token in processor.tokenizer(text).input_ids
                 for copy in [token] * (next(sizes) if token == processor.image_token_id else 1)]
    position_ids = mrope_positions(input_ids, grid_thw, processor.image_token_id, merge)
    return Prompt(sample, input_ids, position_ids, encoded.get("pixel_values"), grid_thw)


def prompt_length(sample: Sample, processor) -> int:
    """len(encode_prompt(sample, processor).input_ids), from the image headers alone; ImageError where one is broken."""
    length = len(processor.tokenizer(chat_text(sample, processor)).input_ids)  # with one token per image
    for image in sample.images:
        with opened(image) as picture:  # the processor refuses one side that is over 200 times the other
            patches = processor.image_processor.get_number_of_image_patches(picture.height, picture.width)
        length += patches // processor.image_processor.merge_size**2 - 1
    return length


def encode_solution(sample: Sample, processor, room: int = 0) -> list[int]:
    """The response to imitate, with the end token that teaches to stop, or what of it there is room for, if any is."""
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    return [*processor.tokenizer(sample.solution).input_ids, end][: room if room > 0 else None]


# ---- buckets and batches
def seed_of(*parts) -> int:
    """A seed from anything printable, e.g. (seed, step, qid): equal on every rank, in every run, after every resume."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def write_buckets(folder: str, samples: list[Sample], correct: dict[str, int], group_size: int) -> dict[str, int]:
    """easy.jsonl (all group_size answers right), medium.jsonl (some), hard.jsonl (none): each question in exactly one.
    correct: right answers by qid. Returns the sizes."""
    lines = {"easy": [], "medium": [], "hard": []}
    for sample in samples:
        count = correct[sample.qid]
        bucket = "easy" if count == group_size else "medium" if count > 0 else "hard"
        paths = [image if isinstance(image, str) else save_image(image, os.path.join(folder, "images"))
                 for image in sample.images]
        images = [os.path.relpath(path, folder) for path in paths]
        row = vars(sample) | {"images": images, "correct": count}
        del row["where"]
        lines[bucket].append(json.dumps(row) + "\n")
    os.makedirs(folder, exist_ok=True)
    for bucket in lines:
        with open(os.path.join(folder, f"{bucket}.jsonl"), "w") as file:
            file.writelines(lines[bucket])
            file.flush()
            os.fsync(file.fileno())
    return {bucket: len(lines[bucket]) for bucket in lines}


def batches(n: int, batch_size: int, epochs: int, seed: int, drop_last: bool = False) -> list[list[int]]:
    """Indices of n samples. An epoch's order depends on (seed, epoch) alone; a batch may span two, without drop_last;
    what is left over is not used. InputError when there is not one full batch."""
    epoch_orders = [numpy.random.default_rng([seed, epoch]).permutation(n).tolist() for epoch in range(epochs)]
    order = [index for epoch_order in epoch_orders for index in epoch_order[: n - n % batch_size * drop_last]]
    if len(order) < batch_size:
        raise InputError(f"{n} questions x {epochs} epochs do not fill one batch of {batch_size}: lower "
                         "--questions_per_rollout")
    return [order[i:i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]


if __name__ == "__main__":
    from plumbing.check import main

    sys.exit(main())
