"""Untrained model folders to benchmark with: the demo's tiny Qwen-VL, or any shape of speed/configs.

Speed does not ask what weights say, so they are drawn; tokenizer and processor are the demo's. Where the shape has a
larger vocabulary than that tokenizer, the rest are made-up words, so that all of it can be drawn and decoded.
"""
import json
import os

import torch
from transformers import AutoProcessor

import demo
from engine.weights import transformers_class

BYTES_PER_PARAMETER = 20  # float32 master, gradient and two Adam moments; bf16 reference and sampler


def fill_vocabulary(folder: str, size: int):
    """Give a saved tokenizer `size` tokens in all by made-up words ("3 1203"); the special ones move to the end."""
    path = os.path.join(folder, "tokenizer.json")
    with open(path) as f:
        tokenizer = json.load(f)
    vocab, added = tokenizer["model"]["vocab"], tokenizer["added_tokens"]
    first = len(vocab)
    vocab |= {f"Ġ{i % 400}Ġ{i}": i for i in range(first, size - len(added))}  # Ġ is how it writes a space
    for token in added:
        token["id"] += len(vocab) - first
    with open(path, "w") as f:
        json.dump(tokenizer, f)


def parameters(config) -> int:
    with torch.device("meta"):
        return transformers_class(config.model_type, "ForConditionalGeneration")(config).num_parameters()


def fitted_config(shape: dict, tokenizer, device: str):
    """The shape with the special tokens of `tokenizer`, and with no more layers than can be trained on this GPU."""
    for name, token in (("bos", "endoftext"), ("eos", "im_end"), ("image", "image_pad"), ("video", "video_pad"),
                        ("vision_start", "vision_start"), ("vision_end", "vision_end"), ("vision", "vision_pad")):
        shape[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{token}|>")
    text = shape.get("text_config", shape)  # the configs of Qwen2.5-VL are flat
    most = torch.cuda.get_device_properties(0).total_memory * 0.75 if device == "cuda" else float("inf")
    while True:
        config = transformers_class(shape["model_type"], "Config").from_dict(shape)
        if parameters(config) * BYTES_PER_PARAMETER <= most or text["num_hidden_layers"] == 1:
            return config
        text["num_hidden_layers"] -= 1
        text["max_window_layers"] = text["num_hidden_layers"]


def make_model_folder(folder: str, shape: str | None, device: str):
    """Write an untrained model with its processor; shape: a config.json, or None for the demo's tiny model."""
    if shape is not None:
        with open(shape) as f:
            shape = json.load(f)
    processor = demo.make_processor(["How many red circles are there?"], shape["model_type"] if shape else "qwen2_5_vl")
    processor.save_pretrained(folder)
    if shape is None:
        model = demo.make_model(processor, initializer_range=0.02)  # near uniform: the end tokens' share sets lengths
    else:
        fill_vocabulary(folder, shape.get("text_config", shape)["vocab_size"])
        config = fitted_config(shape, AutoProcessor.from_pretrained(folder).tokenizer, device)
        torch.manual_seed(0)
        with torch.device(device):
            kind = transformers_class(config.model_type, "ForConditionalGeneration")
            model = kind._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.config
