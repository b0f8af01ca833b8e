"""The operations where training spends its memory and sampling its time: Triton on a GPU, plain torch everywhere else.

    logprob.py  log-probs and entropies from hidden states and the head's weight, alone or with a loss on top
    grpo.py     the clipped policy loss; its reference is train.py's `grpo_loss`
    decode.py   attention of one new token per row over a static cache
    sample.py   drawing a token from logits without sorting them

`backend(device)` says in a word which one runs there; the caller prints it once.
"""
import torch
import triton

from kernels import decode, grpo, logprob, sample


__all__ = ["backend", "decode_attention", "linear_logits", "linear_logprob", "linear_logprob_loss", "pick_grpo_loss",
           "sample_tokens"]


def backend(device) -> str:
    """What computes log-probs and losses on this device: "triton 3.6.0" or "torch 2.11.0"."""
    return f"triton {triton.__version__}" if torch.device(device).type == "cuda" else f"torch {torch.__version__}"


def on_triton(hidden) -> bool:
    return hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float32)  # float64 is for tests: the reference


def linear_logits(hidden, weight):
    """hidden (B, H), weight (V, H) -> logits (B, V), at least float32: the sampler rounds as the training does."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return logprob.multiply(hidden, weight.T, hidden.new_empty(len(hidden), len(weight), dtype=dtype))


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """hidden (N, H), weight (V, H), targets (N,) -> logprobs (N,), entropies (N,); differentiable in the first two."""
    function = logprob.linear_logprob if on_triton(hidden) else logprob.linear_logprob_ref
    return function(hidden, weight, targets, temperature)


def linear_logprob_loss(hidden, weight, targets, loss_fn, temperature=1.0):
    """The same with a loss on top, a quarter cheaper: -> loss, logprobs, entropies, the last two without gradient.

    loss_fn(logprobs (n,), entropies (n,), rows: slice of the N tokens) -> losses of these tokens (n,), or their sum.
    """
    function = logprob.linear_logprob_loss if on_triton(hidden) else logprob.linear_logprob_loss_ref
    return function(hidden, weight, targets, loss_fn, temperature)


def pick_grpo_loss(reference, device):
    """The loss kernel on a GPU, `reference` elsewhere; both take the same arguments."""
    return grpo.grpo_loss if torch.device(device).type == "cuda" else reference


def decode_attention(query, keys, values, length, scale):
    """query (S, heads, 1, D), keys and values (S, kv heads, L, D), length (S,) keys to see -> (S, 1, heads, D)."""
    function = decode.decode_attention if on_triton(query) else decode.decode_attention_ref
    return function(query, keys, values, length, scale)


def sample_tokens(logits, forbidden, uniform, temperature, top_p):
    """logits (B, V), forbidden (V,) bool, uniform (B,) in [0, 1) -> tokens (B,), their log-probs (B,)."""
    function = sample.sample_tokens if on_triton(logits) else sample.sample_tokens_ref
    return function(logits, forbidden, uniform, temperature, top_p)
