"""Each operation in plain torch, and the function that the trainer calls: it picks Triton on a GPU, torch elsewhere.

A Triton file is imported where a GPU needs it, inside the function that picks it: macOS and Windows have no Triton. The
torch references are what a CPU runs and what the tests compare the kernels with.

Symbols: N response tokens, H hidden size, V vocabulary, B or S rows that decode together, L length of a cache.
"""
import os
import shutil
import sysconfig

import numpy
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


CHUNK = 2048  # tokens whose logits are alive at once: 1.2 GB; dweight is read and written once per chunk, so not fewer


def backend(device) -> str:
    """What computes log-probs and losses on this device: "triton 3.6.0" or "torch 2.11.0"; the caller prints it once.

    ValueError, one line: a GPU without Triton, or without the compiler and header that Triton's first launch needs.
    """
    if torch.device(device).type != "cuda":
        return f"torch {torch.__version__}"
    try:
        import triton
    except ImportError as error:
        raise ValueError("a GPU needs Triton, which is not installed here: pip install -r requirements.txt on Linux; "
                         "on Windows, do so within WSL") from error
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang", "cc"))):
        raise ValueError("Triton needs a C compiler at its first launch: apt install gcc")
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        raise ValueError("Triton needs Python.h at its first launch: apt install python3-dev")
    return f"triton {triton.__version__}"


def on_triton(tensor) -> bool:
    return tensor.is_cuda and tensor.dtype in (torch.bfloat16, torch.float32)  # float64 is for tests: the reference


# --------------------------------------------------------- the head: log-probs and entropies of tokens


def multiply(a, b, out, add=False):
    """out = a @ b, or out += a @ b; accumulated in fp32 and rounded once, to the dtype of `out`."""
    if a.dtype != out.dtype and not a.is_cuda:  # a CPU has no product of mixed dtypes; it is the same to cast before
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def logprob_ref(hidden, weight, targets, temperature):
    """The two equations for one chunk, at least in float32. (N, H), (V, H), (N,) -> logprobs (N,), entropies (N,)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T / temperature  # (N, V)
    log_p = logits.log_softmax(-1)  # (N, V)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)  # Eq. LOGPROB, Eq. ENTROPY


def linear_logprob_ref(hidden, weight, targets, temperature=1.0, chunk=CHUNK):
    """`linear_logprob` without Triton: `logprob_ref` in chunks whose logits the backward computes again."""
    if len(targets) <= chunk:
        return logprob_ref(hidden, weight, targets, temperature)
    chunks = zip(hidden.split(chunk), targets.split(chunk))
    parts = [checkpoint(logprob_ref, h, weight, t, temperature, use_reentrant=False) for h, t in chunks]
    logprobs, entropies = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropies)


def linear_logprob(hidden, weight, targets, temperature=1.0):
    """hidden (N, H), weight (V, H), targets (N,) -> logprobs (N,), entropies (N,); differentiable in the first two."""
    if not on_triton(hidden):
        return linear_logprob_ref(hidden, weight, targets, temperature)
    from kernels import logprob

    return logprob.linear_logprob(hidden, weight, targets, temperature)


def linear_logprob_loss_ref(hidden, weight, targets, loss_fn, temperature=1.0, chunk=CHUNK):
    """`linear_logprob_loss` without Triton: the loss of `linear_logprob_ref`, differentiated by autograd."""
    logprobs, entropies = linear_logprob_ref(hidden, weight, targets, temperature, chunk)
    loss = loss_fn(logprobs, entropies, slice(0, len(targets))).sum()
    return loss, logprobs.detach(), entropies.detach()


def linear_logprob_loss(hidden, weight, targets, loss_fn, temperature=1.0):
    """The same with a loss on top, a quarter cheaper: -> loss, logprobs, entropies, the last two without gradient.

    loss_fn(logprobs (n,), entropies (n,), rows: slice of the N tokens) -> losses of these tokens (n,), or their sum.
    """
    if not on_triton(hidden):
        return linear_logprob_loss_ref(hidden, weight, targets, loss_fn, temperature)
    from kernels import logprob

    return logprob.linear_logprob_loss(hidden, weight, targets, loss_fn, temperature)


def check_linear_logprob(device):
    """Once at start: on a GPU, the two functions above equal their references. ValueError, one line, where not."""
    if torch.device(device).type != "cuda":
        return
    from kernels import logprob, twins

    for reference, twin in ((linear_logprob_ref, logprob.linear_logprob),
                            (linear_logprob_loss_ref, logprob.linear_logprob_loss)):
        found = twins.logprob_difference(reference, twin, device)
        if found:
            raise ValueError(f"kernels/ops.py's {reference.__name__} and kernels/logprob.py's {twin.__name__} are no "
                             f"longer the same ({found}): a change to one of them has to be made in the other")


# -------------------------------------------------------------------------------------- the policy loss


def choose_grpo_loss(reference, fused: str, device, log=print):
    """The loss that a run takes: `reference`, train.py's own, or where both are equal its fused twin in grpo.py.

    reference(logprobs, old_logprobs, ref_logprobs, advantages, weights, clip_ratio_low, clip_ratio_high, clip_ratio_c,
    kl_coef) -> loss, statistics by name; the loss that is returned takes the same nine arguments, by position.
    fused "auto": the twin on a GPU, or one line to `log` and the reference where `twins.grpo_difference` finds any
    difference, so that an edited equation is never ignored; "off": the reference, without a question. "on": the twin.
    ValueError, one line, where "on" meets a difference or a device that is no GPU.
    """
    assert fused in ("auto", "on", "off"), f"{fused=}"
    on_gpu = torch.device(device).type == "cuda"
    if fused == "on" and not on_gpu:
        raise ValueError(f"--fused_loss on: the fused loss needs a CUDA GPU, this is a {torch.device(device).type}; "
                         "leave --fused_loss at auto")
    if fused == "off" or not on_gpu:
        return reference
    from kernels import grpo, twins

    found = twins.grpo_difference(reference, grpo.grpo_loss, device)
    if not found:
        return grpo.grpo_loss
    both = f"train.py's grpo_loss and its fused twin, kernels/grpo.py's grpo_loss, differ ({found})"
    if fused == "on":
        raise ValueError(f"--fused_loss on: {both}; make the same change in both, or use --fused_loss auto")
    log(f"{both}: train.py's runs")
    return reference


# ------------------------------------------------------------------ decoding: attention, logits, drawing


def decode_attention_ref(query, keys, values, length, scale):
    """`decode_attention` without Triton: a mask over all of the cache that is given."""
    S, heads, _, D = query.shape
    reads = torch.arange(keys.shape[2], device=query.device) < length[:, None]  # (S, L)
    # heads that share a key become the query axis: the cache is neither repeated nor copied
    grouped = query.reshape(S, keys.shape[1], heads // keys.shape[1], D)
    out = F.scaled_dot_product_attention(grouped, keys, values, reads[:, None, None], scale=scale)
    return out.reshape(S, 1, heads, D)


def decode_attention(query, keys, values, length, scale):
    """query (S, heads, 1, D), keys and values (S, kv heads, L, D), length (S,) keys to see -> (S, 1, heads, D)."""
    if not on_triton(query):
        return decode_attention_ref(query, keys, values, length, scale)
    from kernels import decode

    return decode.decode_attention(query, keys, values, length, scale)


def linear_logits(hidden, weight):
    """hidden (B, H), weight (V, H) -> logits (B, V), at least float32: the sampler rounds as the training does."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return multiply(hidden, weight.T, hidden.new_empty(len(hidden), len(weight), dtype=dtype))


