"""Files of models, in and out: Hugging Face folders into shards, exports, and checkpoints to resume from.

    folder = find_model(name)           a folder as it is, or the hub's copy of a name
    load_processor(folder, ..)          its tokenizer, image processor and chat template
    read_weights(policy, folder)        each rank reads its own rows of the safetensors files
    export(folder, policy, processor)   a Hugging Face folder that from_pretrained, vLLM and eval.py load as it is
    save_checkpoint, load_checkpoint    all that resuming needs; random numbers are functions of the step

`export`, `save_checkpoint` and `load_checkpoint` are collectives: every rank calls them.
Transformers is imported inside the functions: its model code takes a second, which --help need not wait for.
"""
import contextlib
import json
import os
import shutil
import warnings
from glob import glob

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from data import InputError
from engine.lora import base_weights, merged, save_adapter
from plumbing.processes import barrier, broadcast, here, is_main
from plumbing.run_folder import checkpoints, replaced_folder

# ------------------------------------------------------------------- what a model folder says of itself


def find_model(path: str, patterns=("*.json", "*.safetensors", "*.txt", "*.jinja")) -> str:
    """The local folder of a model: `path` itself, or the hub's copy of it, such files of it, downloaded once."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            adapter = os.path.exists(os.path.join(path, "adapter_config.json"))
            raise InputError(f"{path} has no config.json: " + (
                "it is an adapter: give the merged model, which training writes beside it" if adapter else
                "give a Hugging Face model folder or a hub name"))
        return path
    try:
        return snapshot_download(path, allow_patterns=list(patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"model {path} is neither a folder nor to be had from the hub ({type(error).__name__}): "
                         "give a folder, or download it first with `hf download`") from error


@contextlib.contextmanager
def readable_json(folder: str):
    """Turn whatever transformers raises on a torn config file into one line that names it."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: config.json or generation_config.json cannot be read "
                         f"({' '.join(str(error).split())[:100]}): download it again") from error


def model_config(path: str):
    """The Qwen2_5_VLConfig of a folder, a hub name or a bare config.json; no weight is read."""
    from transformers import Qwen2_5_VLConfig

    if not os.path.isfile(path):
        path = find_model(path, patterns=["config.json"])
    with readable_json(path):
        config = Qwen2_5_VLConfig.from_pretrained(path)
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"{path} holds a {config.model_type} model; a Qwen2.5-VL (qwen2_5_vl) is needed")
    return config


def generation_config(folder: str):
    """The folder's GenerationConfig, which names the end tokens; None where config.json has to do."""
    from transformers import GenerationConfig

    if not os.path.exists(os.path.join(folder, "generation_config.json")):
        return None
    with readable_json(folder):
        return GenerationConfig.from_pretrained(folder)


def check_vocabulary(processor, path: str) -> None:
    """A tokenizer without its files loads all the same, and then knows next to nothing."""
    known = processor.tokenizer.get_vocab()
    if len(known) < 256 or not {"<|im_end|>", "<|image_pad|>"} <= set(known):
        raise InputError(f"model {path}: its tokenizer has {len(known)} tokens and lacks text, <|im_end|> or "
                         "<|image_pad|>; copy the base model's tokenizer files there")
    if os.path.exists(os.path.join(path, "config.json")) and \
            model_config(path).image_token_id != processor.image_token_id:
        raise InputError(f"model {path}: config.json and tokenizer have different image tokens; take both of one")


def note_pixels(path: str, min_pixels: int, max_pixels: int, log=print) -> None:
    """Say so when images will not have the size that this model was trained with: scores would suffer in silence."""
    file = os.path.join(path, "processor_config.json")     # what every model folder written here has
    if os.path.exists(file):
        with open(file) as opened:
            size = json.load(opened).get("image_processor", {}).get("size", {})
        own = size.get("shortest_edge", min_pixels), size.get("longest_edge", max_pixels)
        if own != (min_pixels, max_pixels):
            log(f"note: {path} was made with images of {own[0]} to {own[1]} pixels, here they have {min_pixels} to "
                f"{max_pixels} (--min_pixels, --max_pixels)")


def load_processor(path: str, min_pixels: int, max_pixels: int, log=print):
    """Tokenizer, image processor and chat template of a model folder; images get an area of min_pixels..max_pixels."""
    from transformers import AutoProcessor

    # size alone would lose to the min_pixels in a hub folder's own config; without size, transformers would write the
    # limits into the dict that all its image processors share.
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    try:
        processor = AutoProcessor.from_pretrained(path, size=size, min_pixels=min_pixels, max_pixels=max_pixels)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"model {path}: no processor found ({reason}); give a Qwen2.5-VL folder, or a hub name that "
                         "can be reached") from error
    if not hasattr(processor, "image_processor") or not processor.chat_template:
        raise InputError(f"model {path}: no image processor or no chat template; copy the base model's files there")
    check_vocabulary(processor, path)
    for name in ("size", "min_pixels", "max_pixels"):      # the tokenizer was handed them too, and would save them
        processor.tokenizer.init_kwargs.pop(name, None)
    note_pixels(path, min_pixels, max_pixels, log)
    return processor


