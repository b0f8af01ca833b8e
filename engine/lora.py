"""LoRA: train two thin matrices beside each frozen weight instead of the weight (arXiv 2106.09685).

    y = W x + (alpha / r) B A x        W (out, in) frozen; A (r, in), B (out, r) trained, in float32

`add_adapters(model, config)` puts A and B into the linear layers that --lora_targets names, as `lora_A` and `lora_B`.
B starts at zero, so the first step is the base model's, bit for bit. With adapters off the same weights are the
reference policy, and no second copy is needed. W and its adapters are one FSDP unit: gathered in bfloat16, gradients
summed in float32. The sampler keeps adapters on: weights merged in bfloat16 are rounded, and so another policy.
"""
import json
import math
import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from data import InputError, seed_of
from plumbing.run_folder import replaced_folder, write_text


class AdaptedLinear(nn.Linear):
    """A linear layer with adapters. Its class is exchanged, so its weight keeps its name, its file and its place."""

    adapters_on = True  # of all layers: only a forward of the reference policy turns them off

    def forward(self, x: Tensor) -> Tensor:
        """(.., in) -> (.., out), in the type of the weight's product."""
        y = super().forward(x)
        if not self.adapters_on:
            return y
        low = self.scale * F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (.., r)
        return y + F.linear(low, self.lora_B).to(y.dtype)  # Eq. LORA: y = W x + (alpha / r) B A x


def adapted(model) -> dict[str, AdaptedLinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def base_weights(model) -> list[tuple[str, nn.Parameter]]:
    """Names and weights of a model without its adapters: what a Hugging Face folder holds."""
    return [(name, weight) for name, weight in model.named_parameters() if not name.endswith(("lora_A", "lora_B"))]


def chosen(model, config) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by name. InputError: a target that no layer has."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kinds = {name: name.rpartition(".")[2] for name in linears if name.startswith("model.language_model.layers.")}
    known, asked = sorted(set(kinds.values())), config.lora_targets  # known: q_proj, .., gate_proj, ..
    targets = {"all-linear": known, "attention": ["q_proj", "k_proj", "v_proj", "o_proj"]}.get(asked, asked.split(","))
    if set(targets) - set(known):
        raise InputError(f"--lora_targets {asked}: give all-linear, attention, or some of {','.join(known)}")
    layers = {name: linears[name] for name, kind in kinds.items() if kind in targets}
    if config.lora_vision:
        layers |= {name: module for name, module in linears.items() if name.startswith("model.visual.blocks.")}
    if config.lora_rank > (most := min(min(module.weight.shape) for module in layers.values())):
        raise InputError(f"--lora_rank {config.lora_rank}: a layer has only {most} rows or columns: at most {most}")
    return layers


def add_adapters(model, config, dtype: torch.dtype) -> None:
    """Freeze a model and give its chosen layers empty adapters of this type, before it is sharded."""
    model.requires_grad_(False)
    for module in chosen(model, config).values():
        (rows, columns), make = module.weight.shape, dict(device=module.weight.device, dtype=dtype)
        module.__class__, module.scale = AdaptedLinear, config.lora_alpha / config.lora_rank
        module.lora_A = nn.Parameter(torch.empty(config.lora_rank, columns, **make))
        module.lora_B = nn.Parameter(torch.empty(rows, config.lora_rank, **make))


@torch.no_grad()
def start_adapters(model, seed: int) -> None:
    """A as PEFT draws it, uniform within 1 / sqrt(in), from the seed and the layer's name alone; B zero."""
    for name, module in adapted(model).items():
        A, generator = module.lora_A, torch.Generator().manual_seed(seed_of(seed, name))
        drawn = (torch.rand(A.shape, generator=generator) * 2 - 1).to(A.device, A.dtype) / math.sqrt(A.shape[1])
        A.copy_(distribute_tensor(drawn, A.device_mesh, A.placements) if isinstance(A, DTensor) else drawn)
        module.lora_B.zero_()


@torch.no_grad()
def share_frozen(policy, replica) -> None:
    """Give the sampler's copy, on the meta device, the frozen weights of a policy that one process holds whole."""
    for name, master in policy.named_parameters():
        if not master.requires_grad:
            module, _, part = name.rpartition(".")
            local = master.to_local() if isinstance(master, DTensor) else master
            setattr(replica.get_submodule(module), part, nn.Parameter(local.detach(), requires_grad=False))


def whole(weight: Tensor) -> Tensor:
    """A weight as one tensor; a collective where it is sharded."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def merged(model, name: str, dtype: torch.dtype) -> Tensor:
    """A whole weight in dtype with what its adapters add, W + (alpha / r) B A; a collective where it is sharded."""
    module, weight = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
    if not isinstance(module, AdaptedLinear) or not name.endswith("weight"):
        return whole(weight.to(dtype))  # before gathering: half the traffic
    low, high = whole(module.lora_A).float(), whole(module.lora_B).float()
    return (whole(weight).float() + module.scale * high @ low).to(dtype)


@torch.no_grad()
def save_adapter(folder: str, model, base: str, writer: bool) -> None:
    """Write A and B as PEFT's adapter_config.json and adapter_model.safetensors; a collective, one rank writes."""
    layers = adapted(model)
    tensors = {f"base_model.model.{name}.{part}.weight": whole(getattr(module, part)).cpu().contiguous()
               for name, module in layers.items() for part in ("lora_A", "lora_B")}
    if not writer or not layers:
        return
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    about = dict(peft_type="LORA", task_type="CAUSAL_LM", r=rank, lora_alpha=rank * first.scale,
                 target_modules=list(layers), base_model_name_or_path=base)
    with replaced_folder(folder) as writing:
        write_text(os.path.join(writing, "adapter_config.json"), json.dumps(about, indent=1))
        save_file(tensors, os.path.join(writing, "adapter_model.safetensors"), metadata={"format": "pt"})
