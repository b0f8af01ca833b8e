"""Living within a GPU's memory: as many slots as the plan has room for, and the largest step before the first.

    config = fit_plan(config, folder, device)             as many slots as the plan has room for
    policy, ref_policy, replica = load_models(config, ..) the models of a stage, no weight held twice where one will do
    rehearse(config, policy, ref_policy, replica, ..)     the worst that can come, run before any data is spent
"""
import dataclasses
import math
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from data import InputError, Prompt, mrope_positions
from engine.plan import (GB, USABLE, Shape, always_bytes, largest_image, most_slots, rollout_bytes, shape_of, table,
                         worst_row)
from engine.policy import Group, Policy, pack
from engine.sampler import BURST, PREFILL, Decoder, Slots, capture, uniform_numbers
from plumbing.log import peak_memory
from plumbing.processes import Timer, print0

REHEARSED = ("cuda",)  # devices that raise OutOfMemoryError; a CPU does not
CPU_SLOTS = 128  # where no plan is needed


def choose_slots(config, shape: Shape, device: torch.device, planned: float) -> int:
    """The slots of this run: as asked for, or as many as fit beside `planned` bytes. InputError: too many, or no group.

    On a CPU the cache alone is held against the whole machine's memory, since what else runs there is not ours to plan.
    """
    gpu = device.type == "cuda"
    room = (torch.cuda.get_device_properties(device).total_memory if gpu
            else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    planned = planned if gpu else 0.0
    slots = config.slots or most_slots(config, shape, USABLE * room - planned) or config.group_size
    if not gpu and not config.slots:
        slots = min(slots, max(CPU_SLOTS, config.group_size))
    needed = sum(rollout_bytes(config, shape, slots).values())
    if needed > room - planned:
        raise InputError(f"{slots} responses at a time need {needed / GB:.3g} GB beside {planned / GB:.3g} GB, of "
                         f"{room / GB:.3g} GB: lower --slots, --group_size or --max_response, see --plan")
    return slots


def fit_plan(config, folder: str, device):
    """Choose the slots that the memory plan has room for, and on a GPU say what it expects."""
    shape, gpus = shape_of(folder), dist.get_world_size()
    if config.stage != "sft":
        planned = sum(always_bytes(config, shape, gpus).values())
        config = dataclasses.replace(config, slots=choose_slots(config, shape, device, planned))
    if device.type == "cuda":
        print0(table(config, shape, gpus, torch.cuda.get_device_properties(device).total_memory))
    return config


def load_models(config, folder: str, device, mesh):
    """The policy, the reference policy and the sampler's copy; None what a stage has no use for.

    With LoRA the frozen weights are there once: the reference is the policy with its adapters off, and one process
    that holds them whole also samples from them.
    """
    dtype, lora, policy, ref_policy, replica = getattr(torch, config.dtype), config.lora_rank > 0, None, None, None
    adapters = config if lora and config.stage != "sample" else None
    if config.stage != "sample":
        policy = Policy.load(folder, device, dtype if lora else torch.float32, mesh, dtype, lora=adapters)
        policy.prepare_training(config.freeze_vision, config.gradient_checkpointing)
    if config.stage in ("1", "2") and config.kl_coef > 0:
        ref_policy = policy if lora else Policy.load(folder, device, dtype, mesh, dtype, config.ref_offload).eval()
    if config.stage != "sft" or config.eval_every:
        shared = policy if adapters and dist.get_world_size() == 1 else None
        replica = Policy.load(folder, device, dtype, lora=adapters, shared=shared).eval()
    return policy, ref_policy, replica


def make_optimizer(policy, config):
    """AdamW over what is trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, fused=True)


# --------------------------------------------------------------------------------- the largest step


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


def worst_groups(config, model_config) -> list[Group]:
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
    decoder.prefill(prompts, slots, uniform_numbers(0, len(prompts) * G, config.max_response))
    burst()


def rehearse(config, policy, ref_policy, replica, optimizer, vocab_size: int, train_on: Callable):
    """Run the fullest rollout, and log-probs and update of the largest micro-batch that can come; report the peaks.

    A run that is too large for its GPU so ends in its first minute, before any data is spent. train_on(groups) takes an
    optimiser step whose learning rate is 0: weights stay as they are, and Adam's moments are then forgotten.
    """
    timer, peaks, groups = Timer("the rehearsal"), {}, worst_groups(config, policy.config)
    if config.stage != "sft":
        with timer("rollout"):
            worst_rollout(config, replica, vocab_size)
        peaks["rollout"] = peak_memory(forget=True)
        with timer("logprobs"), torch.no_grad():  # as in train.rl_step
            policy(pack(groups, policy.device), config.temperature)
            if ref_policy is not None:
                with ref_policy.adapters_off():
                    ref_policy(pack(groups, policy.device), config.temperature)
        peaks["log-probs"] = peak_memory(forget=True)
    with timer("update"):
        train_on(groups)
    optimizer.state.clear()
    peaks["training"] = peak_memory(forget=True)
    print0("rehearsed the largest step: " + ", ".join(f"{name} peak {peak:.2f} GB" for name, peak in peaks.items()))
