"""The memory plan: what one GPU holds in each phase of a stage, known before the first step.

    python train.py --stage 1 --plan --gpus 8 --gpu_gb 80      the table, from config.json alone
    plan = make_plan(config, shape_of(model), gpus, room)      the same as numbers
    config = fit_plan(config, folder, device)                  as many slots as it has room for
    policy, ref_policy, replica = load_models(config, ..)      the models of a stage, no weight held twice

Weights and cache are counted exactly. Activations are what autograd keeps of transformers' layers, added up below per
token; tests/test_plan.py holds them against the allocator's own figures. The row is the worst that can come: as many
prompts with the largest image as fit beside one full chunk of logits.

Symbols: T tokens in the row, N response tokens, p image patches, H hidden size, I width of the MLP (Hv, Iv: of the
vision tower), V vocabulary, b bytes of the compute dtype. GB are 2^30 bytes, as in the size of an "80 GB" GPU.
"""
import dataclasses
import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine.lora import chosen
from engine.policy import Policy, policy_class
from engine.sampler import BURST, PREFILL
from engine.weights import foreign, model_config
from kernels.ops import CHUNK
from plumbing.processes import print0

GB = 2**30
USABLE = 0.92  # of a GPU: the rest is the CUDA context, NCCL's buffers and holes between allocations
CPU_SLOTS = 128  # where no plan is needed
MOST_SLOTS = 256  # more rows hardly make decoding faster, and a longer tail of it waits for the last of them
CLIP_PARAMETERS = 428e6  # open_clip's ViT-L-14-336, in float32
PROMPT_TEXT = 100  # tokens of a prompt beside its image: instruction, template, a short question
CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "speed", "configs")


