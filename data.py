"""Samples in, prompts out: rows, images, the warm-up filter, the prompt template, encoding, buckets, batches.

    file or hub set --load_samples--> Sample --encode_prompt--> Prompt --> sampler and training
    Samples + right answers of each --write_buckets--> {easy,medium,hard}.jsonl --load_samples--> the RL stages

RL rows:       problem (or question), answer; optional images (or image), qid (or id), choices, solution, and key_words
               (or key_word, keywords), a list or a string cut at commas.
sharegpt rows: messages [{role, content}] (or conversations [{from, value}]) and images; the first user turn is the
               question, the first assistant turn the solution to imitate.
Image paths are relative to image_root, or to the file's own folder. Images inside a hub set stay in memory, packed.

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


# ---- what the model reads and writes. The parser and the format reward use the same header names.
IMAGE = "<image>"                                  # in a question: the next image belongs here
DESCRIPTION = "Image Description"
RATIONALES = "Rationales"
THINK = "Let's think step by step."
STEP = "Step"                                      # followed by its number
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
CONTROL_TOKEN = re.compile(r"<\|(im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")
LEADING_IMAGES = re.compile(rf"(\s*{IMAGE})*\s*")


@dataclass(frozen=True)
class Sample:
    qid: str                                       # unique in its data set
    question: str                                  # may hold <image> where image i belongs
    images: tuple = ()                             # absolute file paths, or PIL images of a hub set
    answer: str = ""                               # gold
    key_words: tuple[str, ...] = ()                # what a good description mentions
    choices: tuple[str, ...] = ()                  # of a multiple-choice question
    solution: str = ""                             # response to imitate (warm-up)
    where: str = field(default="", compare=False)  # "train.json row 3", for messages


@dataclass
class Prompt:
    sample: Sample
    input_ids: list[int]                           # P tokens, ends where the response begins
    position_ids: torch.Tensor                     # (3, P) time, row and column
    pixel_values: torch.Tensor | None              # (patches, patch_dim) float32, all images
    grid_thw: torch.Tensor | None                  # (images, 3) patches along time, height, width


# ---- images
@contextlib.contextmanager
def readable(image):
    """Turns whatever Pillow raises on a missing or broken file into one line that names it."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"image {image}: cannot be read ({error}); replace it or remove its row") from error


def image_size(image) -> tuple[int, int]:
    """(width, height) as stored, from the header. EXIF rotation swaps them, which no user of this function minds."""
    with readable(image):
        if isinstance(image, Image.Image):
            width, height = image.size
        else:
            with Image.open(image) as opened:
                width, height = opened.size
    if max(width, height) > 200 * min(width, height):      # transformers' smart_resize refuses it
        raise InputError(f"image {image}: {width} x {height}, one side is over 200 times the other; remove its row")
    return width, height


def load_image(image) -> Image.Image:
    """Path or PIL image -> upright RGB: the one picture that policy, CLIP reward and evaluation see."""
    with readable(image):
        upright = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
        if upright.mode.startswith("I"):                   # 16 bits a pixel: Pillow would clip at 255, not scale
            upright = upright.point(lambda value: value / 256)
        if upright.has_transparency_data:                  # a figure drawn in black on nothing shows on white only
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return upright.convert("RGB")


# ---- rows to samples
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
    rows = read_json(path)
    if not isinstance(rows, (list, dict)):
        raise InputError(f"{path}: has type {type(rows).__name__}; expected a list or an object of rows")
    if isinstance(rows, dict) and {"problem", "question", "messages", "conversations", "response"} & set(rows):
        raise InputError(f"{path}: holds a single row; put it in a list")
    return list(rows.items()) if isinstance(rows, dict) else list(enumerate(rows, 1))


