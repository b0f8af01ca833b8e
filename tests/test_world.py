"""The drawn world, its tokenizer and model, and its CLIP: what the demo trains on is what it says it is."""
import json
import os
import random

import numpy
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
import rewards
import demo
from data import parse
from engine.weights import load_processor
from plumbing import filters


HEADERS = [f"### {data.DESCRIPTION}:", f"### {data.RATIONALES}:", f"### {data.THINK}", f"### {data.STEP} 1:",
           f"### {data.ANSWER}:"]
SIZES = dict(captions=24, warmup=24, questions=8, evaluation=8)


@pytest.fixture(scope="module")
def items():
    return demo.make_items(300, 0, "warmup")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("demo"))
    demo.make_world(folder, 0, demo.World(sizes=SIZES))
    return folder


def recount(item: demo.Item) -> int:
    """The answer from the question's own words, by counting the objects one by one."""
    words = item.question.text.replace(".", "").replace("?", "").split()
    named = 0
    for colour, shape in item.objects:
        fits_colour = not set(words) & set(demo.COLOURS) or colour in words
        fits_shape = not set(words) & {f"{name}s" for name in demo.SHAPES} or f"{shape}s" in words
        named += fits_colour and fits_shape
    if words[0] == "Add":
        return len(item.objects) + int(words[1])
    return len(item.objects) - named if words[0] == "Subtract" else named


def test_the_same_seed_gives_the_same_items_and_another_seed_others(items):
    again = demo.make_items(300, 0, "warmup")
    assert [item.response for item in again] == [item.response for item in items]
    assert all(numpy.array_equal(a.image, b.image) for a, b in zip(again, items))
    assert [item.response for item in demo.make_items(300, 1, "warmup")] != [item.response for item in items]


def test_a_longer_split_starts_with_the_shorter_one_and_splits_share_no_image(items):
    longer = demo.make_items(310, 0, "warmup")
    assert all(numpy.array_equal(a.image, b.image) for a, b in zip(longer, items))
    pixels = {item.image.tobytes() for item in items}
    assert not pixels & {item.image.tobytes() for item in demo.make_items(300, 0, "evaluation")}


def test_answers_equal_a_recount_of_the_objects(items):
    assert [item.answer for item in items] == [str(recount(item)) for item in items]
    assert {item.question.kind for item in items} == {"count", "subtract", "add"}


def test_key_words_and_caption_are_the_true_names(items):
    for item in items:
        names = [f"{colour} {shape}" for colour, shape in item.objects]
        assert item.key_words == sorted(set(names))
        assert [item.caption.count(name) for name in names] == [names.count(name) for name in names]


def test_every_warm_up_response_has_the_format(items):
    for item in items:
        sections = parse(item.response)
        assert rewards.format_reward(sections) == 1.0
        assert sections.description and sections.rationales and sections.answer.isdigit()


def test_a_teacher_without_slips_is_always_right():
    for item in demo.make_items(200, 0, "clean", slip_seeing=0.0, slip_counting=0.0):
        sections = parse(item.response)
        assert (sections.description, sections.answer) == (item.caption, item.answer)


def test_a_teacher_that_always_slips_never_sees_green_or_a_triangle():
    for item in demo.make_items(200, 0, "slips", slip_seeing=1.0, slip_counting=0.0):
        description = parse(item.response).description
        assert "green" not in description and "triangle" not in description


def test_the_teacher_is_often_wrong_about_what_it_sees_and_seldom_otherwise(items):
    # 1/4 green and 1/3 triangles, each slipping at 0.55: an object is right at (1 - .1375)(1 - .1833) = .704, so
    # captions of 2, 3 or 4 objects are right at (.496 + .349 + .246) / 3 = .364
    seen = numpy.mean([parse(item.response).description == item.caption for item in items])
    assert abs(seen - 0.364) < 3 * (0.364 * 0.636 / len(items)) ** 0.5
    right = numpy.mean([parse(item.response).answer == item.answer for item in items])
    assert 0.6 < right < 0.9


def test_responses_survive_the_tokenizer_and_headers_cost_one_token(made, items):
    tokenizer = AutoProcessor.from_pretrained(f"{made}/untrained").tokenizer
    for item in items[:50]:
        ids = tokenizer(item.response).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == item.response
    assert [len(tokenizer(header).input_ids) for header in HEADERS] == [1] * len(HEADERS)
    assert tokenizer.decode(tokenizer("Zoë: 12 ÷ 3").input_ids) == "Zoë: 12 ÷ 3"      # any byte can be written


