"""Living within a GPU's memory: as many slots as the plan has room for, and no weight held twice where one will do.

    config = fit_plan(config, folder, device)             as many slots as the plan has room for
    policy, ref_policy, replica = load_models(config, ..) the models of a stage
"""
import dataclasses
import os

import torch
import torch.distributed as dist

from data import InputError
from engine.plan import GB, USABLE, Shape, always_bytes, most_slots, rollout_bytes, shape_of, table
from engine.policy import Policy
from plumbing.processes import print0

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
    if config.stage != "sft" or config.eval_every:
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
        ref_policy = policy if lora else Policy.load(folder, device, dtype, mesh, dtype).eval()
    if config.stage != "sft" or config.eval_every:
        shared = policy if adapters and dist.get_world_size() == 1 else None
        replica = Policy.load(folder, device, dtype, lora=adapters, shared=shared).eval()
    return policy, ref_policy, replica


def make_optimizer(policy, config):
    """AdamW over what is trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, fused=True)
