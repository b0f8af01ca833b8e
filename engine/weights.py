"""Weights in and out: Hugging Face files into shards, shards to the sampler, exporting, saving and resuming.

    read_weights(policy, folder)        each rank reads its own rows of the safetensors files
    sync(policy, replica)               sharded fp32 master weights -> the sampler's whole copy on each rank, in place
    export(folder, policy, processor)   a Hugging Face folder that from_pretrained, vLLM and eval.py load as it is
    save_checkpoint, load_checkpoint    all that resuming needs; random numbers, functions of the step, need nothing

`sync`, `export`, `save_checkpoint` and `load_checkpoint` are collectives: every rank calls them.
"""
import contextlib
import json
import os
import shutil

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import Qwen2_5_VLConfig

from data import InputError
from plumbing.processes import here, is_writer, meet, of_writer
from plumbing.run_folder import checkpoints, replaced_folder


# --------------------------------------------------------------------------- weights in and out


def hub_name(name: str) -> str:
    """transformers' name of a parameter -> its name in the files of the hub (and in what vLLM loads)."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def indexed_files(path: str) -> list[str]:
    """The weight files that a model.safetensors.index.json names."""
    try:
        with open(path) as f:
            return sorted(set(json.load(f)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no safetensors index (weight_map): download it again") from error


@torch.no_grad()
def read_weights(policy, folder: str):
    """Fill an empty policy from safetensors files; a shard's rows are sliced out of the memory-mapped file."""
    index, single = (os.path.join(folder, f"model.safetensors{end}") for end in (".index.json", ""))
    with contextlib.ExitStack() as stack:
        if os.path.exists(index):
            names = indexed_files(index)
        elif os.path.exists(single):
            names = [os.path.basename(single)]
        else:
            raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json: "
                             "convert the weights to safetensors")
        where = {}  # parameter name -> open file
        for name in names:
            if not os.path.exists(os.path.join(folder, name)):
                raise InputError(f"{folder} lacks {name}, which its index names: download it again")
            try:
                file = stack.enter_context(safe_open(os.path.join(folder, name), "pt"))
            except SafetensorError as error:
                raise InputError(f"{folder}: {name} is torn or no safetensors file: download it again") from error
            where.update(dict.fromkeys(file.keys(), file))
        for name, parameter in policy.named_parameters():  # a tied head appears once, as the embeddings
            key = hub_name(name) if hub_name(name) in where else name
            if key not in where:
                raise InputError(f"{folder} has no weight {hub_name(name)}: is it a complete Qwen2.5-VL?")
            rows = where[key].get_slice(key)
            if tuple(rows.get_shape()) != tuple(parameter.shape):
                raise InputError(f"{folder}: {key} is {tuple(rows.get_shape())}, "
                                 f"config.json says {tuple(parameter.shape)}")
            if isinstance(parameter, DTensor):
                shape, offset = compute_local_shape_and_global_offset(
                    parameter.shape, parameter.device_mesh, parameter.placements)
                if shape[0] > 0:  # with few rows and many ranks some have none
                    parameter.to_local().copy_(rows[offset[0] : offset[0] + shape[0]])
            else:
                parameter.copy_(rows[:])
    for module in policy.modules():  # rope tables are computed, not stored, so the meta device has lost them
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq.copy_(fresh.inv_freq)
            module.original_inv_freq.copy_(fresh.inv_freq)


@torch.no_grad()
def sync(policy, replica):
    """Copy the sharded master weights into the whole replica of each rank, in place."""
    policy.reshard()  # after a forward without backward the root's weights are still gathered
    for master, copy in zip(policy.parameters(), replica.parameters(), strict=True):
        master = master.detach().to(copy.dtype)  # before gathering: half the traffic
        copy.copy_(master.full_tensor() if isinstance(master, DTensor) else master)


@torch.no_grad()
def export(path: str, policy, processor, dtype=torch.bfloat16, file_bytes=4 << 30):
    """Write a Hugging Face folder in the hub's naming: weights, config, processor with pixel limits, generation config.

    Rank 0 holds one file's worth in host memory at a time; what is being gathered lies on the device.
    """
    here(f"export to {path}")
    policy.reshard()
    writer = is_writer()
    with replaced_folder(path) if writer else contextlib.nullcontext() as folder:
        parts, part, size, total = [], {}, 0, 0  # parts: names in each file; part: the file being filled

        def flush():
            save_file(part, os.path.join(folder, f"part-{len(parts)}"), metadata={"format": "pt"})
            parts.append(list(part))
            part.clear()

        for name, parameter in policy.named_parameters():
            nbytes = parameter.numel() * dtype.itemsize
            if part and size + nbytes > file_bytes:  # before the next is gathered: an embedding is half a gigabyte
                flush()
                size = 0
            tensor = parameter.detach().to(dtype)
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective: all ranks call it
            if writer:
                part[hub_name(name)] = tensor.cpu().contiguous()
                size, total = size + nbytes, total + nbytes
        if writer:
            flush()
            finish_export(folder, policy, processor, dtype, parts, total)
    meet()


def finish_export(folder, policy, processor, dtype, parts, total):
    """Give the weight files their final names and put everything else of a Hugging Face folder beside them."""
    file_names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        file_names = ["model.safetensors"]
    for i, file_name in enumerate(file_names):
        os.rename(os.path.join(folder, f"part-{i}"), os.path.join(folder, file_name))
    if len(parts) > 1:
        weight_map = {name: file_name for names, file_name in zip(parts, file_names) for name in names}
        with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=1)
    config = Qwen2_5_VLConfig.from_pretrained(policy.folder)
    config.architectures, config.dtype = ["Qwen2_5_VLForConditionalGeneration"], dtype
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    generation = os.path.join(policy.folder, "generation_config.json")
    if os.path.exists(generation):
        shutil.copy(generation, folder)  # as it is: transformers refuses to save some files that it loads


# ------------------------------------------------------------------------------------------- resume


def save_checkpoint(folder: str, step: int, policy, optimizer):
    """Write folder/step-NNNNNN, the run's state after `step` steps; the last two are kept, a torn one never counts."""
    here(f"checkpoint after step {step}")
    path = os.path.join(folder, f"step-{step:06d}")
    if is_writer():
        shutil.rmtree(path + ".writing", ignore_errors=True)
        os.makedirs(path + ".writing")
    meet()
    weights, state = get_state_dict(policy, optimizer)
    dcp.save({"weights": weights, "optimizer": state}, checkpoint_id=path + ".writing")
    if is_writer():
        os.rename(path + ".writing", path)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(os.path.join(folder, old))
    meet()


def load_checkpoint(folder: str, policy, optimizer):
    """Load the newest complete checkpoint, if there is one, on any number of ranks."""
    names = of_writer(checkpoints(folder))
    if not names:
        return
    weights, state = get_state_dict(policy, optimizer)  # also makes the optimiser's empty state, sharded as this run is
    saved = {"weights": weights, "optimizer": state}
    path = os.path.join(folder, names[-1])
    try:
        dcp.load(saved, checkpoint_id=path)
    except dcp.api.CheckpointException as error:
        raise InputError(f"checkpoint {path} cannot be read: delete it to resume from the one before") from error
    set_state_dict(policy, optimizer, model_state_dict=saved["weights"], optim_state_dict=saved["optimizer"])


# ------------------------------------------------------------------------------------------ restart
