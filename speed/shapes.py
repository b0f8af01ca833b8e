"""Untrained model folders to benchmark with: the demo's tiny Qwen2.5-VL, or any shape of speed/configs.

Speed does not ask what weights say, so they are drawn; tokenizer and processor are the demo's. Where the shape has a
larger vocabulary than that tokenizer, the rest are made-up words, so that all of it can be drawn and decoded.
"""
import json
import os

import torch
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import demo

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


def parameters(config: Qwen2_5_VLConfig) -> int:
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config).num_parameters()


def fitted_config(shape: dict, tokenizer, device: str) -> Qwen2_5_VLConfig:
    """The shape with the special tokens of `tokenizer`, and with no more layers than can be trained on this GPU."""
    for name, token in (("bos", "endoftext"), ("eos", "im_end"), ("image", "image_pad"), ("video", "video_pad"),
                        ("vision_start", "vision_start"), ("vision_end", "vision_end"), ("vision", "vision_pad")):
        shape[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{token}|>")
    most = torch.cuda.get_device_properties(0).total_memory * 0.75 if device == "cuda" else float("inf")
    while True:
        config = Qwen2_5_VLConfig.from_dict(shape)
        if parameters(config) * BYTES_PER_PARAMETER <= most or shape["num_hidden_layers"] == 1:
            return config
        shape["num_hidden_layers"] -= 1
        shape["max_window_layers"] = shape["num_hidden_layers"]


def make_model_folder(folder: str, shape: str | None, device: str) -> Qwen2_5_VLConfig:
    """Write an untrained model with its processor; shape: a config.json, or None for the demo's tiny model."""
    processor = demo.make_processor(["How many red circles are there?"])
    processor.save_pretrained(folder)
    if shape is None:
        model = demo.make_model(processor, initializer_range=0.02)  # near uniform: the end tokens' share sets lengths
    else:
        with open(shape) as f:
            shape = json.load(f)
        fill_vocabulary(folder, shape["vocab_size"])
        config = fitted_config(shape, AutoProcessor.from_pretrained(folder).tokenizer, device)
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.config