def test_saved_processor_and_model_reload_with_equal_ids_and_logits(tmp_path, items):
    made = demo.make_processor([item.response for item in items])
    model = demo.make_model(made, seed=3)
    made.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    read, again = AutoProcessor.from_pretrained(tmp_path), AutoModelForImageTextToText.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": items[0].question.text}]}]
    inputs = [processor(text=[processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)],
                        images=[items[0].image], return_tensors="pt") for processor in (made, read)]
    assert inputs[0]["input_ids"].tolist() == inputs[1]["input_ids"].tolist()
    assert inputs[0]["input_ids"].tolist()[0].count(made.image_token_id) == 4     # 56 x 56 pixels, 28 x 28 a token
    with torch.no_grad():
        assert torch.equal(model(**inputs[0]).logits, again(**inputs[1]).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_the_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(items):
    processor = demo.make_processor([item.response for item in items])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (demo.make_model(processor, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_the_files_load_as_samples_and_their_images_exist(made):
    processor = load_processor(f"{made}/untrained", 56 * 56, 56 * 56)
    for name, count, solved in (("base", 48, 48), ("warmup", 24, 24), ("questions", 8, 0), ("evaluation", 8, 0)):
        samples = data.load_samples(f"{made}/world/{name}.jsonl")
        assert len(samples) == count
        filters.check_images(samples)
        assert sum(filters.sft_verdict(sample, processor, 96) == "kept" for sample in samples) == solved
        prompt = data.encode_prompt(samples[0], processor)
        assert prompt.grid_thw.tolist() == [[1, 4, 4]] and len(prompt.input_ids) < 64


def test_reasoning_ends_in_the_answer(items):
    for item in items:
        assert item.reasoning.rstrip(".").split()[-1] == item.answer


def test_evaluation_rows_hold_the_items_of_their_stream(made):
    with open(f"{made}/world/evaluation.jsonl") as file:
        rows = [json.loads(line) for line in file]
    for row, item in zip(rows, demo.make_items(8, 0, "evaluation")):
        assert (row["problem"], row["answer"], row["caption"]) == (item.question.text, item.answer, item.caption)
        assert row["key_words"] == item.key_words
        with Image.open(os.path.join(made, "world", row["images"][0])) as image:
            assert numpy.array_equal(image, item.image)


def preferred(model, items: list) -> float:
    """P(the right caption is closer to the image than one with a word wrong)."""
    rng, tokenize = random.Random(0), open_clip.SimpleTokenizer(context_length=model.context_length)
    pixels = torch.stack([torch.from_numpy(numpy.array(item.image)) for item in items]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)                                      # (items, D)
        right, wrong = (model.encode_text(tokenize(texts), normalize=True) for texts in (
            [item.caption for item in items], [demo.misdescribe(item.objects, rng) for item in items]))
    return ((images * right).sum(-1) > (images * wrong).sum(-1)).float().mean().item()


def test_a_misdescription_differs_from_the_caption_in_one_word(items):
    rng = random.Random(0)
    for item in items:
        pairs = list(zip(item.caption.rstrip(".").replace(",", "").split(),
                         demo.misdescribe(item.objects, rng).rstrip(".").replace(",", "").split(), strict=True))
        assert sum(a != b for a, b in pairs) == 1


def test_clip_training_prefers_right_captions_and_its_folder_reloads_with_equal_features(tmp_path, items):
    world, held_out = demo.World(), demo.make_items(200, 0, "evaluation")
    model, untrained = demo.train_clip(items, 0, 60, world, batch=48), demo.train_clip(items, 0, 1, world, batch=2)
    assert preferred(model, held_out) > max(0.6, preferred(untrained, held_out))
    demo.save_clip(model, str(tmp_path), world)
    again, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    image, own = preprocess(items[0].image)[None], torch.from_numpy(numpy.array(items[0].image)).permute(2, 0, 1)
    assert torch.allclose(image[0], own / 127.5 - 1, atol=1e-6)                   # what training saw
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path}")([items[0].caption])
    with torch.no_grad():
        assert torch.equal(again.eval().encode_image(image), model.encode_image(image))
        assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
