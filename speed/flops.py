"""How many floating-point operations a GRPO step needs, and how many this machine can do: for utilisation figures.

Counted is what the mathematics needs of packed groups: each prompt once, attention only where a query may look, the
head for response tokens alone, a multiplication and an addition as two. What is computed again (gradient checkpointing,
a prompt that was cut off from some of its responses) is not counted, nor are norms, softmax or rope.

    forward F    one pass over prompts and responses; the rollout needs the same products, token by token
    log-probs    2 F: old and reference policy
    update       3 F: forward, and two products for each of its products backward
"""
import time

import torch

PEAKS = {"H100": 989e12, "H200": 989e12}  # dense bf16 of the SXM modules, by the maker's data sheets


def text_flops(config, prompt_length: int, response_lengths: list[int]) -> float:
    """The decoder and its head over one group: a prompt once, its G responses behind it."""
    H, P, N = config.hidden_size, prompt_length, sum(response_lengths)
    D = getattr(config, "head_dim", None) or H // config.num_attention_heads
    Q = config.num_attention_heads * D
    weights = 2 * H * Q + 2 * H * config.num_key_value_heads * D + 3 * H * config.intermediate_size  # of a layer
    seen = P * (P + 1) / 2 + sum(n * P + n * (n + 1) / 2 for n in response_lengths)  # pairs of query and key
    return config.num_hidden_layers * (2 * weights * (P + N) + 4 * Q * seen) + 2 * N * H * config.vocab_size


def vision_flops(config, height: int, width: int) -> float:
    """Qwen2.5-VL's vision tower over one image of height x width patches: blocks see windows of them, a few see all."""
    H, merged, side = config.hidden_size, config.spatial_merge_size**2, config.window_size // config.patch_size
    patches, pixels = height * width, config.in_channels * config.temporal_patch_size * config.patch_size**2
    tiles = [[min(side, length - start) for start in range(0, length, side)] for length in (height, width)]
    windowed = sum((a * b) ** 2 for a in tiles[0] for b in tiles[1])  # pairs within the windows
    full = len(config.fullatt_block_indexes)
    seen = full * patches**2 + (config.depth - full) * windowed
    block = 4 * H * H + 3 * H * config.intermediate_size
    merger = (merged * H) ** 2 + merged * H * config.out_hidden_size
    return 2 * patches * (config.depth * block + pixels * H + merger / merged) + 4 * H * seen


def forward_flops(config, prompt_length: int, grid, response_lengths: list[list[int]]) -> float:
    """F of Q groups whose prompts are of one length, each with an image of `grid` (time, height, width) patches."""
    image = vision_flops(config.vision_config, *grid[1:])
    return sum(text_flops(config.text_config, prompt_length, lengths) + image for lengths in response_lengths)


def peak_flops(device: str, given: float | None = None) -> tuple[float, str]:
    """Operations per second that this machine can do, and where the figure comes from; `given` is in Tflop/s."""
    if given:
        return given * 1e12, "given with --peak_tflops"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for gpu, peak in PEAKS.items():
        if gpu in name:
            return peak, f"data sheet of {gpu}, dense bf16"
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ b).sum().item()  # .item() waits for the GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"best of 6 products of {n} x {n} matrices in {str(dtype).split('.')[1]}, this run"
