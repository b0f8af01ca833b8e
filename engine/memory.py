"""Living within a GPU's memory: slots by the plan, the largest step before the first, a retry when it runs out.

    config = fit_plan(config, folder, device)             as many slots as the plan has room for
    optimizer = make_optimizer(policy, config)            AdamW, its moments in float32 or bfloat16
    rehearse(run, optimizer, update)                      the worst that can come, run before any data is spent
    within_memory(run, lambda: update(..))                once more with rows of half the size

`run` is train.Run: what a stage works with.
"""
import dataclasses
import math
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from data import InputError, Prompt, mrope_positions
from engine.adamw import AdamW
from engine.plan import GB, USABLE, Shape, always_bytes, largest_image, most_slots, shape_of, table, worst_row
from engine.policy import Group, forget_step
from engine.sampler import BURST, enough_for, generate
from plumbing.log import peak_memory
from plumbing.processes import here, print0
from plumbing.run_folder import write_text


REHEARSED = ("cuda",)  # devices whose memory ends in an exception; a CPU's does not
CPU_SLOTS = 128  # where no plan is needed
NOTE = "token_budget."  # files in a stage's folder, one per rank that ran out: the token budget to go on with


def choose_slots(config, shape: Shape, device: torch.device, planned: float) -> int:
    """The slots of this run: as asked for, or as many as fit beside `planned` bytes for all other purposes."""
    if config.slots:
        return config.slots
    if device.type != "cuda":
        return max(CPU_SLOTS, config.group_size)
    room = torch.cuda.get_device_properties(device).total_memory
    slots = most_slots(config, shape, USABLE * room - planned)
    if slots == 0:
        raise InputError(f"this GPU's {room / GB:.0f} GB have no room for the cache of one group beside "
                         f"{planned / GB:.1f} GB: see --plan, or lower --max_response")
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


def make_optimizer(policy, config):
    """AdamW over what is trained, its moments in float32 or bfloat16."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if config.adam_dtype == "bfloat16":
        return AdamW(trained, config.lr, weight_decay=config.weight_decay)
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
    return Prompt(None, ids, mrope_positions(ids, grid, image_token, merge),
                  torch.zeros(int(grid.prod(-1).sum()), patch_dim), grid)


def worst_groups(config, model_config) -> list[Group]:
    """`worst_row` as groups whose tokens mean nothing."""
    row = worst_row(config)
    G = config.group_size if config.stage != "sft" else 1
    prompt = blank_prompt(1, row.patches // 4, row.prompt, model_config)
    N = row.prompts * G
    lengths = [max(1, row.response // N + (i < row.response % N)) for i in range(N)]
    return [(prompt, [[0] * n for n in lengths[q * G : (q + 1) * G]]) for q in range(row.prompts)]


def worst_prompts(config, model_config) -> list[Prompt]:
    """Prompts that fill every slot's cache but for one burst, as full of images as can be."""
    length = config.max_prompt + config.max_response - BURST
    image = largest_image(config)
    prompt = blank_prompt(length // (image + 1), image, length, model_config)
    return [prompt] * max(1, config.slots // config.group_size)


def rehearse(run, optimizer, update: Callable):
    """Run the fullest rollout and the largest micro-batch that can come, before any data is spent; report the peaks.

    Weights and Adam's moments stay as they are: all losses are 0, the learning rate is 0, the moments are made anew.
    """
    here("rehearsal")
    config, peaks = run.config, {}
    if run.replica is not None:
        prompts = worst_prompts(config, run.policy.config)
        with enough_for(config.slots):
            generate(run.replica, prompts, list(range(len(prompts))), config.group_size, BURST + 1, config.temperature,
                     config.top_p, config.slots, len(run.processor.tokenizer), config.cuda_graphs)
        peaks["rollout"] = peak_memory(forget=True)
    groups = worst_groups(config, run.policy.config)

    def nothing(index, weights):
        return lambda logprobs, rows: (0 * logprobs.sum(), {})

    within_memory(run, lambda: update(run.policy, optimizer, groups, nothing, 0.0, 1.0, run.config, run.device))
    optimizer.state.clear()
    peaks["training"] = peak_memory(forget=True)
    print0("rehearsed the largest step: " + ", ".join(f"{name} peak {size:.2f} GB" for name, size in peaks.items()))


# ------------------------------------------------------------------------------ when it is not enough


def within_memory(run, attempt: Callable):
    """attempt(); when memory runs out, once more with rows of half the size, on which the loss does not depend.

    Of several processes the others then wait in a collective that this one has left. So it writes the smaller budget
    down and ends; `torchrun --max_restarts 1` starts all again, from the last checkpoint and with that budget.
    """
    try:
        return attempt()
    except torch.OutOfMemoryError:
        asked = run.config.token_budget  # the retry is outside this block, where the traceback's tensors are gone
    if run.halved:
        raise InputError(f"out of memory again with --token_budget {asked}: see --plan for what to change")
    run.config, run.halved = dataclasses.replace(run.config, token_budget=asked // 2), True
    said = f"out of memory with --token_budget {asked}: "
    if dist.get_world_size() > 1:
        write_text(os.path.join(run.folder, f"{NOTE}{dist.get_rank()}"), str(asked // 2))
        raise InputError(f"rank {dist.get_rank()}: {said}run the command again without --restart (or give torchrun "
                         f"--max_restarts 1); it goes on from the last checkpoint with {asked // 2}")
    print0(f"{said}going on with {asked // 2}")
    run.policy.zero_grad()
    for policy in (run.policy, run.ref_policy):
        if policy is not None:
            forget_step(policy)
    torch.cuda.empty_cache()
    return within_memory(run, attempt)


def notes(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in os.listdir(folder) if name.startswith(NOTE)]


def read_notes(run):
    """Take the token budget that an earlier attempt has written down when memory ran out."""
    budgets = [int(open(path).read()) for path in notes(run.folder)]
    if budgets and min(budgets) < run.config.token_budget:
        run.config, run.halved = dataclasses.replace(run.config, token_budget=min(budgets)), True
        print0(f"memory ran out before: --token_budget {run.config.token_budget}")


def drop_notes(folder: str):
    for path in notes(folder):
        os.remove(path)
