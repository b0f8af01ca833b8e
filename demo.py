"""The embedded default: a drawn world, a tiny genuine Qwen2.5-VL and a tiny CLIP, all made from a seed, offline.

The world is a 2x2 grid of coloured shapes with questions that are answered by seeing first and counting second.

Its warm-up teacher is synthetic and errs on purpose, so that reinforcement learning has something to correct: it often
takes green for blue and a triangle for a circle (`slip_seeing`, per attribute) and sometimes forgets the last of
several objects it counts (`slip_counting`). Its reasoning follows what it believes to see. Answers, captions and key
words are always true.
"""
import json
import random
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from PIL import ImageDraw
from tokenizers import AddedToken
from tokenizers import Regex
from tokenizers import Tokenizer
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers
from tokenizers.models import BPE
from transformers import Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers import Qwen2_5_VLProcessor
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

import data

# --- the world ------------------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
MISTAKEN = {"green": "blue", "triangle": "circle"}         # what the warm-up teacher takes them for
CELL = 28                                                  # pixels: one merged image token (patch 14, merge 2)
DESCRIBE = "Describe the image."                           # the question whose answer is the description alone


@dataclass(frozen=True)
class Question:
    kind: str                                              # "count", "subtract" or "add"
    colour: str                                            # "" = any
    shape: str                                             # "" = any
    extra: int                                             # objects that "add" adds

    @property
    def label(self) -> str:
        return " ".join(word for word in (self.colour, f"{self.shape or 'object'}s") if word)

    @property
    def text(self) -> str:
        return {"count": f"How many {self.label} are there?",
                "subtract": f"Subtract all {self.label}. How many objects are left?",
                "add": f"Add {self.extra} {self.label}. How many objects are there?"}[self.kind]

    def about(self, objects: tuple) -> tuple:
        """The objects that the label names."""
        return tuple((c, s) for c, s in objects if self.colour in ("", c) and self.shape in ("", s))

    def answer(self, total: int, named: int) -> int:
        return {"count": named, "subtract": total - named, "add": total + self.extra}[self.kind]


@dataclass(frozen=True)
class Item:
    objects: tuple[tuple[str, str], ...]                   # (colour, shape) in reading order
    image: Image.Image                                     # 56 x 56
    question: Question
    answer: str
    response: str                                          # of the warm-up teacher: may be wrong

    @property
    def caption(self) -> str:
        return describe(self.objects)

    @property
    def key_words(self) -> list[str]:
        return sorted({f"{colour} {shape}" for colour, shape in self.objects})


def describe(objects: tuple) -> str:
    return ", ".join(f"{colour} {shape}" for colour, shape in objects) + "."


