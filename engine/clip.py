"""The CLIP model that says whether a description matches its image; it is never trained.

    scorer = load_clip("qihoo360/fg-clip-large", device)     FG-CLIP v1, or any model of open_clip
    cosines = scorer.score(images, descriptions)             (N,) of N = Q G descriptions of the images of Q questions

FG-CLIP is loaded into open_clip under open_clip's names, so that none of its authors' code has to run.
"""
import json
import os
import re
from glob import glob
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from data import InputError, load_image


CHUNK = 64  # images or texts in one forward, which bounds its memory


class ClipScorer:
    """Cosines of images and descriptions. Each image and each different description is encoded once."""

    def __init__(self, model: torch.nn.Module, preprocess, tokenize, device: str):
        self.model = model.float().to(device).eval().requires_grad_(False)
        self.preprocess = preprocess               # PIL image -> (3, H, W)
        self.tokenize = tokenize                   # list of texts -> (texts, L), cut at L with the end token kept
        self.device = device

    def pixels(self, images: list) -> torch.Tensor:
        return torch.stack([self.preprocess(load_image(image)) for image in images])     # (images, 3, H, W)

    @torch.no_grad()
    def encode(self, items: list, prepare, encoder) -> torch.Tensor:
        chunks = [items[i:i + CHUNK] for i in range(0, len(items), CHUNK)]
        features = [encoder(prepare(chunk).to(self.device)).cpu() for chunk in chunks]
        return F.normalize(torch.cat(features), dim=-1)                  # (items, D) unit vectors

    def score(self, images: list, descriptions: list[str | None]) -> torch.Tensor:
        """Cosine of each description with the images of its question; 0 without a description or without an image.

        With several images it is the mean of their cosines, which is the product with the mean of their unit vectors:
        a description must cover them all, where the maximum would reward describing the easiest one.

        Args: images, of each of Q questions a list of PIL images or paths; descriptions, Q G texts, group-major.
        Returns: (Q G,) float32 on the CPU.
        """
        Q, N = len(images), len(descriptions)
        G = N // max(Q, 1)                                               # a process may have no question
        assert Q * G == N, f"{N=} not a multiple of {Q=}"
        texts = [(description or "").strip() for description in descriptions]
        different = sorted(set(texts) - {""})
        all_images = [image for group in images for image in group]
        if not different or not all_images:
            return torch.zeros(N)
        image_vectors = self.encode(all_images, self.pixels, self.model.encode_image)            # (images, D)
        text_vectors = self.encode(different, self.tokenize, self.model.encode_text)             # (texts, D)
        groups = image_vectors.split([len(group) for group in images])
        means = torch.stack([group.sum(0) / max(len(group), 1) for group in groups])             # (Q, D)
        text_vectors = torch.cat([text_vectors, torch.zeros_like(text_vectors[:1])])             # last row: no text
        row = {text: i for i, text in enumerate([*different, ""])}
        text_vectors = text_vectors[[row[text] for text in texts]]                               # (N, D)
        return (means.repeat_interleave(G, dim=0) * text_vectors).sum(-1)                   # (N,) cosines


