"""Files of models, in and out: Hugging Face folders into shards, exports, and checkpoints to resume from.

    folder = find_model(name)           a folder as it is, or the hub's copy of a name
    load_processor(folder, ..)          its tokenizer, image processor and chat template, tried on a prompt of our own
    read_weights(policy, folder)        each rank reads its own rows of the safetensors files
    export(folder, policy, processor)   the folder that training began with, with other weights
    save_checkpoint, load_checkpoint    all that resuming needs; random numbers are functions of the step

`export`, `save_checkpoint` and `load_checkpoint` are collectives: every rank calls them.
"""
import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from data import InputError, Sample, encode_prompt
from engine.lora import base_weights, merged, save_adapter
from plumbing.processes import barrier, broadcast, is_main, on_every_rank
from plumbing.release import RELEASE_PROMPT
from plumbing.run_folder import checkpoints, replaced_folder

# ------------------------------------------------------------------- what a model folder says of itself

# What the loaders of transformers, huggingface_hub, safetensors, torch, jinja and open_clip raise on bad files.
FOREIGN = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError,
           MemoryError, StopIteration, UnpicklingError, SafetensorError, StrictDataclassError, TemplateError,
           dcp.api.CheckpointException)
# model_type -> how the names of transformers' classes begin; all else about a family is read from config.json.
FAMILIES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
RENAMED = ("qwen2_vl", "qwen2_5_vl")  # whose files on the hub call the two towers "visual" and "model"


@contextlib.contextmanager
def foreign(what: str, advice: str):
    """Around a loader that is not ours: whatever bad files make it raise becomes one line, `what`: why; `advice`."""
    try:
        yield
    except InputError:
        raise
    except FOREIGN as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{what}: {why[:200]}; {advice}") from error


def find_model(path: str, patterns=("*.json", "*.safetensors", "*.txt", "*.jinja")) -> str:
    """The local folder of a model: `path` itself, or the hub's copy of it, such files of it, downloaded once."""
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise InputError(f"{path} has no config.json: give a hub name or a Hugging Face folder; of an adapter give "
                             "the merged model, which training writes beside it")
        return path
    with foreign(f"model {path} is neither a folder nor to be had from the hub",
                 "give a folder, or download it first with `hf download`"):
        return snapshot_download(path, allow_patterns=list(patterns))


def model_config(path: str):
    """The config of a folder, a hub name or a bare config.json; no weight is read. InputError: of no known family."""
    from transformers import PreTrainedConfig  # its model code takes a second to import: not for --help

    if not os.path.isfile(path):
        path = find_model(path, patterns=["config.json"])
    with foreign(f"model {path}: config.json cannot be read", "take the file of the base model"):
        kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type", "qwen2_5_vl")
        if kind not in FAMILIES:
            raise InputError(f"{path} holds a {kind} model; supported is a model_type of {', '.join(FAMILIES)}")
        return transformers_class(kind, "Config").from_pretrained(path)


def transformers_class(model_type: str, end: str):
    """A class of a family in transformers, which is imported only now: Config, Model, ForConditionalGeneration."""
    return getattr(transformers, FAMILIES[model_type] + end)


def other_files(folder: str) -> dict[str, bytes]:
    """A model folder's files besides its weights, links followed; none that are hidden, code or over 64 MB."""
    left_out = tuple(".safetensors .bin .pt .pth .ckpt .gguf .h5 .onnx .msgpack .pkl .index.json .py".split())
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()
            if path.is_file() and path.stat().st_size < 64e6  # a tokenizer.json has a dozen million bytes
            and not path.name.startswith(".") and not path.name.endswith(left_out)}


def load_processor(path: str, min_pixels: int, max_pixels: int, prompt: str = "own"):
    """Tokenizer, image processor and chat template of a model folder; images get an area of min_pixels..max_pixels.

    InputError: they do not fit together, or not to the folder's config.json.
    """
    from transformers import AutoProcessor

    config = model_config(path)
    # size alone would lose to the min_pixels in a hub folder's own config; without size, transformers would write the
    # limits into the dict that all its image processors share.
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    with foreign(f"model {path}: no processor found that works", "take the base model's files, or a hub name"):
        processor = AutoProcessor.from_pretrained(path, size=size, min_pixels=min_pixels, max_pixels=max_pixels)
    processor.release_prompt = RELEASE_PROMPT if prompt == "release" else ""  # for data.chat_text; never saved
    # A folder may lack some of its files, or have them of another model, and load all the same: a prompt is tried.
    advice, grey = "take the base model's files", Image.new("RGB", (61, 45), "grey")
    sample = Sample("", "How many?", (grey,), where=f"model {path}: a test prompt")
    with foreign(f"model {path}: tokenizer, image processor or chat template fails on a test prompt", advice):
        tried = encode_prompt(sample, processor)
        text, known = processor.tokenizer.decode(tried.input_ids), len(processor.tokenizer)
    tokens, vision = tried.input_ids.count(config.image_token_id), config.vision_config
    if not (tokens and known <= config.text_config.vocab_size and sample.question in text and "<|im_end|>" in text):
        raise InputError(f"model {path}: its tokenizer of {known} tokens is not that of its config.json; {advice}")
    made = list(tried.pixel_values.shape)
    wanted = [tokens * vision.spatial_merge_size**2, 3 * vision.temporal_patch_size * vision.patch_size**2]
    if made != wanted:
        raise InputError(f"model {path}: its processor makes patches {made} of a test image, config.json wants "
                         f"{wanted}; {advice}")
    return processor