class Shape:
    """What of a model the plan needs, from its config: numbers of parameters, then sizes."""

    def __init__(self, config):
        with torch.device("meta"):  # no memory is taken
            policy = policy_class(config.model_type)(config)
        self.model = policy
        text, vision, tower = config.text_config, config.vision_config, policy.model.visual
        layer, block = policy.model.language_model.layers[0], tower.blocks[0]
        self.total, self.vision, self.layer, self.block = (
            sum(p.numel() for p in part.parameters()) for part in (policy, tower, layer, block))
        self.layers, self.blocks = text.num_hidden_layers, vision.depth
        # All that is in no layer and no block: embeddings, head, patch embedding, merger, norms.
        self.root = self.total - self.layers * self.layer - self.blocks * self.block
        self.hidden, self.mlp, self.vocab = text.hidden_size, text.intermediate_size, text.vocab_size
        self.queries, self.kv = (part.out_features for part in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        self.qk_norm = hasattr(layer.self_attn, "q_norm")  # whether a token's queries and keys are normalised
        self.vision_hidden = tower.patch_embed.proj.out_channels
        self.vision_mlp = getattr(vision, "intermediate_size", 0) or vision.embed_dim * vision.mlp_ratio
        self.gated = hasattr(block.mlp, "gate_proj")  # whether a vision block is like a decoder layer, else as in ViT
        self.deepstack = len(getattr(tower, "deepstack_merger_list", ()))
        self.patch = tower.patch_embed.proj.weight[0].numel()  # numbers in a patch
        self.vision_config = vision


def shape_of(path: str) -> Shape:
    """The shape of a Hugging Face folder, a hub name or a bare config.json; no weight is read. InputError: no model.

    The hub's models are known without it, with or without their owner: Qwen/Qwen2.5-VL-3B-Instruct, qwen2.5-vl-3b.
    """
    known = os.path.join(CONFIGS, os.path.basename(path).lower().removesuffix("-instruct") + ".json")
    with foreign(f"model {path}: config.json describes no model", "take the file of the base model"):
        return Shape(model_config(path if os.path.exists(path) or not os.path.exists(known) else known))


# ------------------------------------------------------------------------------------ the worst row


class Row(NamedTuple):
    """A packed row: `prompts` prompts of one image each, and G responses to each."""

    tokens: int  # in all
    prompts: int
    prompt: int  # tokens of a prompt
    patches: int  # of its image
    response: int  # tokens of all responses


def largest_image(config, vision) -> int:
    """Tokens of the largest image that fits into a prompt; vision: the model's vision_config."""
    return max(1, min(config.max_pixels // (vision.patch_size * vision.spatial_merge_size)**2, config.max_prompt - 1))


def worst_row(config, vision) -> Row:
    """As many prompts with the largest image as fit beside one chunk of response tokens."""
    image = largest_image(config, vision)
    prompt = min(image + PROMPT_TEXT, config.max_prompt)
    prompts = max(1, (config.token_budget - CHUNK) // (prompt + config.group_size))
    patches = vision.spatial_merge_size**2 * image
    return Row(config.token_budget, prompts, prompt, patches, config.token_budget - prompts * prompt)


# -------------------------------------------------------------------------------- bytes, per phase


def with_copy(b: int) -> int:
    """Bytes of a float32 number and, if the compute dtype is another, of its copy in that."""
    return 4 + b * (b < 4)


def trained_parameters(config, shape: Shape) -> int:
    """All, all but the vision tower's, or those of the adapters."""
    if config.lora_rank:
        return config.lora_rank * sum(sum(layer.weight.shape) for layer in chosen(shape.model, config).values())
    return shape.total - shape.vision * config.freeze_vision


def always_bytes(config, shape: Shape, gpus: int) -> dict[str, float]:
    """What is there in every phase."""
    b, trained = getattr(torch, config.dtype).itemsize, trained_parameters(config, shape)
    if config.stage == "sample":
        return {"sampler's copy of the weights": b * shape.total}
    lora = config.lora_rank > 0
    rows = {"master weights, fp32": 4 * (trained if lora else shape.total) / gpus,
            "frozen weights": b * shape.total * lora / gpus, "Adam's moments, fp32": 8 * trained / gpus}
    if config.stage != "sft" or config.eval_every:  # with adapters, one GPU's sampler has copies of these only
        rows["sampler's copy of the weights"] = b * (trained * lora + shape.total * (not lora or gpus > 1))
    if config.stage != "sft" and config.kl_coef > 0 and not lora:
        rows["reference policy"] = b * shape.total / gpus
    if config.clip_weight > 0:
        rows["CLIP, fp32"] = 4 * CLIP_PARAMETERS
    return {name: size for name, size in rows.items() if size}


def rollout_bytes(config, shape: Shape, slots: int) -> dict[str, float]:
    """The cache, which exists during a rollout only, and the larger of its two kinds of step."""
    b, length = getattr(torch, config.dtype).itemsize, config.max_prompt + config.max_response + BURST
    T, Hv = PREFILL + config.max_prompt, shape.vision_hidden
    p = shape.vision_config.spatial_merge_size**2 * T  # at worst every token is an image's
    text = T * ((4 + 2.5 * b) * shape.hidden + 3 * b * shape.mlp)  # a layer's MLP and what it was made of
    vision = p * (shape.patch * with_copy(b) + max(36 * Hv, 14 * Hv + 3 * b * shape.vision_mlp))  # rotation in fp32
    drawing = 4 * 4 * slots * shape.vocab  # logits and, without the kernel, three copies with something done to them
    return {f"key-value cache, {slots} slots x {length} tokens": 2 * b * slots * length * shape.layers * shape.kv,
            "reading prompts, drawing tokens": max(text, vision, drawing)}


def head_bytes(N: int, H: int, V: int, b: int, chunk: int = CHUNK, frozen: bool = False) -> float:
    """kernels.logprob with a loss on top: one chunk of fp32 logits, and both gradients; then the weight's is cast."""
    weight = V * H * (not frozen)
    return b * N * H + max(4 * min(N, chunk) * V + 4 * weight, with_copy(b) * weight)


def training_bytes(config, shape: Shape, gpus: int) -> dict[str, float]:
    """Gradients, and what one row needs when it needs most.

    What autograd keeps of a decoder layer, per token. Two norms: their fp32 input 4 H and normalised input b H; the
    input of the projections after each b H; queries, attention's result and its copy 3 b H; of the MLP gate, its
    activation, the other half and the product 4 b I; and the gathered keys and values. With gradient checkpointing only
    the layer's input b H is kept, and one layer at a time has all of it. Its backward adds 2 b (H + I). With LoRA the
    inputs of frozen weights, norms and patch embedding, are not kept. A vision block is the same, but for keys and
    values as wide as the queries and a rotation in fp32.
    """
    b, lora = getattr(torch, config.dtype).itemsize, config.lora_rank > 0
    row = worst_row(config, shape.vision_config)
    T, p, H, Hv, V = row.tokens, row.prompts * row.patches, shape.hidden, shape.vision_hidden, shape.vocab
    keys = T + row.prompts * row.prompt * (config.group_size if config.stage != "sft" else 1)
    layer = T * ((8 if b < 4 else 4) * H + b * ((2 if lora else 4) * H + 3 * shape.queries + 4 * shape.mlp))
    layer += 2 * b * keys * shape.kv + T * (4 + b * (not lora)) * (shape.queries + shape.kv) * shape.qk_norm
    block = p * (8 * Hv + (10 if lora else 12) * b * Hv + 4 * b * shape.vision_mlp)
    if not shape.gated:
        block = p * b * (11 * Hv + 2 * shape.vision_mlp)
    layer_step, block_step = T * 2 * b * (H + shape.mlp), p * b * (3.5 * Hv + 2 * shape.vision_mlp)
    if config.gradient_checkpointing:
        layer_step, block_step = layer_step + layer, block_step + block
        layer, block = T * b * H, p * b * Hv
    pixels = p * shape.patch * (4 if lora or config.freeze_vision else with_copy(b))
    blocks_kept, merger_kept = shape.blocks * block, p * (17 + 3 * b * shape.deepstack) * Hv
    if config.freeze_vision or lora and not config.lora_vision:
        blocks_kept = merger_kept = block_step = 0.0
    kept = shape.layers * layer + pixels + blocks_kept + merger_kept  # the merger's norm and MLP, the rotation's tables
    head = head_bytes(row.response, H, V, b, frozen=lora) + b * row.response * H  # and the hidden states picked for it
    # Two layers' weights, one's gradients and their fp32 sum, and the head's gradient.
    gathered = b * shape.root + (2 * b if lora else 3 * b + 4) * shape.layer + b * V * H * (not lora)
    moments = {  # name: (activations, weights that are gathered and their gradients)
        "the head": (kept + T * (4 + 1.5 * b) * H + head, b * (shape.root + 2 * shape.layer)),
        "a decoder layer": (kept + layer_step, gathered),
        "a vision block": (pixels + blocks_kept + block_step, gathered),
        "the embeddings' gradient": (0.0, (2 * b + 4) * shape.root * (not lora)),
    }
    name, (activations, weights) = max(moments.items(), key=lambda item: sum(item[1]))
    return {"gradients, fp32": 4 * trained_parameters(config, shape) / gpus,
            "gathered weights, their gradients": weights,
            f"activations of {T} tokens, {row.prompts} images, most in {name}": activations}


# ---------------------------------------------------------------------------------------- the plan


class Plan(NamedTuple):
    phases: dict[str, dict[str, float]]  # bytes on one GPU by phase and purpose
    peaks: dict[str, float]  # bytes of each phase and of what is always there
    slots: int  # as asked for, or as many as fit, 0 if not one group does
    fits: bool


def most_slots(config, shape: Shape, room: float) -> int:
    """Whole groups of slots, at most MOST_SLOTS, whose rollout fits into so many bytes; 0 if not one group does."""
    G = config.group_size
    most = max(MOST_SLOTS // G, 1) * G
    return next((n for n in range(most, 0, -G) if sum(rollout_bytes(config, shape, n).values()) <= room), 0)


def make_plan(config, shape: Shape, gpus: int, room: float) -> Plan:
    """Where the memory of one of `gpus` GPUs of `room` bytes goes."""
    phases, slots = {"always": always_bytes(config, shape, gpus)}, config.slots
    always = sum(phases["always"].values())
    if config.stage == "sft" and not config.eval_every:
        slots = 1
    else:
        slots = slots or most_slots(config, shape, USABLE * room - always)
        phases["rollout"] = rollout_bytes(config, shape, slots or config.group_size)
    if config.stage != "sample":
        phases["training"] = training_bytes(config, shape, gpus)
    peaks = {name: always + sum(rows.values()) for name, rows in phases.items() if name != "always"}
    return Plan(phases, peaks, slots, slots > 0 and max(peaks.values()) <= USABLE * room)


def advice(config, shape: Shape, gpus: int, room: float) -> str:
    """What to change when a plan does not fit: as few and as cheap settings as do, and how many GPUs need none."""
    def fits(changes: dict, gpus: int = gpus) -> bool:
        return make_plan(dataclasses.replace(config, **changes), shape, gpus, room).fits

    budget = max(config.token_budget // 2, config.max_prompt + config.max_response)
    savings = dict(gradient_checkpointing=True, token_budget=budget, slots=0, kl_coef=0, freeze_vision=True,
                   lora_rank=16)  # the cheapest first; the last three change the training
    ways, subsets = [], [{}]
    for name, value in savings.items():  # subsets without a dearer setting come before all that have it
        if getattr(config, name) != value:
            subsets += [subset | {name: value} for subset in subsets]
    if chosen := next((subset for subset in subsets if fits(subset)), None):
        ways.append("with " + " ".join(f"--{name} {value}" for name, value in chosen.items()))
    if enough := next((gpus * 2**n for n in range(1, 11) if fits({}, gpus * 2**n)), None):
        ways.append(f"on {enough} such GPUs as it is")
    return " or ".join(ways) or "on no number of such GPUs: take a smaller model, --max_prompt or --max_response"


def table(config, shape: Shape, gpus: int, room: float) -> str:
    """The plan as text: GB per GPU, what fits, the slots, and the flag to change when it does not fit."""
    plan = make_plan(config, shape, gpus, room)
    lines = [f"memory plan, computed: stage {config.stage}, {shape.total / 1e9:.2f} B parameters "
             f"({shape.vision / 1e9:.2f} B vision), {gpus} x {room / GB:.0f} GB, GB on each GPU"]
    for phase, rows in plan.phases.items():
        lines += [f"  {phase:<9} {name:<72} {size / GB:7.2f}" for name, size in rows.items()]
    lines += [f"  {'peak of ' + phase:<82} {peak / GB:7.2f}" for phase, peak in plan.peaks.items()]
    lines.append(f"  {f'usable, {USABLE:.0%} of {room / GB:.0f} GB':<82} {USABLE * room / GB:7.2f}")
    slots = f" with {plan.slots} slots" + " (chosen)" * (config.slots == 0) if "rollout" in plan.phases else ""
    lines.append("fits" + slots if plan.fits else "does not fit; fits " + advice(config, shape, gpus, room))
    return "\n".join(lines)


# ------------------------------------------------------------------------------- living within it


def choose_slots(config, shape: Shape, device: torch.device, planned: float) -> int:
    """The slots of this run: as asked for, or as many as fit beside `planned` bytes; on a CPU nothing is planned."""
    if device.type == "cpu":
        return config.slots or max(CPU_SLOTS, config.group_size)
    room = USABLE * torch.cuda.get_device_properties(device).total_memory
    return config.slots or most_slots(config, shape, room - planned) or config.group_size


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
