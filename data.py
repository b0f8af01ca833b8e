"""What the model writes and how it is read; rows and images of data; prompts; the easy, medium and hard questions.

    file or hub set --load_samples--> Sample --encode_prompt--> Prompt --> sampler and training
    response --parse--> Sections --> rewards and evaluation
    Samples + right answers of each --write_buckets--> {easy,medium,hard}.jsonl --load_samples--> the RL stages

RL rows have problem (or question) and answer; optional are images (or image), qid (or id), choices, solution, and
key_words (or key_word, keywords), a list or a text cut at commas. sharegpt rows have messages [{role, content}] (or
conversations [{from, value}]) and images: the first user turn asks, the first assistant turn is what to imitate.
Image paths are relative to image_root, or to the file's own folder. Images of a hub set stay in memory, compressed.
P: prompt tokens. An image is cut into patches of 14 x 14 pixels; merge_size x merge_size (2 x 2) patches are one token.
"""
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy
import torch
import transformers.utils
from PIL import Image, ImageOps

# Hugging Face has a package named kernels as well, and where it is installed, transformers would import our folder of
# that name in its place. Here it is told that there is no such package: import this file before its model code.
for module in (transformers.utils, transformers.utils.import_utils):
    module.is_kernels_available = lambda *version_range: False


class InputError(ValueError):
    """Bad user input. The message is one line: what is wrong, where (file, row, qid or flag), and what to do."""

    on_every_rank = False  # True where all ranks raise it, so that rank 0 speaks for all


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
    steps: tuple[str, ...]  # Step 1, Step 2, ... each after the one before it
    answer: str | None  # "" also when there are two different ones


def header(name: str) -> re.Pattern:
    """Matches the name after ###, in any case and spacing, with or without a colon."""
    words = GAP.join(re.escape(word) for word in name.split())
    return re.compile(rf"{GAP}{words}(?!\w){GAP}[:：]?", re.IGNORECASE)


GAP = r"[\s\u200b-\u200d\u2060\ufeff]*"  # spaces, seen or not
STEP_HEADER = re.compile(rf"{GAP}{STEP}{GAP}(\d{{1,3}})(?!\w){GAP}[:：]?", re.IGNORECASE)
ANSWER_HEADER = header(ANSWER)
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</s>")  # <|im_end|> belongs to no section


def texts_below(pattern: re.Pattern, chunks: list[str]) -> list[str]:
    """What stands below each header of this kind. A chunk is the text from one ### to the next."""
    return [chunk[match.end():].strip() for chunk in chunks if (match := pattern.match(chunk))]


def parse(response: str) -> Sections:
    """The sections of a response. A section ends at the next ###, whatever follows it, or at the end of the text."""
    chunks = re.split("#{3,}", SPECIAL_TOKEN.sub(" ", response))[1:]  # [0] stands before the first header
    before = list(itertools.takewhile(lambda chunk: not ANSWER_HEADER.match(chunk), chunks))  # only these count
    steps = []
    for chunk in before:
        match = STEP_HEADER.match(chunk)
        if match and int(match[1]) == len(steps) + 1:
            steps.append(chunk[match.end():].strip())
    answers = texts_below(ANSWER_HEADER, chunks)
    different = {re.sub(r"[\s*`$]+", " ", text.casefold()).strip(" ."): text for text in answers[::-1] if text}
    description = next(iter(texts_below(header(DESCRIPTION), before)), None)
    rationales = next(iter(texts_below(header(RATIONALES), before)), None)
    answer = None if not answers else next(iter(different.values())) if len(different) == 1 else ""
    return Sections(description, rationales, tuple(steps), answer)


