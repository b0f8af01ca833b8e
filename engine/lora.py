"""LoRA: train two thin matrices beside each frozen weight instead of the weight (arXiv 2106.09685).

    y = W x + (alpha / r) B A x        W (out, in) frozen; A (r, in), B (out, r) trained, in float32

`add_adapters(policy, lora)` puts A and B into every linear layer that is named, as its children `lora_A` and `lora_B`.
B starts at zero, so the first step is the base model's, bit for bit. With adapters off the same weights are the
reference policy, and no second copy is needed. W and its adapters are one FSDP unit: gathered in bfloat16, gradients
summed in float32. `export` writes the merged weights, and `save_adapter` A and B alone, as PEFT loads them.
"""
import contextlib
import difflib
import json
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from data import InputError, seed_of

TARGETS = {"all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
           "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}
VISION = ("qkv", "proj", *TARGETS["all-linear"])  # of the vision tower's blocks


class Lora(NamedTuple):
    """Which layers get adapters, and how large."""
    rank: int  # r
    alpha: float
    targets: str = "all-linear"  # or attention, or names with commas between
    vision: bool = False  # the blocks of the vision tower as well


class AdaptedLinear(nn.Linear):
    """A linear layer with adapters. Its class is exchanged, so its weight keeps its name, its file and its place."""

    def forward(self, x: Tensor) -> Tensor:
        """(.., in) -> (.., out), in the type of the weight's product."""
        y = super().forward(x)
        if not self.adapters_on:
            return y
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (.., r)
        return y + (self.scale * F.linear(low, self.lora_B)).to(y.dtype)  # Eq. LORA: y = W x + (alpha / r) B A x

    def delta(self) -> Tensor:
        """What the adapters add to the weight, (out, in) in float32; a collective where they are sharded."""
        A, B = (x.full_tensor() if isinstance(x, DTensor) else x for x in (self.lora_A.detach(), self.lora_B.detach()))
        return self.scale * B.float() @ A.float()


def adapted(model) -> dict[str, AdaptedLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def is_adapter(name: str) -> bool:
    """Whether this is the name of an adapter's parameter."""
    return name.endswith(("lora_A", "lora_B"))


def chosen(model, lora: Lora) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by name. InputError: the targets match nothing, or the rank does not fit."""
    names = TARGETS.get(lora.targets) or tuple(name.strip() for name in lora.targets.split(","))
    places = {"model.language_model.layers.": names} | ({"model.visual.blocks.": VISION} if lora.vision else {})
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: module for name, module in linears.items() for place, ends in places.items()
             if name.startswith(place) and name.rpartition(".")[2] in ends}
    known = {name.rpartition(".")[2] for name in linears if name.startswith("model.language_model.layers.")}
    for name in set(names) - known:
        near = difflib.get_close_matches(name, known, 1) or sorted(known)
        raise InputError(f"--lora_targets {lora.targets}: no decoder layer has {name}; did you mean {', '.join(near)}?")
    smallest = min(min(module.weight.shape) for module in found.values())
    if not 1 <= lora.rank <= smallest:
        raise InputError(f"--lora_rank {lora.rank}: the smallest layer it is for has {smallest} rows or columns: give "
                         f"1 to {smallest}")
    return found


def add_adapters(model, lora: Lora, dtype=torch.float32) -> None:
    """Freeze a model and give its chosen layers adapters; on the meta device, before the model is sharded.

    dtype: float32 where they are trained, that of computing in the sampler's copy.
    """
    model.requires_grad_(False)
    for module in chosen(model, lora).values():
        make, (rows, columns) = dict(device=module.weight.device, dtype=dtype), module.weight.shape
        module.__class__, module.adapters_on, module.scale = AdaptedLinear, True, lora.alpha / lora.rank
        module.lora_A = nn.Parameter(torch.empty(lora.rank, columns, **make))
        module.lora_B = nn.Parameter(torch.empty(rows, lora.rank, **make))


@torch.no_grad()
def start_adapters(model, seed: int) -> None:
    """A as PEFT draws it, uniform within 1 / sqrt(in), from the seed and the layer's name alone; B zero."""
    for name, module in adapted(model).items():
        A = module.lora_A
        bound = 1 / math.sqrt(A.shape[1])
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        drawn = torch.empty(A.shape).uniform_(-bound, bound, generator=generator).to(A.device, A.dtype)
        A.copy_(distribute_tensor(drawn, A.device_mesh, A.placements) if isinstance(A, DTensor) else drawn)
        module.lora_B.zero_()


@contextlib.contextmanager
def adapters_off(model):
    """The base model, which is the reference policy. A model without adapters stays as it is."""
    layers = adapted(model).values()
    for module in layers:
        module.adapters_on = False
    yield
    for module in layers:
        module.adapters_on = True


@torch.no_grad()
def save_adapter(folder: str, model, lora: Lora, base: str, writer: bool) -> None:
    """Write A and B as PEFT's adapter_config.json and adapter_model.safetensors; a collective, one rank writes."""
    tensors = {}
    for name, module in adapted(model).items():
        for part in ("lora_A", "lora_B"):
            tensor = getattr(module, part).detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            tensors[f"base_model.model.{name}.{part}.weight"] = tensor.cpu().contiguous()
    if not writer:
        return
    os.makedirs(folder, exist_ok=True)
    # PEFT takes names of layers or one regular expression; only the latter tells the decoder from the vision tower.
    names = "|".join(name.replace(".", r"\.") for name in adapted(model))
    about = dict(peft_type="LORA", task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0,
                 bias="none", target_modules=f"({names})", base_model_name_or_path=base)
    with open(os.path.join(folder, "adapter_config.json"), "w") as file:
        json.dump(about, file, indent=1)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