def load_split(source: str, split: str, config: str | None, only_split: bool):
    """One split, as a datasets.Dataset. With only_split, a set that has but one will do, whatever that is called; else
    ValueError when there is no such split."""
    import datasets
    if source.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=source, split="train")
    if any(os.path.exists(os.path.join(source, name)) for name in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(source)
        splits = loaded if isinstance(loaded, dict) else {split: loaded}
    else:
        try:
            return datasets.load_dataset(source, config, split=split)
        except ValueError:                         # no such config or split
            splits = datasets.load_dataset(source)
    if split not in splits and not (only_split and len(splits) == 1):
        raise ValueError(f"no split {split}; it has {', '.join(splits)}: give one with --split")
    return splits[split] if split in splits else next(iter(splits.values()))


def read_rows(source: str, split: str, config: str | None = None, images: bool = True,
              only_split: bool = False) -> list[tuple]:
    """[(name, row)] of a .json or .jsonl file, plain or .gz; or of one split of a hub data set, of a folder that
    `hf download` or `save_to_disk` made, or of a .parquet file. Pictures stay as stored, a path or bytes, until they
    are needed; images=False leaves them out. InputError when it cannot be read."""
    if source.removesuffix(".gz").endswith((".json", ".jsonl")):
        return read_file(source)
    import datasets  # a second to import, and most runs read a file
    from huggingface_hub.utils import logging
    datasets.disable_progress_bars()
    logging.set_verbosity_error()                  # a hub that cannot be reached is one line, not one per attempt
    try:
        rows = load_split(source, split, config, only_split)
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False)) if images else rows.remove_columns(name)
        return list(enumerate(rows, 1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"data set {source!r}, split {split!r}: cannot be loaded ({reason}); download it first, `hf download "
            "--repo-type dataset NAME --local-dir FOLDER`, and give --data FOLDER or a .parquet, .json or .jsonl file, "
            "or point HF_HOME to a cache that has it") from error


def column(row: dict, where: str, *names: str, kind: tuple = (str, int, float), default=None):
    """The first of these columns that the row has, else default. null is absent: hub sets fill their rows with it."""
    value = next((row[name] for name in names if row.get(name) is not None), default)
    if value is None:
        present = ", ".join(str(name) for name in row if row[name] is not None)
        raise InputError(f"{where}: no {' or '.join(names)}; it has: {present or 'nothing'}; rename or add the column")
    if not isinstance(value, kind):
        expected = " or ".join(each.__name__ for each in kind)
        raise InputError(f"{where}: {names[0]} has type {type(value).__name__}; expected {expected}")
    return value


def as_texts(values, name: str, where: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, (str, int, float)):
            raise InputError(f"{where}: {name} has an item of type {type(value).__name__}; expected texts")
    return tuple(map(str, values))


def as_image(value, where: str, root: str):
    """A path, a PIL image, or {bytes, path} as parquet files hold it -> absolute path or PIL image."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        with readable(f"of {where}"):
            return Image.open(io.BytesIO(value["bytes"]))
    value = value.get("path") if isinstance(value, dict) else value
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: an image is {value!r}; expected a path or an image")
    return os.path.abspath(os.path.join(root, value))


def strip_instruction(turn: str, where: str) -> str:
    """Mulberry-SFT puts an instruction of its own before the question, ending with the last header of the format. Every
    stage here asks with INSTRUCTION, so theirs goes; the <image> markers in front of it stay."""
    instruction, _, question = str(turn).rpartition(f"### {ANSWER}:")
    if not question.strip():
        raise InputError(f"{where}: the user turn has no question after its instruction; fix or remove the row")
    markers = LEADING_IMAGES.match(instruction)[0].count(IMAGE)
    return IMAGE * markers + question.strip()


def first_turns(turns: list, where: str) -> tuple[str, str]:
    """-> (question, solution): the first user turn, and the first assistant turn or ""."""
    first = {}
    for turn in turns:
        if not isinstance(turn, dict):
            raise InputError(f"{where}: a turn has type {type(turn).__name__}; expected {{role, content}}")
        first.setdefault(column(turn, where, "role", "from"), column(turn, where, "content", "value"))
    question = column(first, f"{where} messages", "user", "human")
    return strip_instruction(question, where), column(first, where, "assistant", "gpt", default="")


def sample_from_row(row, where: str, default_qid: str, root: str) -> Sample:
    if not isinstance(row, dict):
        raise InputError(f"{where}: has type {type(row).__name__}; expected an object with columns")
    turns = column(row, where, "messages", "conversations", kind=(list,), default=[])
    if turns:
        question, solution = first_turns(turns, where)
    else:
        question = str(column(row, where, "problem", "question"))
        solution = column(row, where, "solution", default="")
    if not question.replace(IMAGE, "").strip():
        raise InputError(f"{where}: the question is empty; write one or remove the row")
    images = column(row, where, "images", "image", kind=(str, list, dict, Image.Image), default=[])
    images = images if isinstance(images, list) else [images]
    key_words = column(row, where, "key_words", "key_word", "keywords", kind=(str, list), default=[])
    key_words = key_words.split(",") if isinstance(key_words, str) else key_words
    stripped = [word.strip() for word in as_texts(key_words, "key_words", where)]
    choices = column(row, where, "choices", kind=(list,), default=[])
    answer = column(row, where, "answer", default="" if turns else None)
    return Sample(qid=str(column(row, where, "qid", "id", default=default_qid)), question=question,
                  images=tuple(as_image(image, where, root) for image in images), answer=str(answer),
                  key_words=tuple(filter(None, stripped)), choices=as_texts(choices, "choices", where),
                  solution=str(solution).strip(), where=where)


def load_samples(source: str, image_root: str = "", split: str = "train") -> list[Sample]:
    """What `read_rows` reads, as Samples. Image files are not opened: check_images and filter_sft look at them.
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


def held_out(config) -> list[Sample]:
    """The questions of --eval_data that training asks: eval_questions of them, always the same ones."""
    samples = load_samples(config.eval_data, config.image_root, config.split)
    chosen = sorted(samples, key=lambda sample: seed_of("held out", sample.qid))[: config.eval_questions]
    check_images(chosen)
    require(chosen, "answer", config.eval_data)
    return chosen


def check_images(samples: list[Sample]) -> None:
    """InputError when an image file is missing: found before the run, not in its third hour."""
    missing = [(sample.where, image) for sample in samples for image in sample.images
               if isinstance(image, str) and not os.path.isfile(image)]
    if missing:
        raise InputError(f"{missing[0][0]}: image {missing[0][1]} does not exist ({len(missing)} missing in all); "
                         "check the path or set --image_root")


def require(samples: list[Sample], name: str, source: str) -> None:
    """InputError when a sample lacks its answer or its key_words: that reward would be 0 whatever the model says."""
    bare = [sample.qid for sample in samples if not getattr(sample, name)]
    if bare:
        raise InputError(f"{source}: {len(bare)} of {len(samples)} questions have no {name}, the first is qid "
                         f"{bare[0]}; add the column or drop these rows")


def sft_verdict(sample: Sample) -> str:
    """"kept", or why a warm-up sample is dropped (release: dataset/filter.py). Of images only the headers are read."""
    if not sample.solution:
        return "no_solution"
    if "let me rethink it" in sample.solution.lower():
        return "rethink"
    if CONTROL_TOKEN.search(sample.solution):
        return "control_token"
    try:
        sides = [side for image in sample.images for side in image_size(image)]
    except InputError:
        return "bad_image"
    return "small_image" if min(sides, default=28) < 28 else "kept"


def filter_sft(samples: list[Sample]) -> tuple[list[Sample], dict[str, int]]:
    """-> the samples worth imitating, and how many had each verdict."""
    verdicts = [sft_verdict(sample) for sample in samples]
    counts = {name: verdicts.count(name)
              for name in ("kept", "no_solution", "rethink", "control_token", "bad_image", "small_image")}
    return [sample for sample, verdict in zip(samples, verdicts) if verdict == "kept"], counts


# ---- prompts


def refuse_control_tokens(text: str, sample: Sample) -> None:
    """"<|image_pad|>" in a text would count as an image token without an image, "<|im_end|>" would end the turn."""
    found = CONTROL_TOKEN.search(text)
    if found:
        raise InputError(f"{sample.where}: qid {sample.qid!r} has the control token {found[0]} in its text; remove it")
    if text.encode("utf-8", "ignore").decode() != text:
        raise InputError(f"{sample.where}: qid {sample.qid!r} has half a surrogate pair in its text; remove it")


def chat_text(sample: Sample, processor) -> str:
    """The prompt as text, one image token per image. Images that lead the question come before the instruction, others
    stay where the question has them; without markers all lead."""
    refuse_control_tokens(sample.question, sample)
    markers, images = sample.question.count(IMAGE), len(sample.images)
    if markers not in (0, images):
        raise InputError(f"{sample.where}: qid {sample.qid!r} has {markers} {IMAGE} markers for {images} images; "
                         "have one marker per image, or none")
    leading = LEADING_IMAGES.match(sample.question)
    first, *others = sample.question[leading.end():].split(IMAGE)
    content = [{"type": "image"}] * (leading[0].count(IMAGE) if markers else images)
    content.append({"type": "text", "text": INSTRUCTION + first})
    for text in others:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    chat = [{"role": "user", "content": content}]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def mrope_positions(input_ids: list[int], grid_thw, image_token_id: int, merge_size: int) -> torch.Tensor:
    """-> (3, P) time, row, column of each token (Qwen2.5-VL: get_rope_index). grid_thw: (images, 3) patches, or None.

    Text counts on in all three. The tokens of an image add their row and column to the position where it starts, and
    the text after it goes on past its longer side."""
    grids = iter([] if grid_thw is None else grid_thw.tolist())
    start, blocks = 0, []
    for is_image, run in itertools.groupby(input_ids, lambda token: token == image_token_id):
        if is_image:
            time, height, width = next(grids)
            sides = (time, height // merge_size, width // merge_size)
            block = torch.cartesian_prod(*map(torch.arange, sides)).T              # (3, tokens) column runs fastest
            length = max(sides[1:])
        else:
            length = len(list(run))
            block = torch.arange(length).expand(3, -1)                             # (3, length)
        blocks.append(start + block)
        start += length
    return torch.cat(blocks, dim=1)                                                # (3, P)


def encode_prompt(sample: Sample, processor) -> Prompt:
    """Never truncates. InputError, naming the qid: control tokens in the question, or images it does not match."""
    text = chat_text(sample, processor)
    images = [load_image(image) for image in sample.images]
    encoded = processor(text=[text], images=images or None, return_tensors="pt")
    input_ids, grid_thw = encoded["input_ids"][0].tolist(), encoded.get("image_grid_thw")
    image_token_id, merge_size = processor.image_token_id, processor.image_processor.merge_size
    expected = 0 if grid_thw is None else int(grid_thw.prod(-1).sum()) // merge_size**2
    found = input_ids.count(image_token_id)
    if found != expected:
        raise InputError(f"{sample.where}: qid {sample.qid!r} has {found} image tokens but its images need {expected}; "
                         "check the chat template of the model folder")
    position_ids = mrope_positions(input_ids, grid_thw, image_token_id, merge_size)
    return Prompt(sample, input_ids, position_ids, encoded.get("pixel_values"), grid_thw)


def prompt_length(sample: Sample, processor) -> int:
    """len(encode_prompt(sample, processor).input_ids), from the image headers alone."""
    length = len(processor.tokenizer(chat_text(sample, processor)).input_ids)      # with one token per image
    for width, height in map(image_size, sample.images):
        patches = processor.image_processor.get_number_of_image_patches(height, width)
        length += patches // processor.image_processor.merge_size**2 - 1
    return length


def drop_long(samples: list[Sample], processor, max_prompt_tokens: int, log=print) -> list[Sample]:
    """Prompts over the limit are dropped up front, never cut: a cut prompt loses image tokens."""
    lengths = [prompt_length(sample, processor) for sample in samples]
    kept = [sample for sample, length in zip(samples, lengths) if length <= max_prompt_tokens]
    ranked = sorted(zip(lengths, samples), key=lambda pair: -pair[0])
    longest = "longest: " + ", ".join(f"qid {sample.qid} with {length}" for length, sample in ranked[:3])
    if len(kept) < len(samples):
        dropped = f"{len(samples) - len(kept)} of {len(samples)} prompts"
        log(f"dropped {dropped}, over {max_prompt_tokens} tokens ({longest})")
    if not kept:
        raise InputError(f"no prompt is within {max_prompt_tokens} tokens ({longest}); "
                         "raise --max_prompt or lower --max_pixels")
    return kept


def encode_solution(sample: Sample, processor) -> list[int]:
    """The response to imitate, with its end token: a model that is never taught to stop does not."""
    refuse_control_tokens(sample.solution, sample)
    return processor.tokenizer(sample.solution).input_ids + [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]


# ---- buckets and batches
def seed_of(*parts) -> int:
    """A seed from anything printable, e.g. (seed, step, qid): equal on every rank, in every run, after every resume."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def save_png(image: Image.Image, folder: str) -> str:
    """-> path. Named by its pixels: a second run reuses the file, and never changes one that older buckets point to."""
    picture = load_image(image)
    digest = hashlib.sha1(picture.tobytes()).hexdigest()
    path = os.path.join(folder, f"{picture.width}x{picture.height}_{digest}.png")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        picture.save(path + ".tmp", "PNG")
        os.replace(path + ".tmp", path)
    return path


def bucket_row(sample: Sample, count: int, folder: str) -> dict:
    """What load_samples reads back as an equal Sample. Images move to relative paths, those of hub sets to files."""
    paths = [image if isinstance(image, str) else save_png(image, os.path.join(folder, "images"))
             for image in sample.images]
    return {"qid": sample.qid, "problem": sample.question, "answer": sample.answer,
            "images": [os.path.relpath(path, folder) for path in paths], "key_words": sample.key_words,
            "choices": sample.choices, "solution": sample.solution, "correct": count}


def write_buckets(folder: str, samples: list[Sample], correct: dict[str, int], group_size: int) -> dict[str, int]:
    """easy.jsonl (all group_size answers right), medium.jsonl (some), hard.jsonl (none): each question in exactly one.
    correct: right answers by qid. Returns the sizes. No old file is replaced before all three new ones are complete."""
    assert sorted(correct) == sorted(sample.qid for sample in samples), "each sample needs a count, each count a sample"
    assert all(0 <= count <= group_size for count in correct.values()), f"a count is not in 0..{group_size}"
    lines = {"easy": [], "medium": [], "hard": []}
    for sample in samples:
        count = correct[sample.qid]
        bucket = "easy" if count == group_size else "medium" if count > 0 else "hard"
        lines[bucket].append(json.dumps(bucket_row(sample, count, folder)) + "\n")
    os.makedirs(folder, exist_ok=True)
    paths = {bucket: os.path.join(folder, f"{bucket}.jsonl") for bucket in lines}
    for bucket, path in paths.items():
        with open(path + ".tmp", "w") as file:
            file.writelines(lines[bucket])
            file.flush()
            os.fsync(file.fileno())
    for path in paths.values():
        os.replace(path + ".tmp", path)
    return {bucket: len(lines[bucket]) for bucket in lines}


def batches(n: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of n samples. An epoch's order depends on (seed, epoch) alone; a batch may span two epochs; what is left
    over at the end is not used. InputError when there is not one full batch."""
    orders = [numpy.random.default_rng([seed, epoch]).permutation(n).tolist() for epoch in range(epochs)]
    order = list(itertools.chain.from_iterable(orders))
    if len(order) < batch_size:
        raise InputError(f"{n} questions x {epochs} epochs do not fill one batch of {batch_size}; "
                         "use more data, more epochs or a smaller batch")
    return [order[i:i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]


@dataclass(frozen=True)
class Sections:
    """What stands below each header: None when the header is missing, "" when nothing stands below it."""
    description: str | None                        # of the first such header
    rationales: str | None                         # of the first such header
    steps: tuple[str, ...]                         # Step 1, Step 2, ... each after the one before it
    answer: str | None                             # "" also when there are two different ones


def header(name: str) -> re.Pattern:
    """Matches the name after ###, in any case and spacing, with or without a colon."""
    words = r"\s*".join(re.escape(word) for word in name.split())
    return re.compile(rf"\s*{words}(?!\w)\s*:?", re.IGNORECASE)


DESCRIPTION_HEADER = header(DESCRIPTION)
RATIONALES_HEADER = header(RATIONALES)
STEP_HEADER = re.compile(rf"\s*{STEP}\s*(\d{{1,3}})(?!\w)\s*:?", re.IGNORECASE)
ANSWER_HEADER = header(ANSWER)
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>|</s>")      # <|im_end|> belongs to no section


def texts_below(chunks: list[str], pattern: re.Pattern) -> list[str]:
    """What stands below each header of this kind; a chunk is the text from one ### to the next."""
    matches = [(chunk, pattern.match(chunk)) for chunk in chunks]
    return [chunk[match.end():].strip() for chunk, match in matches if match]


def parse(response: str) -> Sections:
    """The sections of a response. A section ends at the next ###, whatever follows it, or at the end of the text."""
    chunks = re.split("#{3,}", SPECIAL_TOKEN.sub(" ", response))[1:]     # [0] stands before the first header
    descriptions = texts_below(chunks, DESCRIPTION_HEADER)
    rationales = texts_below(chunks, RATIONALES_HEADER)
    answers = texts_below(chunks, ANSWER_HEADER)
    stated = [answer for answer in answers if answer]
    different = {" ".join(answer.casefold().split()) for answer in stated}
    steps = []
    for chunk in chunks:
        match = STEP_HEADER.match(chunk)
        if match and int(match[1]) == len(steps) + 1:
            steps.append(chunk[match.end():].strip())
    return Sections(
        description=descriptions[0] if descriptions else None,
        rationales=rationales[0] if rationales else None,
        steps=tuple(steps),
        answer=None if not answers else stated[0] if len(different) == 1 else "",
    )


def worth_imitating(samples: list[Sample], config, processor, log=print) -> list[Sample]:
    """The warm-up rows that are left after the release's filter and the length limit, with counts on the screen."""
    kept, counts = filter_sft(samples)
    lengths = [len(encode_solution(sample, processor)) for sample in kept]
    short = [sample for sample, length in zip(kept, lengths) if length <= config.max_response]
    counts |= {"kept": len(short), f"over {config.max_response} tokens": len(kept) - len(short)}
    log("warm-up data: " + ", ".join(f"{count} {reason}" for reason, count in counts.items() if count))
    if not short:
        raise InputError(f"{config.data}: no warm-up row is left ({counts}): see --max_response and the row format")
    return short