# ---- images
@contextlib.contextmanager
def opened(image, name: str = ""):
    """The PIL image of a path or file. What Pillow raises on a bad one, here or later, is one line that names it."""
    try:
        yield image if isinstance(image, Image.Image) else Image.open(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {name or image}: cannot be read ({error}); replace it or remove its row") from error


def image_size(image) -> tuple[int, int]:
    """(width, height) from the file's header. An EXIF rotation may swap the two; the number of tokens is the same."""
    with opened(image) as picture:
        width, height = picture.size
    if max(width, height) > 200 * min(width, height):  # transformers' smart_resize refuses it
        raise InputError(f"image {image}: {width} x {height}, one side is over 200 times the other; remove its row")
    return width, height


def load_image(image) -> Image.Image:
    """Path or PIL image -> upright RGB: the one picture that policy, CLIP reward and evaluation see."""
    with opened(image) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255, not scale
            upright = upright.point(lambda value: value / 256)
        if upright.has_transparency_data:  # black lines on a transparent ground can be seen on white only
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        return upright.convert("RGB")


def save_png(image: Image.Image, folder: str) -> str:
    """-> path. Named by its pixels, so that a second run changes no picture that older buckets point to."""
    picture = load_image(image)
    path = os.path.join(folder, f"{picture.width}x{picture.height}_{hashlib.sha1(picture.tobytes()).hexdigest()}.png")
    os.makedirs(folder, exist_ok=True)
    picture.save(path + ".tmp", "PNG")
    os.replace(path + ".tmp", path)
    return path


# ---- files and hub sets to rows
def checked(value, types: tuple, found: str, expected: str):
    """The value, if it has one of these types; else InputError, "{found} type list; expected {expected}"."""
    if not isinstance(value, types):
        raise InputError(f"{found} type {type(value).__name__}; expected {expected}")
    return value


def read_json(path: str):
    """What a .json file holds, plain or .gz; of a .jsonl file its rows by the number of their line, from 1."""
    line, rows = 0, {}
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            if not path.removesuffix(".gz").endswith(".jsonl"):
                return json.load(file)
            for line, text in enumerate(file):
                if text.strip():
                    rows[line + 1] = json.loads(text.strip())
            return rows
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {line + error.lineno}: not valid JSON ({error.msg}); fix that line") from error
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path and that the file is whole") from error


def read_file(path: str) -> list[tuple]:
    """[(name, row)]: name is the key in an object of rows, the line in a .jsonl file, the number from 1 in a list."""
    rows = checked(read_json(path), (list, dict), f"{path}: has", "a list or an object of rows")
    return list(rows.items()) if isinstance(rows, dict) else list(enumerate(rows, 1))


def read_rows(source: str, split: str, config: str | None = None, images: bool = True,
              only_split: bool = False) -> list[tuple]:
    """[(name, row)] of a .json or .jsonl file, plain or .gz; or of one split of a hub data set, of a folder that
    `hf download` or `save_to_disk` made, or of a .parquet file. With only_split, the split of a set that has a single
    one is taken whatever its name. Pictures stay as stored, a path or bytes, until they are needed; images=False leaves
    them out. InputError when it cannot be read."""
    if source.removesuffix(".gz").endswith((".json", ".jsonl")):
        return read_file(source)
    import datasets  # takes a second, and most runs read a file
    from huggingface_hub.utils import logging
    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # otherwise a hub that cannot be reached prints a line for each attempt
    try:
        if source.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=source, split="train")
        elif any(os.path.exists(os.path.join(source, name)) for name in ("dataset_dict.json", "state.json")):
            rows = datasets.load_from_disk(source)
        else:
            try:
                rows = datasets.load_dataset(source, config, split=split)
            except ValueError:  # no such config or split
                rows = datasets.load_dataset(source)
        if isinstance(rows, dict):  # all splits by name
            name = next(iter(rows)) if only_split and len(rows) == 1 else split
            if name not in rows:
                raise ValueError(f"no split {split}; it has {', '.join(rows)}: give one with --split")
            rows = rows[name]
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False)) if images else rows.remove_columns(name)
        return list(enumerate(rows, 1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"data set {source!r}, split {split!r}: cannot be loaded ({reason}); download it first, `hf "
                         "download --repo-type dataset NAME --local-dir FOLDER`, and give --data FOLDER or a .parquet, "
                         ".json or .jsonl file, or point HF_HOME to a cache that has it") from error


# ---- rows to samples
IMAGE = "<image>"  # in a question: the next image belongs here
LEADING_IMAGES = re.compile(rf"(\s*{IMAGE})*\s*")
TEXT = (str, int, float)  # a number will do as a text: "answer": 3


@dataclass(frozen=True)
class Sample:
    qid: str  # unique in its data set
    question: str  # may hold <image> where image i belongs
    images: tuple = ()  # absolute file paths, or PIL images of a hub set
    answer: str = ""  # gold
    key_words: tuple[str, ...] = ()  # what a good description mentions
    choices: tuple[str, ...] = ()  # of a multiple-choice question
    solution: str = ""  # response to imitate (warm-up)
    where: str = field(default="", compare=False)  # "train.json row 3", for messages


def column(row: dict, where: str, *names: str, types: tuple = TEXT, default=None):
    """The first of these columns that the row has, else default; InputError where there is neither, or another type.
    A null counts as absent, because hub sets fill what a row lacks with it."""
    value = next((row[name] for name in names if row.get(name) is not None), default)
    if value is None:
        present = ", ".join(str(name) for name in row if row[name] is not None)
        raise InputError(f"{where}: no {' or '.join(names)}; it has: {present or 'nothing'}; rename or add the column")
    return checked(value, types, f"{where}: {names[0]} has", " or ".join(each.__name__ for each in types))


def texts(row: dict, where: str, *names: str, types: tuple = (list,)) -> list[str]:
    """A column with a list of texts, or, where types allows a str, one text that is cut at commas."""
    values = column(row, where, *names, types=types, default=[])
    values = values.split(",") if isinstance(values, str) else values
    return [str(checked(value, TEXT, f"{where}: {names[0]} has an item of", "texts")) for value in values]


def as_image(value, where: str, root: str):
    """A path, a PIL image, or {bytes, path} as parquet files hold it -> absolute path or PIL image."""
    if isinstance(value, dict):
        value = value["bytes"] if isinstance(value.get("bytes"), bytes) else value.get("path")
    if isinstance(value, bytes):
        with opened(io.BytesIO(value), f"of {where}") as picture:
            return picture
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: an image is {value!r}; expected a path or an image")
    return os.path.abspath(os.path.join(root, value))


def first_turns(turns: list, where: str) -> tuple[str, str]:
    """-> (question, solution): the first user turn, and the first assistant turn or "".
    Mulberry-SFT puts an instruction of its own before the question, ending with the last header of the format. Every
    stage here asks with INSTRUCTION, so theirs is removed; the <image> markers in front of it stay."""
    first = {}
    for turn in turns:
        checked(turn, (dict,), f"{where}: a turn has", "{role, content}")
        first.setdefault(column(turn, where, "role", "from"), column(turn, where, "content", "value"))
    turn = str(column(first, f"{where} messages", "user", "human"))
    instruction, _, question = turn.rpartition(f"### {ANSWER}:")
    if not question.strip():
        raise InputError(f"{where}: the user turn has no question after its instruction; fix or remove the row")
    markers = IMAGE * LEADING_IMAGES.match(instruction)[0].count(IMAGE)
    return markers + question.strip(), column(first, where, "assistant", "gpt", default="")


def sample_from_row(row, where: str, default_qid: str, root: str) -> Sample:
    checked(row, (dict,), f"{where}: has", "an object with columns")
    turns = column(row, where, "messages", "conversations", types=(list,), default=[])
    if turns:
        question, solution = first_turns(turns, where)
    else:
        question = str(column(row, where, "problem", "question"))
        solution = column(row, where, "solution", default="")
    if not question.replace(IMAGE, "").strip():
        raise InputError(f"{where}: the question is empty; write one or remove the row")
    images = column(row, where, "images", "image", types=(str, list, dict, Image.Image), default=[])
    images = images if isinstance(images, list) else [images]
    key_words = texts(row, where, "key_words", "key_word", "keywords", types=(str, list))
    return Sample(qid=str(column(row, where, "qid", "id", default=default_qid)), question=question,
                  images=tuple(as_image(image, where, root) for image in images),
                  answer=str(column(row, where, "answer", default="" if turns else None)),
                  key_words=tuple(word.strip() for word in key_words if word.strip()),
                  choices=tuple(texts(row, where, "choices")), solution=str(solution).strip(), where=where)


def load_samples(source: str, image_root: str = "", split: str = "train") -> list[Sample]:
    """What `read_rows` reads, as Samples. Image files are not opened: check_images and worth_imitating look at them.
    InputError: what a row lacks, or a qid it shares, with the row named."""
    if not source:
        raise InputError("--data is empty: give a .json or .jsonl file, a data set folder or a hub name")
    named_rows = read_rows(source, split)
    if not named_rows:
        raise InputError(f"{source}: no rows; give a file that has some")
    root = image_root or (os.path.dirname(source) if os.path.isfile(source) else source)
    samples = [sample_from_row(row, f"{source} row {name}", str(name), root) for name, row in named_rows]
    first = {}
    for sample in samples:
        twin = first.setdefault(sample.qid, sample)
        if twin is not sample:
            raise InputError(f"{sample.where}: qid {sample.qid!r} is also that of {twin.where}; make it unique")
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
    stay where the question has them; without markers all lead."""
    where, question, images = f"{sample.where}: qid {sample.qid!r}", sample.question, len(sample.images)
    if found := REFUSED.search(question):
        raise InputError(f"{where} has the control token or half a surrogate pair {found[0]!r} in its text; remove it")
    markers = question.count(IMAGE)
    if markers not in (0, images):
        raise InputError(f"{where} has {markers} {IMAGE} markers for {images} images; have one per image, or none")
    question = question if markers else IMAGE * images + question
    leading = LEADING_IMAGES.match(question)
    turn = IMAGE * leading[0].count(IMAGE) + INSTRUCTION + question[leading.end():]
    content = [{"type": "image"} if part == IMAGE else {"type": "text", "text": part}
               for part in re.split(f"({IMAGE})", turn) if part]
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens = text.count(processor.image_token)
    if tokens != images:
        raise InputError(f"{where} has {tokens} image tokens for {images} images; check the model's chat template")
    return text


def mrope_positions(input_ids: list[int], grid_thw, image_token_id: int, merge_size: int) -> torch.Tensor:
    """-> (3, P) time, row, column of each token (Qwen2.5-VL: get_rope_index). grid_thw: (images, 3) patches, or None.

    Text counts on in all three. An image's tokens add their own three to the position where it starts; the text after
    it goes on one past the highest of these."""
    grids = iter([] if grid_thw is None else grid_thw.tolist())
    start, blocks = 0, []
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
    """Never truncates. InputError, naming the qid: control tokens in the question, or images it does not match."""
    text = chat_text(sample, processor)
    encoded = processor(text=[text], images=[load_image(image) for image in sample.images] or None, return_tensors="pt")
    input_ids, grid_thw = encoded["input_ids"][0].tolist(), encoded.get("image_grid_thw")
    position_ids = mrope_positions(input_ids, grid_thw, processor.image_token_id, processor.image_processor.merge_size)
    return Prompt(sample, input_ids, position_ids, encoded.get("pixel_values"), grid_thw)


def prompt_length(sample: Sample, processor) -> int:
    """len(encode_prompt(sample, processor).input_ids), from the image headers alone."""
    length = len(processor.tokenizer(chat_text(sample, processor)).input_ids)  # with one token per image
    for width, height in map(image_size, sample.images):
        patches = processor.image_processor.get_number_of_image_patches(height, width)
        length += patches // processor.image_processor.merge_size**2 - 1
    return length


def encode_solution(sample: Sample, processor) -> list[int]:
    """The response to imitate, with its end token: a model that is never shown one does not learn to stop."""
    return processor.tokenizer(sample.solution).input_ids + [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]


# ---- which samples a stage works with
def check_images(samples: list[Sample]) -> None:
    """InputError when an image file is missing: found before the run, not in its third hour."""
    missing = [f"{sample.where}: image {image}" for sample in samples for image in sample.images
               if isinstance(image, str) and not os.path.isfile(image)]
    if missing:
        raise InputError(f"{missing[0]} does not exist ({len(missing)} missing in all); check it or set --image_root")


def require(samples: list[Sample], name: str, source: str) -> None:
    """InputError when a sample lacks its answer or its key_words: that reward would be 0 whatever the model says."""
    bare = [sample.qid for sample in samples if not getattr(sample, name)]
    if bare:
        raise InputError(f"{source}: {len(bare)} of {len(samples)} questions have no {name}, the first is qid "
                         f"{bare[0]}; add the column or drop these rows")


def held_out(config) -> list[Sample]:
    """The questions of --eval_data that training asks: eval_questions of them, always the same ones."""
    samples = load_samples(config.eval_data, config.image_root, config.split)
    chosen = sorted(samples, key=lambda sample: seed_of("held out", sample.qid))[: config.eval_questions]
    check_images(chosen)
    require(chosen, "answer", config.eval_data)
    return chosen


def sft_verdict(sample: Sample, processor, max_response: int) -> str:
    """"kept", or why a warm-up row is dropped (release: dataset/filter.py). Of images only the headers are read."""
    if not sample.solution:
        return "no_solution"
    if "let me rethink it" in sample.solution.lower():
        return "rethink"
    if REFUSED.search(sample.solution):
        return "control_token"
    try:
        sides = [side for image in sample.images for side in image_size(image)]
    except InputError:
        return "bad_image"
    if min(sides, default=28) < 28:
        return "small_image"
    return "kept" if len(encode_solution(sample, processor)) <= max_response else f"over {max_response} tokens"


def worth_imitating(samples: list[Sample], config, processor, log=print) -> list[Sample]:
    """The warm-up rows that `sft_verdict` keeps. How many have which verdict is logged, the most frequent first."""
    verdicts = [sft_verdict(sample, processor, config.max_response) for sample in samples]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts).most_common())
    log(f"warm-up data: {counts}")
    if "kept" not in verdicts:
        raise InputError(f"{config.data}: no warm-up row is left ({counts}): see --max_response and the row format")
    return [sample for sample, verdict in zip(samples, verdicts) if verdict == "kept"]


def drop_long(samples: list[Sample], processor, max_prompt: int, log=print) -> list[Sample]:
    """Prompts of more than max_prompt tokens are dropped up front, never cut: a cut prompt loses image tokens."""
    lengths = [prompt_length(sample, processor) for sample in samples]
    kept = [sample for sample, length in zip(samples, lengths) if length <= max_prompt]
    ranked = sorted(zip(lengths, samples), key=lambda pair: -pair[0])[:3]
    longest = "longest: " + ", ".join(f"qid {sample.qid} with {length}" for length, sample in ranked)
    if not kept:
        raise InputError(f"no prompt is within {max_prompt} tokens ({longest}): raise --max_prompt or cut --max_pixels")
    if len(kept) < len(samples):
        log(f"dropped {len(samples) - len(kept)} of {len(samples)} prompts, over {max_prompt} tokens ({longest})")
    encode_prompt(max(kept, key=lambda sample: len(sample.images)), processor)  # the template and the processor work
    return kept


# ---- buckets and batches
def seed_of(*parts) -> int:
    """A seed from anything printable, e.g. (seed, step, qid): equal on every rank, in every run, after every resume."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def write_buckets(folder: str, samples: list[Sample], correct: dict[str, int], group_size: int) -> dict[str, int]:
    """easy.jsonl (all group_size answers right), medium.jsonl (some), hard.jsonl (none): each question in exactly one.
    correct: right answers by qid. Returns the sizes. No old file is replaced before all three new ones are complete."""
    assert sorted(correct) == sorted(sample.qid for sample in samples), "each sample needs a count, each count a sample"
    assert all(0 <= count <= group_size for count in correct.values()), f"a count is not in 0..{group_size}"
    lines = {"easy": [], "medium": [], "hard": []}
    for sample in samples:
        count = correct[sample.qid]
        bucket = "easy" if count == group_size else "medium" if count > 0 else "hard"
        paths = [image if isinstance(image, str) else save_png(image, os.path.join(folder, "images"))
                 for image in sample.images]
        row = {"qid": sample.qid, "problem": sample.question, "answer": sample.answer,
               "images": [os.path.relpath(path, folder) for path in paths], "key_words": sample.key_words,
               "choices": sample.choices, "solution": sample.solution, "correct": count}
        lines[bucket].append(json.dumps(row) + "\n")
    os.makedirs(folder, exist_ok=True)
    for bucket in lines:
        with open(os.path.join(folder, f"{bucket}.jsonl.tmp"), "w") as file:
            file.writelines(lines[bucket])
            file.flush()
            os.fsync(file.fileno())
    for bucket in lines:
        os.replace(os.path.join(folder, f"{bucket}.jsonl.tmp"), os.path.join(folder, f"{bucket}.jsonl"))
    return {bucket: len(lines[bucket]) for bucket in lines}


def batches(n: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of n samples. An epoch's order depends on (seed, epoch) alone; a batch may span two epochs; what is left
    over at the end is not used. InputError when there is not one full batch."""
    epoch_orders = [numpy.random.default_rng([seed, epoch]).permutation(n).tolist() for epoch in range(epochs)]
    order = [index for epoch_order in epoch_orders for index in epoch_order]
    if len(order) < batch_size:
        raise InputError(f"{n} questions x {epochs} epochs do not fill one batch of {batch_size}; "
                         "use more data, more epochs or a smaller batch")
    return [order[i:i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
