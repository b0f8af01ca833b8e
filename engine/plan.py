"""The memory plan: what one GPU holds in each phase of a stage, known before the first step.

    python train.py --stage 1 --plan --gpus 8 --gpu_gb 80                the table, from config.json alone
    plan = make_plan(config, shape_of(model), gpus, room)                what train.py chooses its slots by

    always     master weights, Adam's moments, the sampler's copy of the weights, the reference policy, CLIP
    rollout    + the key-value cache of all slots, reading prompts, drawing tokens
    training   + gradients, gathered weights, and the activations of one packed row at its largest moment

Weights and cache are counted exactly. Activations are what autograd keeps of transformers' layers, added up below per
token; tests/test_plan.py holds them against the allocator's own figures. The row is the worst that can come: as many
prompts with the largest image as fit beside one full chunk of logits.

Symbols: T tokens in the row, N response tokens, p image patches, H hidden size, I width of the MLP (Hv, Iv: of the
vision tower), V vocabulary, b bytes of the compute dtype. GB are 2^30 bytes, as in the size of an "80 GB" GPU.
"""
import dataclasses
from dataclasses import dataclass

import torch

from engine.policy import policy_class
from engine.weights import model_config
from engine.sampler import BURST, PREFILL
from kernels.ops import CHUNK


GB = 2**30
USABLE = 0.92  # of a GPU: the rest is the CUDA context, NCCL's buffers and holes between allocations
MOST_SLOTS = 256  # more rows hardly make decoding faster, and a longer tail of it waits for the last of them
CLIP_PARAMETERS = 428e6  # open_clip's ViT-L-14-336, in float32
PROMPT_TEXT = 100  # tokens of a prompt beside its image: instruction, template, a short question
ADAM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """What of a model the plan needs; counts are numbers of parameters."""

    total: int
    vision: int  # of total
    layer: int  # one decoder layer
    block: int  # one vision block
    root: int  # all that is in neither: embeddings, head, patch embedding, merger, norms
    layers: int
    hidden: int
    mlp: int
    kv: int  # width of the keys of a token: kv heads x head size
    vocab: int
    blocks: int
    vision_hidden: int
    vision_mlp: int
    patch: int  # numbers in a patch


def shape_of(path: str) -> Shape:
    """The shape of a Hugging Face folder, a hub name or a bare config.json; no weight is read. InputError: no model."""
    config = model_config(path)
    with torch.device("meta"):
        policy = policy_class()(config)
    text, vision = config.text_config, config.vision_config
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in {
        "total": policy, "vision": policy.model.visual, "layer": policy.model.language_model.layers[0],
        "block": policy.model.visual.blocks[0]}.items()}
    return Shape(
        **count, root=count["total"] - count["layer"] * text.num_hidden_layers - count["block"] * vision.depth,
        layers=text.num_hidden_layers, hidden=text.hidden_size, mlp=text.intermediate_size,
        kv=text.num_key_value_heads * text.hidden_size // text.num_attention_heads, vocab=text.vocab_size,
        blocks=vision.depth, vision_hidden=vision.hidden_size, vision_mlp=vision.intermediate_size,
        patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)


# ------------------------------------------------------------------------------------ the worst row


@dataclass(frozen=True)
class Row:
    """A packed row: `prompts` prompts of one image each, G responses to each, `response` tokens in all of these."""

    prompts: int
    prompt: int  # tokens of a prompt
    patches: int  # of its image
    response: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.prompt + self.response