def draw(objects: tuple, rng: random.Random) -> Image.Image:
    """Objects fill the grid's cells in reading order, with jitter of place (2 px), size, colour, and pixel noise."""
    image = Image.new("RGB", (2 * CELL, 2 * CELL), (rng.randint(190, 235),) * 3)
    pen = ImageDraw.Draw(image)
    for cell, (colour, shape) in enumerate(objects):
        x, y = ((place + 0.5) * CELL + rng.uniform(-2, 2) for place in (cell % 2, cell // 2))
        r = rng.uniform(8.5, 11.5)
        fill = tuple(min(255, max(0, round(value + rng.uniform(-25, 25)))) for value in COLOURS[colour])
        if shape == "circle":
            pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
        elif shape == "square":
            pen.rectangle([x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r], fill=fill)
        else:
            pen.polygon([(x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)], fill=fill)
    noise = numpy.random.default_rng(rng.getrandbits(32)).normal(0, 10, (2 * CELL, 2 * CELL, 3))
    return Image.fromarray((numpy.asarray(image) + noise).clip(0, 255).astype(numpy.uint8))


def ask(objects: tuple, rng: random.Random) -> Question:
    """A question whose label is a colour, a shape or both, four times in five of an object that is there."""
    colour, shape = rng.choice(objects) if rng.random() < 0.8 else (rng.choice(list(COLOURS)), rng.choice(SHAPES))
    colour, shape = rng.choice([(colour, ""), ("", shape), (colour, shape)])
    return Question(rng.choice(["count", "subtract", "subtract", "add"]), colour, shape, rng.randint(1, 4))


def teach(objects: tuple, question: Question, slip_seeing: float, slip_counting: float, rng: random.Random) -> str:
    """The imperfect teacher's response: it describes what it believes to see, and counts that by enumeration."""
    seen = tuple(tuple(MISTAKEN[word] if word in MISTAKEN and rng.random() < slip_seeing else word for word in pair)
                 for pair in objects)
    named, total = question.about(seen), len(seen)
    if len(named) >= 2 and rng.random() < slip_counting:
        named = named[:-1]
    answer = question.answer(total, len(named))
    listed = ", ".join(f"{i} {colour} {shape}" for i, (colour, shape) in enumerate(named, 1)) or "0"
    plan, steps = {"count": (f"Count the {question.label}", [listed]),
                   "subtract": (f"Subtract the {question.label}", [listed, f"{total} - {len(named)} = {answer}"]),
                   "add": (f"Add {question.extra}", [f"{total} + {question.extra} = {answer}"])}[question.kind]
    sections = [f"### {data.DESCRIPTION}: {describe(seen)}", f"### {data.RATIONALES}: {plan}.", f"### {data.THINK}"]
    sections += [f"### {data.STEP} {i}: {step}." for i, step in enumerate(steps, 1)]
    return "\n".join([*sections, f"### {data.ANSWER}: {answer}"])


def make_items(count: int, seed: int, split: str, slip_seeing: float = 0.55, slip_counting: float = 0.3) -> list[Item]:
    """`count` items from the stream (seed, split); streams of different splits are independent."""
    rng = random.Random(f"{seed} {split}")
    items = []
    for _ in range(count):
        objects = tuple((rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(rng.randint(2, 4)))
        question = ask(objects, rng)
        answer = question.answer(len(objects), len(question.about(objects)))
        response = teach(objects, question, slip_seeing, slip_counting, rng)
        items.append(Item(objects, draw(objects, rng), question, str(answer), response))
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


def fixed_phrases() -> list[str]:
    """Texts that cost one token each: they never vary, so the tiny model need not spend capacity on spelling them."""
    headers = [data.DESCRIPTION, data.RATIONALES, *(f"{data.STEP} {i}" for i in range(1, 4)), data.ANSWER]
    numbers = [f" {digit}" for digit in range(10)]
    return ["user\n", "assistant\n", *numbers, data.INSTRUCTION.strip(), f"### {data.THINK}", *(f"### {name}:" for name in headers)]


def make_processor(texts: list[str], vocab_size: int = 512) -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor whose byte-level BPE is trained on `texts`; every byte stays writable."""
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"], merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=END_OF_TEXT, pad_token=END_OF_TEXT, eos_token=TURN_END,
        extra_special_tokens=[TURN_START, *VISION_TOKENS], padding_side="left", model_max_length=2048)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in fixed_phrases()])
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 802816}   # explicit: the class's default is shared and mutable
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels), video_processor=Qwen2VLVideoProcessor(),
        tokenizer=tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(processor: Qwen2_5_VLProcessor, seed: int = 0, hidden: int = 128, layers: int = 2, heads: int = 4,
               kv_heads: int = 2, intermediate: int = 256, vision_depth: int = 1, vision_hidden: int = 96,
               vision_heads: int = 4, vision_intermediate: int = 192, rope_theta: float = 20.0,
               mrope_section: tuple[int, int, int] = (2, 7, 7),
               initializer_range: float = 0.06) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL of the real architecture, its weights a function of `seed` alone.

    rope_theta is small because positions are: at 1e4 a step of one image cell would turn the rotary angles by 0.003 rad.
    """
    assert sum(mrope_section) == hidden // heads // 2, f"{mrope_section=} must add up to half of {hidden // heads=}"
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in [END_OF_TEXT, TURN_END, *VISION_TOKENS]}
    ends = dict(bos_token_id=ids[END_OF_TEXT], eos_token_id=ids[TURN_END], pad_token_id=ids[END_OF_TEXT])
    rope = dict(rope_type="default", rope_theta=rope_theta, mrope_section=list(mrope_section))
    text_config = dict(
        vocab_size=-(-len(processor.tokenizer) // 16) * 16, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=intermediate,
        max_position_embeddings=2048, rope_parameters=rope, initializer_range=initializer_range,
        rms_norm_eps=1e-6, use_sliding_window=False, max_window_layers=layers, **ends)
    vision_config = dict(
        depth=vision_depth, hidden_size=vision_hidden, num_heads=vision_heads, intermediate_size=vision_intermediate,
        out_hidden_size=hidden, fullatt_block_indexes=[vision_depth - 1], window_size=112,
        initializer_range=initializer_range)
    config = Qwen2_5_VLConfig(
        text_config=text_config, vision_config=vision_config, tie_word_embeddings=True,
        image_token_id=ids[IMAGE_PAD], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"], **ends)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids[TURN_END], ids[END_OF_TEXT]]
    model.generation_config.pad_token_id = ids[END_OF_TEXT]
    return model.eval()