KEPT_POSITIONS = 20
ORIGINAL_POSITIONS = "text_model.embeddings.position_embedding_ori.weight"       # (248, W) rows 0..19 are used
STRETCHED_POSITIONS = "text_model.embeddings.position_embedding_res.weight"      # (248, W) rows 20.. are used
FG_CLIP_NAMES = {                                  # open_clip name: FG-CLIP name
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_filip_projection.weight",                   # the long path's
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",          # spelled so
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
FG_CLIP_BLOCK_NAMES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
                       "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
FG_CLIP_UNUSED = {                                 # the short text path, and scales of other training losses
    "text_model.embeddings.position_embedding.weight", "text_projection.weight",
    "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids",
    "logit_scale_finegraind", "logit_scale_hardneg",
}


def fg_clip_sources(key: str) -> list[str]:
    """Names of the FG-CLIP tensors that make up one open_clip tensor."""
    if key == "positional_embedding":
        return [ORIGINAL_POSITIONS, STRETCHED_POSITIONS]
    if key in FG_CLIP_NAMES:
        return [FG_CLIP_NAMES[key]]
    tower, layer, part, kind = re.fullmatch(r"(|visual\.)transformer\.resblocks\.(\d+)\.(.+)[._](\w+)", key).groups()
    block = f"{'vision' if tower else 'text'}_model.encoder.layers.{layer}"
    if part == "attn.in_proj":
        return [f"{block}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
    return [f"{block}.{FG_CLIP_BLOCK_NAMES[part]}.{kind}"]


def fg_clip_state(weights: dict[str, torch.Tensor], model, folder: str) -> dict[str, torch.Tensor]:
    """The open_clip state. Every FG-CLIP tensor must be there, have the shape that config.json says, and be known."""
    state, used = {}, set(FG_CLIP_UNUSED)
    for key, target in model.state_dict().items():
        transposed = key in ("text_projection", "visual.proj")           # (D, W) there, (W, D) here
        names, tensors = fg_clip_sources(key), []
        shape = list(target.T.shape if transposed else target.shape)
        if len(names) == 3:                                              # query, key and value are one tensor here
            shape[0] //= 3
        for name in names:
            if name not in weights:
                raise InputError(f"CLIP model {folder}: {name} is missing from its safetensors; download it again")
            if list(weights[name].shape) != shape:
                raise InputError(f"CLIP model {folder}: {name} has shape {list(weights[name].shape)}, not {shape} as "
                                 "config.json says; download both again")
            tensors.append(weights[name].T if transposed else weights[name])
        if key == "positional_embedding":
            tensors = [tensors[0][:KEPT_POSITIONS], tensors[1][KEPT_POSITIONS:]]
        state[key] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        used.update(names)
    unknown = sorted(set(weights) - used)
    if unknown:
        raise InputError(f"CLIP model {folder}: {unknown[0]} ({len(unknown)} such) is no part of FG-CLIP v1; is it "
                         "another model?")
    return state


def fg_clip_model(config, context_length: int):
    """An open_clip.CLIP with random weights in the sizes of a transformers CLIPConfig."""
    import open_clip  # two seconds, and only stage 1 needs it

    text, vision = config.text_config, config.vision_config
    return open_clip.CLIP(
        embed_dim=config.projection_dim,
        quick_gelu=text.hidden_act == "quick_gelu",
        text_cfg=dict(context_length=context_length, vocab_size=text.vocab_size, width=text.hidden_size,
                      heads=text.num_attention_heads, layers=text.num_hidden_layers,
                      mlp_ratio=text.intermediate_size / text.hidden_size),
        vision_cfg=dict(image_size=vision.image_size, patch_size=vision.patch_size, width=vision.hidden_size,
                        head_width=vision.hidden_size // vision.num_attention_heads, layers=vision.num_hidden_layers,
                        mlp_ratio=vision.intermediate_size / vision.hidden_size),
    )


def load_fg_clip(folder: str, device: str) -> ClipScorer:
    """FG-CLIP v1 (qihoo360/fg-clip-large and -base): sizes from config.json, weights from *.safetensors."""
    import open_clip
    from transformers import CLIPConfig

    weights, statistics = {}, {}
    images = os.path.join(folder, "preprocessor_config.json")
    try:
        config = CLIPConfig.from_pretrained(folder)
        if os.path.isfile(images):
            with open(images, encoding="utf-8") as file:
                statistics = json.load(file)
        for path in sorted(glob(os.path.join(folder, "*.safetensors"))):
            weights |= load_file(path)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"CLIP model {folder}: {one_line(error)}; download it again") from error
    if STRETCHED_POSITIONS not in weights:
        raise InputError(f"CLIP model {folder}: neither an open_clip model (no open_clip_config.json) nor FG-CLIP v1 "
                         f"({STRETCHED_POSITIONS} is missing from its safetensors)")
    model = fg_clip_model(config, context_length=len(weights[STRETCHED_POSITIONS]))
    model.load_state_dict(fg_clip_state(weights, model, folder))
    # Squashed as in the release, not cut to the middle. Without mean and std open_clip takes CLIP's own.
    preprocess = open_clip.image_transform(config.vision_config.image_size, False, statistics.get("image_mean"),
                                           statistics.get("image_std"), resize_mode="squash")
    return ClipScorer(model, preprocess, open_clip.SimpleTokenizer(context_length=model.context_length), device)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def load_open_clip(name: str, pretrained: str | None, device: str) -> ClipScorer:
    """Through open_clip's own loader; images are prepared as the model's own configuration says."""
    import open_clip

    # open_clip only warns when the weights were trained with another activation than the architecture's.
    quick_gelu = bool(pretrained and open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained, force_quick_gelu=quick_gelu)
        tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise InputError(f"CLIP model {name} {pretrained or ''}: open_clip cannot load it, check the files or the "
                         f"network: {one_line(error)}") from error
    return ClipScorer(model, preprocess, tokenize, device)


def load_pretrained(architecture: str, pretrained: str, device: str) -> ClipScorer:
    import open_clip

    if architecture not in open_clip.list_models():
        raise InputError(f"CLIP model {architecture}:{pretrained}: open_clip has no {architecture}; its names, such as "
                         "ViT-B-32:openai, are listed by open_clip.list_pretrained()")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained not in tags and not os.path.isfile(pretrained):
        raise InputError(f"CLIP model {architecture}:{pretrained}: {pretrained} is no file and none of {tags}")
    return load_open_clip(architecture, pretrained, device)


def load_clip(name: str, device: str) -> ClipScorer:
    """The CLIP model of a folder, of a hub name (org/model), or of open_clip's architecture:pretrained.

    A folder or hub model is FG-CLIP v1 (config.json, *.safetensors) or an open_clip model (open_clip_config.json,
    open_clip_model.safetensors). Raises InputError when it is not there or not complete.
    """
    folder = name
    if not os.path.isdir(name):
        if ":" in name:
            return load_pretrained(*name.split(":", 1), device)
        try:
            folder = snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])         # no code, no pickle
        except (OSError, ValueError) as error:     # not a name, no such model, or no network
            raise InputError(f"CLIP model {name}: no such folder, and the hub says: {one_line(error)}; give a folder, "
                             "a hub name (org/model), or an open_clip pair such as ViT-B-32:openai") from error
    if not os.path.isfile(os.path.join(folder, "open_clip_config.json")):
        return load_fg_clip(folder, device)
    if not os.path.isfile(os.path.join(folder, "open_clip_model.safetensors")):
        raise InputError(f"CLIP model {name}: open_clip_model.safetensors is missing beside open_clip_config.json")
    return load_open_clip(f"local-dir:{folder}", None, device)