def largest_image(config) -> int:
    """Tokens of the largest image that fits into a prompt."""
    return max(1, min(config.max_pixels // 28**2, config.max_prompt - 1))


def worst_row(config) -> Row:
    """As many prompts with the largest image as fit beside one chunk of response tokens. 28 x 28 pixels are a token."""
    image = largest_image(config)
    prompt = min(image + PROMPT_TEXT, config.max_prompt)
    prompts = max(1, (config.token_budget - CHUNK) // (prompt + config.group_size))
    return Row(prompts, prompt, 4 * image, config.token_budget - prompts * prompt)


# -------------------------------------------------------------------------------- bytes, per phase


def always_bytes(config, shape: Shape, gpus: int) -> dict[str, float]:
    """What is there in every phase."""
    b, trained = bytes_of(config), shape.total - shape.vision * config.freeze_vision
    if config.stage == "sample":
        return {"sampler's copy of the weights": b * shape.total}
    rows = {"master weights, fp32": 4 * shape.total / gpus,
            f"Adam's moments, {config.adam_dtype}": 2 * ADAM_BYTES[config.adam_dtype] * trained / gpus}
    if config.stage != "sft":
        rows["sampler's copy of the weights"] = b * shape.total
    if config.stage != "sft" and config.kl_coef > 0 and not config.ref_offload:
        rows["reference policy"] = b * shape.total / gpus
    if config.clip_weight > 0:
        rows["CLIP, fp32"] = 4 * CLIP_PARAMETERS
    return rows


def rollout_bytes(config, shape: Shape, slots: int) -> dict[str, float]:
    """The cache, which exists during a rollout only, and the larger of its two kinds of step."""
    b, length = bytes_of(config), config.max_prompt + config.max_response + BURST
    T, p, Hv = PREFILL + config.max_prompt, 4 * PREFILL, shape.vision_hidden  # at worst every token is an image's
    text = T * ((4 + 2.5 * b) * shape.hidden + 3 * b * shape.mlp)  # a layer's MLP and what it was made of
    vision = p * (patch_bytes(config, shape) + max(36 * Hv, 14 * Hv + 3 * b * shape.vision_mlp))  # its rotation in fp32
    reading = max(text, vision)
    drawing = 4 * 4 * slots * shape.vocab  # logits and, without the kernel, three copies with something done to them
    return {f"key-value cache, {slots} slots x {length} tokens": 2 * b * slots * length * shape.layers * shape.kv,
            "reading prompts, drawing tokens": max(reading, drawing)}


def patch_bytes(config, shape: Shape) -> float:
    """A patch as it comes, in float32, and the copy of it that the patch embedding works on."""
    b = bytes_of(config)
    return shape.patch * (4 + (b if b < 4 else 0))


def head_bytes(N: int, H: int, V: int, b: int, chunk: int = CHUNK) -> float:
    """kernels.logprob with a loss on top: one chunk of fp32 logits, and both gradients; then the weight's is cast."""
    return b * N * H + max(4 * min(N, chunk) * V + 4 * V * H, (4 + b * (b < 4)) * V * H)


def training_bytes(config, shape: Shape, gpus: int) -> dict[str, float]:
    """Gradients, and what one row needs when it needs most.

    What autograd keeps of a decoder layer, per token. Two norms: their fp32 input 4 H and normalised input b H; the
    input of the projections after each b H; queries, attention's result and its copy 3 b H; of the MLP gate, its
    activation, the other half and the product 4 b I; and the gathered keys and values. With gradient checkpointing only
    the layer's input b H is kept, and one layer at a time has all of it. Its backward adds 2 b (H + I). A vision block
    is the same, but for keys and values as wide as the queries and a rotation in fp32.
    """
    b, row, H, V = bytes_of(config), worst_row(config), shape.hidden, shape.vocab
    T, p, Hv = row.tokens, row.prompts * row.patches, shape.vision_hidden
    keys = T + row.prompts * row.prompt * (config.group_size if config.stage != "sft" else 1)
    layer = T * ((8 if b < 4 else 4) * H + 7 * b * H + 4 * b * shape.mlp) + 2 * b * keys * shape.kv
    block = p * (8 * Hv + 12 * b * Hv + 4 * b * shape.vision_mlp)
    layer_step, block_step = T * 2 * b * (H + shape.mlp), p * b * (3.5 * Hv + 2 * shape.vision_mlp)
    if config.gradient_checkpointing:
        layer_step, block_step = layer_step + layer, block_step + block
        layer, block = T * b * H, p * b * Hv
    vision_kept = p * patch_bytes(config, shape)
    merger_kept = 0.0
    if config.freeze_vision:
        block_step = 0.0
    else:
        vision_kept += shape.blocks * block
        merger_kept = p * 17 * Hv  # the merger's norm and MLP, the rotation's tables
    head = head_bytes(row.response, H, V, b) + b * row.response * H  # and the hidden states picked for it
    gathered = b * shape.root + (3 * b + 4) * shape.layer  # two layers' weights, one's gradients and their fp32 sum
    moments = {  # name: (activations, weights that are gathered and their gradients)
        "the head": (shape.layers * layer + T * (4 + 1.5 * b) * H + vision_kept + merger_kept + head,
                     b * (shape.root + 2 * shape.layer)),
        "a decoder layer": (shape.layers * layer + layer_step + vision_kept + merger_kept, gathered + b * V * H),
        "a vision block": (vision_kept + block_step, gathered + b * V * H),
        "the embeddings' gradient": (0.0, (2 * b + 4) * shape.root),
    }
    name, (activations, weights) = max(moments.items(), key=lambda item: sum(item[1]))
    return {"gradients, fp32": 4 * (shape.total - shape.vision * config.freeze_vision) / gpus,
            "gathered weights, their gradients": weights,
            f"activations of {T} tokens, {row.prompts} images, most in {name}": activations}


def bytes_of(config) -> int:
    return getattr(torch, config.dtype).itemsize


# ---------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """Bytes on one GPU by phase and purpose; slots: as asked for, or as many as fit, 0 if not one group does."""

    phases: dict[str, dict[str, float]]
    slots: int
    room: float  # what a GPU has, in bytes

    @property
    def peak(self) -> float:
        always, *others = (sum(rows.values()) for rows in self.phases.values())
        return always + max(others)

    @property
    def fits(self) -> bool:
        return self.slots > 0 and self.peak <= USABLE * self.room


def most_slots(config, shape: Shape, room: float) -> int:
    """Whole groups of slots, at most MOST_SLOTS, whose rollout fits into so many bytes; 0 if not one group does."""
    most = max(MOST_SLOTS // config.group_size, 1)
    return next((groups * config.group_size for groups in range(most, 0, -1)
                 if sum(rollout_bytes(config, shape, groups * config.group_size).values()) <= room), 0)


def make_plan(config, shape: Shape, gpus: int, room: float) -> Plan:
    """Where the memory of one of `gpus` GPUs of `room` bytes goes."""
    always, slots = always_bytes(config, shape, gpus), config.slots
    phases = {"always": always}
    if config.stage == "sft":
        slots = 1
    else:
        slots = slots or most_slots(config, shape, USABLE * room - sum(always.values()))
        phases["rollout"] = rollout_bytes(config, shape, slots or config.group_size)
    if config.stage != "sample":
        phases["training"] = training_bytes(config, shape, gpus)
    return Plan(phases, slots, room)


def savings(config) -> dict:
    """Settings that save memory, by name, the cheapest first; the last changes the training."""
    budget = max(config.token_budget // 2, config.max_prompt + config.max_response)
    values = dict(gradient_checkpointing=True, token_budget=budget, slots=0, ref_offload=True, adam_dtype="bfloat16",
                  freeze_vision=True)
    return {name: value for name, value in values.items() if getattr(config, name) != value}


def fewest_savings(config, shape: Shape, gpus: int, room: float) -> dict:
    """As many of the savings, in their order, as make the plan fit, less those that it then does without; or none."""
    def fits(chosen):
        return make_plan(dataclasses.replace(config, **chosen), shape, gpus, room).fits

    chosen = {}
    for name, value in savings(config).items():
        chosen[name] = value
        if fits(chosen):
            break
    else:
        return {}
    for name in list(chosen):
        others = {other: value for other, value in chosen.items() if other != name}
        if fits(others):
            chosen = others
    return chosen


def advice(config, shape: Shape, gpus: int, room: float) -> str:
    """What to change when a plan does not fit: the fewest savings in their order, and how many GPUs need none."""
    chosen = fewest_savings(config, shape, gpus, room)
    ways = ["with " + " ".join(f"--{name} {value}" for name, value in chosen.items())] if chosen else []
    enough = next((gpus * 2**n for n in range(1, 11) if make_plan(config, shape, gpus * 2**n, room).fits), None)
    if enough:
        ways.append(f"on {enough} such GPUs as it is")
    return " or ".join(ways) or ("on no number of such GPUs: a smaller model is needed, or a smaller --max_prompt, "
                                 "--max_response or --max_pixels")


def table(config, shape: Shape, gpus: int, room: float) -> str:
    """The plan as text: GB per GPU, what fits, the slots, and the flag to change when it does not fit."""
    plan = make_plan(config, shape, gpus, room)
    lines = [f"memory plan, computed: stage {config.stage}, {shape.total / 1e9:.2f} B parameters "
             f"({shape.vision / 1e9:.2f} B vision), {gpus} x {room / GB:.0f} GB, GB on each GPU"]
    for phase, rows in plan.phases.items():
        lines += [f"  {phase:<9} {name:<72} {size / GB:7.2f}" for name, size in rows.items()]
    always = plan.phases["always"]
    for phase, rows in list(plan.phases.items())[1:]:
        total = sum(always.values()) + sum(rows.values())
        lines.append(f"  {'peak of ' + phase:<82} {total / GB:7.2f}")
    lines.append(f"  {f'usable, {USABLE:.0%} of {room / GB:.0f} GB':<82} {USABLE * room / GB:7.2f}")
    if plan.fits:
        chosen = "" if config.stage == "sft" else f" with {plan.slots} slots" + " (chosen)" * (config.slots == 0)
        return "\n".join([*lines, f"fits{chosen}"])
    return "\n".join([*lines, "does not fit; fits " + advice(config, shape, gpus, room)])
