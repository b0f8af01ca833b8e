"""The whole method on a laptop: a drawn world, a tiny Qwen-VL, and the five stages through train.py and eval.py.

    python demo.py                 warm-up, sampling, stage 1, stage 2, and evaluations: about 3 minutes on 2 cores
    python demo.py --family qwen3_vl        the same with a tiny Qwen3-VL
    python demo.py --walk          every tensor of one RL step, in seconds (docs/walk.txt)
    python demo.py --world busy    more mistakes to mend, in 6 minutes; with --ablate two stages against one, in hours

The world is a 2x2 grid of coloured shapes with questions that are answered by seeing first and counting second. Its
warm-up teacher errs on purpose, so that reinforcement learning has something to correct: it often takes green for blue
and a triangle for a circle (`slip_seeing`, per attribute) and sometimes forgets the last of several objects it counts
(`slip_counting`). The models are genuine, made from a seed. docs/demo.md says what the demo shows, and what not.
"""
import os

# Matrices as small as these are too little work for threads to share; processes share the questions instead.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded, so before the imports below

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import data
import eval as evaluation
import train
import view
from benchmarks.report import interval
from engine.weights import FAMILIES, transformers_class
from plumbing.processes import barrier, is_main, print0, shard_of_rank, start_processes, stop_processes
from plumbing.run_folder import write_text

# --- the world ------------------------------------------------------------------------------------------------------
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
MISTAKEN = {"green": "blue", "triangle": "circle"}  # what the warm-up teacher takes them for
CELL = 28  # pixels: one merged image token (patch 14, merge 2)
DESCRIBE = "Describe the image."  # the question whose answer is the description alone


@dataclass(frozen=True)
class Question:
    kind: str  # "count", "subtract" or "add"
    colour: str  # "" = any
    shape: str  # "" = any
    extra: int  # objects that "add" adds

    @property
    def label(self) -> str:
        return " ".join(word for word in (self.colour, f"{self.shape or 'object'}s") if word)

    @property
    def text(self) -> str:
        return {"count": f"How many {self.label} are there?",
                "subtract": f"Subtract all {self.label}. How many objects are left?",
                "add": f"Add {self.extra} {self.label}. How many objects are there?"}[self.kind]

    def names(self, pair: tuple[str, str]) -> bool:
        """Whether the label fits this (colour, shape)."""
        return self.colour in ("", pair[0]) and self.shape in ("", pair[1])

    def reason(self, pairs: tuple, counts: list[bool]) -> tuple[list[str], int]:
        """The steps to the answer, and the answer, when `counts` says which objects count: "red 1, blue 1, red 2"."""
        total, named = len(pairs), sum(counts)
        # Of each object only what the label asks about is said: its colour, its shape or both.
        asked = [" ".join(word for word, part in zip(pair, (self.colour, self.shape)) if part) for pair in pairs]
        listed = ", ".join(f"{words} {sum(counts[:i])}" for i, words in enumerate(asked, 1))
        if self.kind == "count":
            return [listed], named
        if self.kind == "subtract":
            return [listed, f"{total} - {named} = {total - named}"], total - named
        return [f"{total} + {self.extra} = {total + self.extra}"], total + self.extra


@dataclass(frozen=True)
class Item:
    objects: tuple[tuple[str, str], ...]  # (colour, shape) in reading order
    image: Image.Image  # 56 x 56
    question: Question
    reasoning: str  # right steps, from the true caption
    answer: str
    response: str  # of the warm-up teacher: may be wrong
    caption: str  # names all objects

    @property
    def key_words(self) -> list[str]:
        return sorted({f"{colour} {shape}" for colour, shape in self.objects})


def describe(objects: tuple) -> str:
    return ", ".join(map(" ".join, objects)) + "."