# --------------------------------------------------------------------------- weights in and out


def hub_name(name: str) -> str:
    """transformers' name of a parameter -> its name in the files of the hub (and in what vLLM loads)."""
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


@torch.no_grad()
def read_weights(policy, folder: str):
    """Fill an empty policy from safetensors files; of a sharded weight a rank reads its own rows and no more."""
    paths = sorted(glob(os.path.join(folder, "*.safetensors")))
    if not paths:
        raise InputError(f"{folder} has no *.safetensors: convert the weights to safetensors")
    for path in paths:
        try:
            safe_open(path, "pt")
        except SafetensorError as error:
            raise InputError(f"{folder}: {os.path.basename(path)} is torn or no safetensors file: "
                             "download it again") from error
    reader = HuggingFaceStorageReader(folder)
    stored, wanted = reader.read_metadata().state_dict_metadata, {}
    for name, parameter in base_weights(policy):  # a tied head appears once, as the embeddings
        key = hub_name(name) if hub_name(name) in stored else name
        if key not in stored:
            raise InputError(f"{folder} has no weight {hub_name(name)}: is it a complete Qwen2.5-VL?")
        if stored[key].size != parameter.shape:
            raise InputError(f"{folder}: {key} is {tuple(stored[key].size)}, config.json says {tuple(parameter.shape)}")
        wanted[key] = parameter.detach()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that each rank reads for itself is meant
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    for module in policy.modules():  # rope tables are computed, not stored, so the meta device has lost them
        if hasattr(module, "original_inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq.copy_(fresh.inv_freq)
            module.original_inv_freq.copy_(fresh.inv_freq)


@torch.no_grad()
def export(path: str, policy, processor, dtype=torch.bfloat16, file_bytes=4 << 30):
    """Write a Hugging Face folder in the hub's naming: weights, config, processor with pixel limits, generation config.

    Rank 0 holds one file's worth in host memory at a time; what is being gathered lies on the device.
    """
    here(f"export to {path}")
    policy.reshard()
    writer = is_main()
    with replaced_folder(path) if writer else contextlib.nullcontext() as folder:
        parts, part, size, total = [], {}, 0, 0  # parts: names in each file; part: the file being filled

        def flush():
            save_file(part, os.path.join(folder, f"part-{len(parts)}"), metadata={"format": "pt"})
            parts.append(list(part))
            part.clear()

        for name, parameter in base_weights(policy):
            nbytes = parameter.numel() * dtype.itemsize
            if part and size + nbytes > file_bytes:  # before the next is gathered: an embedding is half a gigabyte
                flush()
                size = 0
            tensor = merged(policy, name, dtype)  # a collective: all ranks call it
            if writer:
                part[hub_name(name)] = tensor.cpu().contiguous()
                size, total = size + nbytes, total + nbytes
        if writer:
            flush()
            finish_export(folder, policy, processor, dtype, parts, total)
    save_adapter(os.path.join(os.path.dirname(path), "adapter"), policy, policy.name_or_path, writer)
    barrier()


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
    config = model_config(policy.folder)
    config.architectures, config.dtype = ["Qwen2_5_VLForConditionalGeneration"], dtype
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    generation = os.path.join(policy.folder, "generation_config.json")
    if os.path.exists(generation):
        shutil.copy(generation, folder)  # as it is: transformers refuses to save some files that it loads


# ------------------------------------------------------------------------------------------- resume


def state_of(policy, optimizer) -> dict:
    """What a checkpoint holds: the weights that are trained, as they are, and the optimiser's state."""
    weights = {name: weight.detach() for name, weight in policy.named_parameters() if weight.requires_grad}
    return {"weights": weights, "optimizer": get_optimizer_state_dict(policy, optimizer)}


def save_checkpoint(folder: str, step: int, policy, optimizer):
    """Write folder/step-NNNNNN, the run's state after `step` steps; the last two are kept, a torn one never counts."""
    here(f"checkpoint after step {step}")
    path = os.path.join(folder, f"step-{step:06d}")
    if is_main():
        shutil.rmtree(path + ".writing", ignore_errors=True)
        os.makedirs(path + ".writing")
    barrier()
    dcp.save(state_of(policy, optimizer), checkpoint_id=path + ".writing")
    if is_main():
        os.rename(path + ".writing", path)
        for old in checkpoints(folder)[:-2]:
            shutil.rmtree(os.path.join(folder, old))
    barrier()


def load_checkpoint(folder: str, policy, optimizer):
    """Load the newest complete checkpoint, if there is one, on any number of ranks."""
    names = broadcast(checkpoints(folder))
    if not names:
        return
    saved = state_of(policy, optimizer)  # also makes the optimiser's empty state, sharded as this run is
    path = os.path.join(folder, names[-1])
    try:
        dcp.load(saved, checkpoint_id=path)  # the weights in place
    except dcp.api.CheckpointException as error:
        raise InputError(f"checkpoint {path} cannot be read: delete it to resume from the one before") from error
    set_optimizer_state_dict(policy, optimizer, saved["optimizer"])
