"""The CLIP model that says whether a description matches its image; it is never trained.

    scorer = load_clip("qihoo360/fg-clip-large", device)     FG-CLIP v1, or any model of open_clip
    cosines = scorer.score(images, descriptions)             (N,) of N = Q G descriptions of the images of Q questions

FG-CLIP's own class is a transformers CLIPModel with a second path for long texts. Its long path is loaded into a plain
CLIPModel, so none of its authors' code has to run.
"""
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from data import InputError, load_image
from engine.weights import check_weights, foreign
from plumbing.processes import ahead


CHUNK = 64  # images or texts in one forward, which bounds its memory


class ClipScorer:
    """Cosines of images and descriptions. Each image and each different description is encoded once."""

    def __init__(self, model: torch.nn.Module, preprocess, tokenize, device: str):
        self.model = model.float().to(device).eval().requires_grad_(False)
        self.preprocess = preprocess               # PIL image -> (3, H, W)
        self.tokenize = tokenize                   # list of texts -> (texts, L), cut at L with the end token kept
        self.device = device

    def pixels(self, images: list) -> torch.Tensor:                      # (images, 3, H, W)
        return torch.stack(list(ahead(lambda image: self.preprocess(load_image(image)), images, len(images))))

    @torch.no_grad()
    def encode(self, items: list, prepare, encoder) -> torch.Tensor:
        chunks = [items[i:i + CHUNK] for i in range(0, len(items), CHUNK)]
        features = [encoder(prepare(chunk).to(self.device)).cpu() for chunk in chunks]
        return F.normalize(torch.cat(features), dim=-1)                  # (items, D) unit vectors

    def score(self, images: list, descriptions: list[str | None], empty: bool = False) -> torch.Tensor:
        """Cosine of each description with the images of its question; 0 without a description or without an image.
        With empty, an empty description is a text like others, whose cosine is not 0: the release's rule.

        With several images it is the mean of their cosines, which is the product with the mean of their unit vectors:
        a description must cover them all, where the maximum would reward describing the easiest one.

        Args: images, of each of Q questions a list of PIL images or paths; descriptions, Q G texts, group-major.
        Returns: (Q G,) float32 on the CPU.
        """
        Q, N = len(images), len(descriptions)
        G = N // max(Q, 1)                                               # a process may have no question
        assert Q * G == N, f"{N=} not a multiple of {Q=}"
        texts = [(description or "").strip() for description in descriptions]
        different = sorted(set(texts) - (set() if empty else {""}))
        all_images = [image for group in images for image in group]
        if not different or not all_images:
            return torch.zeros(N)
        image_vectors = self.encode(all_images, self.pixels, self.model.encode_image)            # (images, D)
        groups = image_vectors.split([len(group) for group in images])
        means = torch.stack([group.sum(0) / max(len(group), 1) for group in groups])             # (Q, D)
        text_vectors = {"": torch.zeros_like(means[0])}                  # no text, no reward
        text_vectors |= zip(different, self.encode(different, self.tokenize, self.model.encode_text))
        described = torch.stack([text_vectors[text] for text in texts])                          # (N, D)
        return (means.repeat_interleave(G, dim=0) * described).sum(-1)                           # (N,) cosines


POSITIONS = "text_model.embeddings.position_embedding"
FG_CLIP_UNUSED = {                                 # the short text path, and scales of other training losses
    f"{POSITIONS}.weight", "text_projection.weight", "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids", "logit_scale_finegraind", "logit_scale_hardneg",
}


def fg_clip_state(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FG-CLIP's tensors as the state of a CLIPModel: the long text path in place of the short one.

    It has two tables of positions, (248, W) each: rows 0..19 of "_ori" are used, and rows 20.. of "_res".
    """
    state = {name: tensor for name, tensor in weights.items() if name not in FG_CLIP_UNUSED}
    original, stretched = (state.pop(f"{POSITIONS}_{name}.weight") for name in ("ori", "res"))
    state[f"{POSITIONS}.weight"] = torch.cat([original[:20], stretched[20:]])
    state["text_projection.weight"] = state.pop("text_filip_projection.weight")                # (D, W)
    return state


def fg_clip_model(config, context_length: int):
    """A CLIPModel with random float32 weights and the two encoders of an open_clip model."""
    from transformers import CLIPModel  # only stage 1 needs it

    class Clip(CLIPModel):
        def encode_image(self, pixels):
            return self.visual_projection(self.vision_model(pixels).pooler_output)

        def encode_text(self, tokens):
            return self.text_projection(self.text_model(tokens).pooler_output)

    config.text_config.max_position_embeddings = context_length
    config.text_config.eos_token_id = 49407  # it pools at CLIP's end token, whatever its config.json says
    return Clip(config).float()


def load_fg_clip(folder: str, device: str) -> ClipScorer:
    """FG-CLIP v1 (qihoo360/fg-clip-large and -base): sizes from config.json, weights from *.safetensors."""
    import open_clip  # two seconds, and only stage 1 needs it
    from transformers import CLIPConfig

    weights = {}
    with foreign(f"CLIP model {folder}", "download it again"):
        config = CLIPConfig.from_pretrained(folder)
        for path in sorted(Path(folder).glob("*.safetensors")):
            weights |= load_file(path)
        if f"{POSITIONS}_res.weight" not in weights:
            raise InputError(f"CLIP model {folder}: neither an open_clip model (no open_clip_config.json) nor FG-CLIP "
                             f"v1 ({POSITIONS}_res.weight is missing from its safetensors)")
        context_length = len(weights[f"{POSITIONS}_res.weight"])
        model = fg_clip_model(config, context_length)
        model.load_state_dict(fg_clip_state(weights))                    # all of them, and no other
        statistics = json.loads(Path(folder, "preprocessor_config.json").read_text("utf-8"))
        # Squashed as in the release, not cut to the middle.
        preprocess = open_clip.image_transform(config.vision_config.image_size, False, statistics.get("image_mean"),
                                               statistics.get("image_std"), resize_mode="squash")
        return ClipScorer(model, preprocess, open_clip.SimpleTokenizer(context_length=context_length), device)


def load_open_clip(name: str, pretrained: str | None, device: str) -> ClipScorer:
    """An architecture with pretrained weights (a tag or a file), or local-dir:folder; images as its config says."""
    import open_clip

    # open_clip only warns when the weights were trained with another activation than the architecture's.
    quick_gelu = bool(pretrained) and open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False)
    with foreign(f"CLIP model {name} {pretrained or ''}: open_clip cannot load it", "check the files or the network"):
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained, force_quick_gelu=quick_gelu)
        return ClipScorer(model, preprocess, open_clip.get_tokenizer(name), device)


def load_clip(name: str, device: str) -> ClipScorer:
    """The CLIP model of a folder or a hub name (org/model), or of open_clip's architecture:pretrained."""
    folder = name
    if not os.path.isdir(name) and ":" not in name:
        with foreign(f"CLIP model {name}: no such folder, and the hub says",
                     "give a folder, a hub name (org/model), or an open_clip pair such as ViT-B-32:openai"):
            folder = snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])         # no code, no pickle
    if not os.path.isdir(folder):
        scorer = load_open_clip(*name.split(":", 1), device)
    elif os.path.isfile(os.path.join(folder, "open_clip_config.json")):
        scorer = load_open_clip(f"local-dir:{folder}", None, device)
    else:
        scorer = load_fg_clip(folder, device)
    check_weights(scorer.model.named_parameters(), f"CLIP model {name}", "download it again")
    return scorer
