"""The worst that the memory plan counts on, made of blank prompts: the fullest row, the fullest rollout."""
import math

import torch

from data import Prompt, mrope_positions
from engine.plan import largest_image, worst_row
from engine.sampler import BURST, PREFILL, Decoder, Slots, capture


def blank_prompt(images: int, image_tokens: int, length: int, model_config) -> Prompt:
    """A prompt of `length` tokens with some grey images of up to image_tokens tokens each."""
    vision, image_token = model_config.vision_config, model_config.image_token_id
    merge = vision.spatial_merge_size
    rows = math.isqrt(image_tokens)
    columns = image_tokens // rows
    grid = torch.tensor([[1, rows * merge, columns * merge]] * images)  # patches along time, height, width
    ids = ([image_token] * (rows * columns) + [0]) * images
    ids += [0] * (length - len(ids))
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(images * rows * columns * merge**2, patch_dim)
    return Prompt(None, ids, mrope_positions(ids, grid, image_token, merge), pixels, grid)


def worst_groups(config, model_config) -> list:
    """`worst_row` as groups whose tokens mean nothing."""
    vision, G = model_config.vision_config, 1 if config.stage == "sft" else config.group_size
    row = worst_row(config, vision)
    prompt = blank_prompt(1, row.patches // vision.spatial_merge_size**2, row.prompt, model_config)
    share, rest = divmod(row.response, row.prompts * G)
    responses = [[0] * max(1, share + (i < rest)) for i in range(row.prompts * G)]
    return [(prompt, responses[i : i + G]) for i in range(0, len(responses), G)]


def worst_prompts(config, model_config) -> list[Prompt]:
    """The prompts of the longest row that `generate` reads, as full of images as can be."""
    length, image = config.max_prompt, largest_image(config, model_config.vision_config)
    size = max(1, length // -(-length // (image + 1)) - 1)  # tokens of each image: all alike, and together the prompt
    prompt = blank_prompt(max(1, length // (size + 1)), size, length, model_config)
    return [prompt] * max(1, min(config.slots // config.group_size, PREFILL // length + 1))


@torch.no_grad()
def worst_rollout(config, replica, vocab_size: int):
    """What `generate` does at its worst: the longest cache of all slots, the longest row of prompts, a burst."""
    G, prompts = config.group_size, worst_prompts(config, replica.config)
    state = Slots(replica, config.slots, config.max_prompt + config.max_response + BURST, config.max_response)
    decoder = Decoder(replica, state, config.temperature, config.top_p, vocab_size)
    burst = capture(decoder) if config.cuda_graphs else decoder.burst
    slots = torch.arange(len(prompts) * G).view(-1, G).tolist()
    decoder.prefill(prompts, slots, torch.rand(len(prompts) * G, config.max_response))
    burst()