def draw(objects: tuple, rng: random.Random, colours: dict[str, tuple] = COLOURS, side: int = 2) -> Image.Image:
    """Objects fill side x side cells in reading order, with jitter of place (2 px), size, colour, and pixel noise."""
    image = Image.new("RGB", (side * CELL, side * CELL), (rng.randint(190, 235),) * 3)
    pen = ImageDraw.Draw(image)
    for cell, (colour, shape) in enumerate(objects):
        x, y = ((place + 0.5) * CELL + rng.uniform(-2, 2) for place in (cell % side, cell // side))
        r = rng.uniform(8.5, 11.5)
        fill = tuple(min(255, max(0, round(value + rng.uniform(-25, 25)))) for value in colours[colour])
        if shape == "circle":
            pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        elif shape == "square":
            pen.rectangle([x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r], fill=fill)
        else:
            pen.polygon([(x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=fill)
    noise = numpy.random.default_rng(rng.getrandbits(32)).normal(0, 10, (side * CELL, side * CELL, 3))
    return Image.fromarray((numpy.asarray(image) + noise).clip(0, 255).astype(numpy.uint8))


def teach(question: Question, objects: tuple, slip_seeing: float, slip_counting: float, rng: random.Random) -> str:
    """The imperfect warm-up teacher's response: it describes what it believes to see, and counts that."""
    seen = tuple(tuple(MISTAKEN[word] if word in MISTAKEN and rng.random() < slip_seeing else word for word in pair)
                 for pair in objects)
    counts = [question.names(pair) for pair in seen]
    if sum(counts) >= 2 and rng.random() < slip_counting:
        counts[max(i for i, hit in enumerate(counts) if hit)] = False
    steps, answer = question.reason(seen, counts)
    plan = f"Add {question.extra}" if question.kind == "add" else f"{question.kind.capitalize()} the {question.label}"
    numbered = [f"### {data.STEP} {i}: {step}." for i, step in enumerate(steps, 1)]
    return "\n".join([f"### {data.DESCRIPTION}: {describe(seen)}", f"### {data.RATIONALES}: {plan}.",
                      f"### {data.THINK}", *numbered, f"### {data.ANSWER}: {answer}"])


def make_items(count: int, seed: int, split: str, slip_seeing: float = 0.55, slip_counting: float = 0.3) -> list[Item]:
    """`count` items from the stream (seed, split); streams of different splits are independent."""
    rng, items = random.Random(f"{seed} {split}"), []
    for _ in range(count):
        objects = tuple((rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(rng.randint(2, 4)))
        # The label is a colour, a shape or both, four times in five of an object that is there.
        colour, shape = rng.choice(objects) if rng.random() < 0.8 else (rng.choice(list(COLOURS)), rng.choice(SHAPES))
        colour, shape = rng.choice([(colour, ""), ("", shape), (colour, shape)])
        question = Question(rng.choice(["count", "subtract", "subtract", "add"]), colour, shape, rng.randint(1, 4))
        steps, answer = question.reason(objects, [question.names(pair) for pair in objects])
        response = teach(question, objects, slip_seeing, slip_counting, rng)
        items.append(Item(objects, draw(objects, rng), question, ". ".join(steps) + ".", str(answer), response,
                          describe(objects)))
    return items


# --- tokenizer, processor, model ------------------------------------------------------------------------------------
END_OF_TEXT, TURN_START, TURN_END, IMAGE_PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", IMAGE_PAD, "<|video_pad|>"]
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' %}{{ part['text'] }}{%- endif %}{%- endfor %}{%- endif %}{{ '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"""

HEADERS = [data.DESCRIPTION, data.RATIONALES, *(f"{data.STEP} {i}" for i in range(1, 4)), data.ANSWER]
# These texts cost one token each: they never vary, so the tiny model need not spend capacity on spelling them.
FIXED_PHRASES = ["user\n", "assistant\n", *(f" {digit}" for digit in range(10)), data.INSTRUCTION.strip(),
                 f"### {data.THINK}", *(f"### {name}:" for name in HEADERS)]


def make_processor(texts: list[str], family: str = "qwen2_5_vl", phrases: tuple[str, ...] = ()):
    """A family's processor whose byte-level BPE of 512 tokens is trained on `texts`; a phrase is one token."""
    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    bpe = Qwen2Tokenizer().backend_tokenizer  # it cuts a text as Qwen's does, and has learned nothing yet
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=2, show_progress=False))
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=END_OF_TEXT, pad_token=END_OF_TEXT, eos_token=TURN_END,
        extra_special_tokens=[TURN_START, *VISION_TOKENS], padding_side="left", model_max_length=2048)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in (*FIXED_PHRASES, *phrases)])
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 802816}  # explicit: the class's default is shared and mutable
    normal = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3) if family == "qwen3_vl" else {}  # else those of CLIP
    patch = transformers_class(family, "Config")().vision_config.patch_size
    images = Qwen2VLImageProcessor(size=pixels, patch_size=patch, **normal)
    return transformers_class(family, "Processor")(
        image_processor=images, video_processor=Qwen2VLVideoProcessor(), tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE)