@torch.library.custom_op("pebr::sort_integers", mutates_args=())  # an operation of torch's, so a burst can be recorded
def sort_integers(keys: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(numpy.sort(keys.numpy()))


def likeliest_first(probs):
    """probs (B, V) in falling order, equal ones by index, and the tokens that have them: two (B, V).

    torch sorts numbers and their indices together, which is slow on a CPU. There one integer is sorted instead, by
    NumPy: the bits of a float that is not negative, which are in the order of the floats, and after them the index.
    """
    if probs.device.type != "cpu" or probs.dtype != torch.float32:
        return probs.sort(stable=True, dim=-1, descending=True)
    last = probs.shape[1] - 1
    keys = (probs.view(torch.int32).long() << 32) + torch.arange(last, -1, -1)  # (B, V)
    keys = sort_integers(keys).flip(-1)
    return (keys >> 32).int().view(torch.float32), last - (keys & 0xFFFFFFFF)


def draw(probs, uniform, top_p):
    """One token per row by inverting the distribution function. probs (B, V), uniform (B,) in [0, 1) -> (B,).

    With top_p below 1 only the nucleus counts: the likeliest tokens, up to the one with which the share reaches top_p.
    """
    order = None
    if top_p < 1:
        probs, order = likeliest_first(probs)
    below = probs.cumsum(-1)  # (B, V) share of a token and all before it
    last = (below < top_p * below[:, -1:]).sum(-1, keepdim=True)  # (B, 1) no token after this one counts
    target = uniform[:, None] * below.gather(-1, last)  # (B, 1)
    index = torch.minimum((below <= target).sum(-1, keepdim=True), last)
    return (index if order is None else order.gather(-1, index))[:, 0]


def sample_tokens_ref(logits, forbidden, uniform, temperature, top_p):
    """`sample_tokens` without Triton. Temperature 0 is argmax, with the log-probs at 1."""
    logits = logits / (temperature or 1.0)
    allowed = logits.masked_fill(forbidden, -torch.inf)
    token = allowed.argmax(-1) if temperature == 0 else draw(allowed.softmax(-1), uniform, top_p)
    return token, logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]


def sample_tokens(logits, forbidden, uniform, temperature, top_p):
    """logits (B, V), forbidden (V,) bool, uniform (B,) in [0, 1) -> tokens (B,), their log-probs (B,)."""
    if temperature == 0 or not on_triton(logits):  # torch has kernels for the largest logit
        return sample_tokens_ref(logits, forbidden, uniform, temperature, top_p)
    from kernels import sample

    return sample.sample_tokens(logits, forbidden, uniform, temperature, top_p)