# --------------------------------------------------------------------------- weights in and out


def hub_name(config, name: str) -> str:
    """transformers' name of a parameter -> its name in the files of the hub (and in what vLLM loads)."""
    if config.model_type not in RENAMED:
        return name
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def check_weights(named, where: str, advice: str):
    """InputError: a weight of this rank holds a number that is not finite."""
    for name, weight in named:
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if not local.isfinite().all():
            raise InputError(f"{where}: {name} holds numbers that are not finite; {advice}")


@torch.no_grad()
def read_weights(policy, folder: str):
    """Fill an empty policy from safetensors files; of a sharded weight a rank reads its own rows and no more."""
    reader, wanted = HuggingFaceStorageReader(folder), {}
    with foreign(f"{folder}: its weights cannot be read", "download them again"):
        stored = {name: [*weight.size] for name, weight in reader.read_metadata().state_dict_metadata.items()}
    for name, parameter in base_weights(policy):  # a tied head appears once, as the embeddings
        key = name if name in stored else hub_name(policy.config, name)
        if stored.get(key) != [*parameter.shape]:
            raise InputError(f"{folder}: in *.safetensors {key} is {stored.get(key, 'missing')}, config.json says "
                             f"{[*parameter.shape]}: take both of one model")
        wanted[key] = parameter.detach()
    unknown = sorted(key for key in stored if key not in wanted and not key.endswith(("lm_head.weight", "inv_freq")))
    if unknown:  # a tied head may be stored, and so may rope tables
        raise InputError(f"{folder}: config.json has no place for {unknown[0]}: take both of one model")
    with (warnings.catch_warnings(action="ignore", category=UserWarning),
          foreign(f"{folder}: its weights cannot be read", "download them again")):
        dcp.load(wanted, storage_reader=reader, no_dist=True)  # that each rank reads for itself is meant
    check_weights(wanted.items(), folder, "download it again, or take an earlier model")
    for module in policy.modules():  # rope tables are computed, not stored: a model made on the meta device lacks them
        if hasattr(module, "original_inv_freq"):
            for table, fresh in zip(module.buffers(), type(module)(module.config).buffers(), strict=True):
                table.copy_(fresh)


@torch.no_grad()
def export(path: str, policy, processor, dtype=torch.bfloat16, file_bytes=4 << 30):
    """Write a Hugging Face folder: weights in the hub's naming, and beside them what the folder of the start had.

    Rank 0 holds all weights of this type in host memory. InputError, before anything is written: a weight is not
    finite, which training's skipped steps should have prevented.
    """
    policy.reshard()
    on_every_rank(lambda: check_weights(policy.named_parameters(), f"nothing is exported to {path}",
                                        "start again with a lower --lr"))
    weights = {}
    for name, _ in base_weights(policy):
        weight = merged(policy, name, dtype)  # a collective: all ranks call it
        if is_main():
            weights[hub_name(policy.config, name)] = weight.to("cpu", copy=True)  # rows may be a part of their storage
    if is_main():
        size, number = processor.image_processor.size, str(dtype).removeprefix("torch.")
        with replaced_folder(path) as folder:
            save_torch_state_dict(weights, folder, max_shard_size=file_bytes)
            for name, content in changed_files(policy.files, number, size.shortest_edge, size.longest_edge).items():
                Path(folder, name).write_bytes(content)
    save_adapter(os.path.join(os.path.dirname(path), "adapter"), policy, policy.name_or_path, is_main())
    barrier()


def changed_files(files: dict[str, bytes], dtype: str, min_pixels: int, max_pixels: int) -> dict[str, bytes]:
    """A model's other files with its new number type and pixel limits, written where they have stood; all else stays.

    Versions of transformers differ in where they look, so what one has written is not rewritten by another.
    """
    contents = {"config.json": json.loads(files["config.json"])}
    for part in (contents["config.json"], *contents["config.json"].values()):
        if isinstance(part, dict):
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    places = {"min_pixels": min_pixels, "max_pixels": max_pixels,
              "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
    for name in {"preprocessor_config.json", "processor_config.json"} & files.keys():
        contents[name] = json.loads(files[name])
        images = contents[name].get("image_processor", contents[name])
        images.update({key: value for key, value in places.items() if key in images})
    return files | {name: json.dumps(content, indent=2, ensure_ascii=False).encode()
                    for name, content in contents.items()}


# ------------------------------------------------------------------------------------------- resume


def state_of(policy, optimizer) -> dict:
    """What a checkpoint holds: the weights that are trained, as they are, and the optimiser's state."""
    weights = {name: weight.detach() for name, weight in policy.named_parameters() if weight.requires_grad}
    return {"weights": weights, "optimizer": get_optimizer_state_dict(policy, optimizer)}


def save_checkpoint(folder: str, step: int, policy, optimizer):
    """Write folder/step-NNNNNN, the run's state after `step` steps; the last two are kept, a torn one never counts."""
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