def make_model(processor, seed: int = 0, vision_depth: int = 1, initializer_range: float = 0.06,
               family: str = "qwen2_5_vl"):
    """An untrained Qwen-VL of the real architecture, its weights a function of `seed` alone."""
    id_of, last = processor.tokenizer.convert_tokens_to_ids, [vision_depth - 1]
    ends = dict(bos_token_id=id_of(END_OF_TEXT), eos_token_id=id_of(TURN_END), pad_token_id=id_of(END_OF_TEXT))
    tower = dict(hidden_size=96, intermediate_size=192, out_hidden_size=128)
    section, of_text, of_vision = {  # what each family has of its own; the heads of Qwen3-VL are wider than hidden_size
        "qwen2_vl": ([2, 7, 7], {}, dict(embed_dim=96, mlp_ratio=2, hidden_size=128)),
        "qwen2_5_vl": ([2, 7, 7], {}, dict(window_size=112, fullatt_block_indexes=last, **tower)),
        "qwen3_vl": ([12, 10, 10], dict(head_dim=64), dict(num_position_embeddings=64, deepstack_visual_indexes=last,
                                                        **tower))}[family]
    text_config = dict(
        vocab_size=-(-len(processor.tokenizer) // 16) * 16, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        rope_parameters=dict(rope_type="default", rope_theta=20.0, mrope_section=section),  # as small as positions are
        initializer_range=initializer_range, rms_norm_eps=1e-6, **of_text, **ends)
    vision_config = dict(depth=vision_depth, num_heads=4, initializer_range=initializer_range, **of_vision)
    config = transformers_class(family, "Config")(
        text_config=text_config, vision_config=vision_config, tie_word_embeddings=True,
        image_token_id=id_of(IMAGE_PAD), video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"), vision_end_token_id=id_of("<|vision_end|>"), **ends)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers_class(family, "ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = [id_of(TURN_END), id_of(END_OF_TEXT)]
    return model.eval()


# --- CLIP -----------------------------------------------------------------------------------------------------------
CLIP_CONFIG = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=2 * CELL, patch_size=14, layers=1, width=96, head_width=24, mlp_ratio=2.0),
    text_cfg=dict(context_length=20, vocab_size=49408, layers=1, width=64, heads=4, mlp_ratio=2.0))
CLIP_PIXELS = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="squash")


class World(NamedTuple):
    """What a drawn world has of its own."""
    make_items: Callable[[int, int, str], list[Item]] = make_items  # of a number, a seed and a split
    colours: dict[str, tuple] = COLOURS
    clip: dict = CLIP_CONFIG
    sizes: dict[str, int] = dict(captions=3000, warmup=3000, questions=480, evaluation=500)
    steps: dict[str, int] = dict(clip=300, base=320, sft=240, stage1=20, stage2=36)
    phrases: tuple[str, ...] = ()  # that are one token each
    flags: tuple[str, ...] = ()  # of every stage and evaluation


def misdescribe(objects: tuple, rng: random.Random, colours: dict[str, tuple] = COLOURS) -> str:
    """A caption with one wrong colour or shape."""
    place, kind = rng.randrange(len(objects)), rng.randrange(2)
    wrong = list(objects[place])
    wrong[kind] = rng.choice([word for word in (list(colours), SHAPES)[kind] if word != wrong[kind]])
    return describe((*objects[:place], tuple(wrong), *objects[place + 1:]))


def train_clip(items: list[Item], seed: int, steps: int, world: World, batch: int = 64):
    """Contrastive training; each image is also pushed away from its caption with one word wrong."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.CLIP(**world.clip)
    tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
    model.token_embedding.weight.requires_grad_(False).normal_(0, 0.3)  # a dozen words need no learned ones
    rng, images = random.Random(seed), numpy.stack([numpy.asarray(item.image) for item in items])
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1  # (items, 3, 56, 56), or larger
    captions = tokenize([item.caption for item in items])  # (items, context_length)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.12)
    for _ in range(steps):
        chosen = rng.sample(range(len(items)), batch)
        spoilt = tokenize([misdescribe(items[i].objects, rng, world.colours) for i in chosen])
        texts = torch.cat([captions[chosen], spoilt])
        image_features = model.encode_image(images[chosen], normalize=True)  # (batch, D)
        text_features = model.encode_text(texts, normalize=True)  # (2 batch, D)
        logits = model.logit_scale.exp() * image_features @ text_features.T  # (batch, 2 batch)
        twins = (texts[None] == captions[chosen][:, None]).all(-1)  # equal captions are all right
        twins[:, :batch] &= ~torch.eye(batch, dtype=torch.bool)
        logits, own = logits.masked_fill(twins, -1e4), torch.arange(batch)
        wrong = (image_features * text_features[batch:]).sum(-1)  # (batch,) cosines
        contrast = F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :batch].T, own)
        loss = contrast + 4 * F.relu(wrong - 0.3).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def save_clip(model, folder: str, world: World):
    """The folder that open_clip loads as local-dir: and --clip takes."""
    os.makedirs(folder, exist_ok=True)
    whole = dict(model_cfg=world.clip, preprocess_cfg=CLIP_PIXELS)
    write_text(f"{folder}/open_clip_config.json", json.dumps(whole, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              f"{folder}/open_clip_model.safetensors")


# --- files ----------------------------------------------------------------------------------------------------------
def make_world(out: str, seed: int, world: World, family: str = "qwen2_5_vl"):
    """Images, the four data files, and the untrained model, under out/world and out/untrained."""
    folder = f"{out}/world"
    os.makedirs(f"{folder}/images", exist_ok=True)

    def drawn(split: str):
        """Items of a split with the paths of their images, which are written."""
        for i, item in enumerate(world.make_items(world.sizes[split], seed, split)):
            item.image.save(f"{folder}/images/{split}_{i}.png", compress_level=1)
            yield item, [f"images/{split}_{i}.png"]

    def imitate(question: str, solution: str, images: list[str]) -> dict:
        return dict(messages=[dict(role="user", content=question), dict(role="assistant", content=solution)],
                    images=images)

    base = []
    for item, images in drawn("captions"):
        base.append(imitate(DESCRIBE, f"### {data.DESCRIPTION}: {item.caption}", images))
        base.append(imitate(f"{item.caption} {item.question.text}", item.reasoning, []))
    taught = [imitate(item.question.text, item.response, images) for item, images in drawn("warmup")]
    asked = {split: [dict(qid=f"{split}_{i}", problem=item.question.text, answer=item.answer, images=images,
                          key_words=item.key_words, caption=item.caption)
                     for i, (item, images) in enumerate(drawn(split))] for split in ("questions", "evaluation")}
    for name, rows in (asked | dict(base=base, warmup=taught)).items():
        write_text(f"{folder}/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    processor = make_processor([turn["content"] for row in base + taught for turn in row["messages"]], family,
                               world.phrases)
    make_model(processor, seed, family=family).save_pretrained(f"{out}/untrained")
    processor.save_pretrained(f"{out}/untrained")


# --- the five stages ------------------------------------------------------------------------------------------------
PHASES = {"sft": "warm-up", "stage1": "after stage 1", "stage2": "after stage 2"}
WATCHED = {"base/sft": ("opt/loss",), "sft": ("opt/loss",), "stage1": ("reward/clip", "reward/keyword"),
           "stage2": ("reward/accuracy",)}
FIGURES = ("accuracy", "caption_exact", "clip", "keyword", "format", "length")
PIXELS = ["--min_pixels", str(4 * 28**2), "--max_pixels", str(4 * 32**2)]  # 56 x 56 stay, in Qwen3-VL become 64 x 64
SHARED = ["--dtype", "float32", "--max_prompt", "64", "--max_response", "96", "--slots", "128", *PIXELS]
TRAINING = [*SHARED, "--restart", "--no_gradient_checkpointing", "--save_every", "0", "--token_budget", "4096"]
SUPERVISED = ["--questions_per_rollout", "64", "--questions_per_update", "64", "--epochs", "20", "--lr", "3e-3"]
REINFORCED = ["--questions_per_rollout", "32", "--questions_per_update", "8", "--epochs", "100", "--lr", "1e-4"]


def call(program, *argv):
    """Run train.py or eval.py as the command line would; a failure ends the demo with its exit code."""
    argv = [str(word) for word in argv]
    print0(f"\n$ python {os.path.basename(program.__file__)} {' '.join(argv)}")
    if code := program.main(argv):
        sys.exit(code)


def evaluate(made: str, model: str, out: str, *flags) -> dict[str, tuple[float, float]]:
    """eval.py with four samples a question at temperature 1, and how often a caption is right in every word. Returns
    mean and half width of the 95 % interval; nothing on ranks above 0. made: the folder of world and CLIP."""
    call(evaluation, "--model", model, "--data", f"{made}/world/evaluation.jsonl", "--out", out, "--clip",
         f"{made}/clip", *SHARED, "--group_size", 4, "--temperature", "1.0", *flags)
    if not is_main():
        return {}
    figures = data.read_json(f"{out}/report.json")["figures"]
    results = {name: (figure["mean"], figure["half_width"]) for name, figure in figures.items()}
    captions = {row["qid"]: row["caption"] for row in data.read_json(f"{made}/world/evaluation.jsonl").values()}
    results["caption_exact"] = interval([
        statistics.fmean(data.parse(one["text"]).description == captions[row["qid"]] for one in row["responses"])
        for row in data.read_json(f"{out}/responses.jsonl").values()])
    return {name: results[name] for name in FIGURES}


def phases(out: str, seed: int, world: World, family: str, lora_rank: int = 0) -> dict[str, Callable]:
    """What the demo does, in its order, under the names of the folders of the stages."""
    files, clip, flags, steps = f"{out}/world", f"{out}/clip", world.flags, world.steps
    rl = ["--clip", clip, *(["--lora_rank", lora_rank, "--lr", "1e-3"] if lora_rank else [])]
    makers = [lambda: make_world(out, seed, world, family),  # rank 0's, as it saves the model
              lambda: save_clip(train_clip(world.make_items(world.sizes["captions"], seed, "captions"), seed,
                                           steps["clip"], world), clip, world)]

    def stage(name: str, folder: str, steps: int, *more):
        usual = [*TRAINING, *(SUPERVISED if name == "sft" else REINFORCED), *flags]
        call(train, "--stage", name, "--out", folder, "--seed", seed, "--max_steps", steps, *usual, *more)

    return {
        "world and clip": lambda: [make() for make in shard_of_rank(makers)],
        "base/sft": lambda: stage("sft", f"{out}/base", steps["base"], "--model", f"{out}/untrained", "--data",
                                  f"{files}/base.jsonl", "--freeze_vision", "False"),  # what a download knows
        "sft": lambda: stage("sft", out, steps["sft"], "--model", f"{out}/base/sft/model", "--data",
                             f"{files}/warmup.jsonl"),
        "sample": lambda: call(train, "--stage", "sample", "--out", out, "--seed", seed, "--data",
                               f"{files}/questions.jsonl", *TRAINING, *flags),
        "stage1": lambda: stage("1", out, steps["stage1"], *rl),
        "stage2": lambda: stage("2", out, steps["stage2"], *rl)}


# --- the screen, and all of it --------------------------------------------------------------------------------------
@contextlib.contextmanager
def log_to(path: str):
    """Inside, what rank 0 prints goes to this file. Yields a print for the screen and the file."""
    screen = sys.stdout
    with open(path if is_main() else os.devnull, "w", buffering=1) as file, contextlib.redirect_stdout(file):
        def say(text: str):
            for each in (screen, file) if is_main() else ():
                print(text, file=each, flush=True)

        yield say


def learned(folder: str, metrics: tuple[str, ...]) -> str:
    """What a stage has changed: of each metric the mean of the first and of the last three steps. Of stage sample, how
    many questions it has found easy, medium and hard."""
    sizes = {kind: f"{folder}/{kind}.jsonl" for kind in ("easy", "medium", "hard")}
    if os.path.exists(sizes["easy"]):
        return ", ".join(f"{len(data.read_json(path))} {kind}" for kind, path in sizes.items())
    rows = list(data.read_json(f"{folder}/metrics.jsonl").values()) if metrics else []
    return ", ".join(f"{metric.split('/')[1]} {statistics.fmean(row[metric] for row in rows[:3]):.2f} -> "
                     f"{statistics.fmean(row[metric] for row in rows[-3:]):.2f}" for metric in metrics)


def table(rows: dict[str, dict[str, tuple[float, float]]]) -> str:
    """Mean and half width of the 95 % interval of each figure."""
    lines = [f"\n{'':<22}" + "".join(f"{figure:>16}" for figure in FIGURES)]
    return "\n".join(lines + [f"{name:<22}" + "".join(f"{mean:>9.3f} ±{half:.3f}" for mean, half in row.values())
                              for name, row in rows.items()])


def run(out: str, seed: int, world: World, say=print0, family: str = "qwen2_5_vl", lora_rank: int = 0):
    """The world, its base models, the stages and their evaluation. Rank 0 writes out/summary.json: the seconds of each
    phase, and the mean of each figure with the half width of its 95 % interval."""
    start_processes()
    seconds, results = {}, {}
    for name, phase in phases(out, seed, world, family, lora_rank).items():
        start = time.perf_counter()
        phase()
        barrier()
        seconds[name] = time.perf_counter() - start
        say(f"{name:<16}{seconds[name]:5.0f} s   {learned(f'{out}/{name}', WATCHED.get(name, ()))}")
        if name in PHASES:
            results[name] = evaluate(out, f"{out}/{name}/model", f"{out}/eval/{name}", *world.flags)
            seconds[f"evaluate {name}"] = time.perf_counter() - start - seconds[name]
    if is_main():
        write_text(f"{out}/summary.json", json.dumps(dict(seconds=seconds, phases=results), indent=1))
        view.main([out])
        say(table({PHASES[name]: figures for name, figures in results.items()}))
        say(f"\n{sum(seconds.values()):.0f} seconds; open {out}/view.html: curves, and what was written about an image")


def launch(processes: int, argv: list[str]) -> int:
    """`torchrun --nproc_per_node PROCESSES demo.py ..`; returns 0, or the exit code of what failed first."""
    try:
        torchrun.main(["--standalone", "--nproc_per_node", str(processes), __file__, *argv])
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as stop:  # Ctrl-C
        return 128 + stop.sigval
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="everything is written here (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of world, models and sampling (default: %(default)s)")
    parser.add_argument("--family", default="qwen2_5_vl", choices=FAMILIES, help="of the model (default: %(default)s)")
    parser.add_argument("--world", default="small", choices=("small", "busy"), help="(default: %(default)s)")
    parser.add_argument("--ablate", action="store_true", help="compare two stages with one, over seeds of everything")
    parser.add_argument("--only", default="", help="with --ablate: these arms, with commas between, and no other")
    parser.add_argument("--lora_rank", type=int, default=0, help="of adapters, which alone are trained in RL; 0: all")
    parser.add_argument("--walk", action="store_true", help="only print every tensor of one RL step")
    args = parser.parse_args(argv)
    from transformers.utils.logging import disable_progress_bar  # of transformers, when it saves the tiny model
    from variants import ablation  # which imports this file
    disable_progress_bar()
    if args.walk:
        from plumbing.walk import show_step  # only here
        return show_step(args.seed)
    os.makedirs(args.out, exist_ok=True)
    if args.ablate:
        return ablation.run(args.out, args.world, args.only, parser.error)
    processes, world = min(4, torch.cuda.device_count() or os.cpu_count()), ablation.WORLDS[args.world]
    if processes > 1 and "RANK" not in os.environ:  # we have been started by hand, not by torchrun
        return launch(processes, sys.argv[1:] if argv is None else argv)
    with log_to(f"{args.out}/log.txt") as say:
        say(f"this takes minutes; the log is {args.out}/log.txt")
        run(args.out, args.seed, world, say, args.family, args.lora_rank)
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
