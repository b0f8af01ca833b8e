"""Log-probabilities and entropies of chosen tokens, straight from hidden states and the head's weight, with gradients.

    z = hidden @ weight.T / T                              (N, V) logits, never alive for more than one chunk of tokens
    lse = log sum_v exp(z_v)
    logprob = z_target - lse                                                                     Eq. LOGPROB
    entropy = -sum_v p_v ln p_v = lse - sum_v p_v z_v      p_v = exp(z_v - lse)                  Eq. ENTROPY

Full fp32 logits of 16 thousand tokens over a vocabulary of 152 thousand are 10 GB; a chunk of 2,048 tokens is 1.2 GB.

Forward, one pass over a row. In units of log2 (y = z log2 e, because the hardware computes 2^x) a thread keeps of what
it has seen the maximum m, l = sum 2^(y - m) and s = sum 2^(y - m) (y - m). A new maximum M rescales them exactly:
    a = 2^(m - M)        l <- a l + sum 2^(y - M)        s <- a (s + (m - M) l) + sum 2^(y - M) (y - M)
and so do two partial results when they merge. With everything relative to the maximum nothing cancels at the end:
    lse2 = m + log2 l        logprob = ln2 (y_target - m - log2 l)        entropy = ln2 (log2 l - s / l)

Backward, with g = dL/dlogprob and u = dL/dentropy. From dlogprob/dz_v = [v = target] - p_v and
dentropy/dz_v = -p_v (ln p_v + entropy):
    D_v = dL/d(T z_v) = (1/T) ([v = target] g - p_v (g + u (ln p_v + entropy)))                  Eq. DLOGITS
    dhidden = D @ weight        dweight = D.T @ hidden        (a row of D sums to 0: a constant added to z is no change)

The matrix products are the library's. Their operands are bf16, their results fp32: a product of two bf16 numbers is
exact in fp32, so this is an fp32 head at the speed of bf16 tensor cores. The rest is two kernels with one program per
row; D is rounded to bf16 and written over the logits it comes from. Two ways to run them (one product = 2NHV flops):
    linear_logprob          any loss of (logprobs, entropies); the backward computes the logits again: 4 products
    linear_logprob_loss     the loss is a sum over tokens, so its gradient is known in the forward:    3 products

Symbols: N response tokens (prompt and image tokens never reach the head), H hidden size, V vocabulary, T temperature.
"""
import math

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from kernels.ops import CHUNK, multiply


# -------------------------------------------------------------------- the two kernels, a row each

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)  # stands for -inf: 2^LOWEST is 0 as well, but 0 * LOWEST is 0 where 0 * -inf is nan

LANES = 512  # of a tile of LANES x WIDTH logits; with 8 warps 2 lanes a thread, so two loads are on their way at once
WIDTH = 4  # fp32 logits in one 128-bit load; a lane reduces them without asking its neighbours
WARPS = 8  # 256 threads of at most 32 registers: 8 programs, so all 2,048 threads of a multiprocessor are in use


@triton.jit
def _statistics_kernel(logits, targets, logprobs, entropies, lse2s, scale, stride,
                       V: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """One read of a row of unscaled logits: its target's log-prob, its entropy, and log2 of its normaliser."""
    row = tl.program_id(0).to(tl.int64)  # a chunk of logits has more than 2^31 bytes
    logits += row * stride
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # (LANES, WIDTH)
    m = tl.full((LANES,), LOWEST, tl.float32)
    l = tl.zeros((LANES,), tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES * WIDTH):
        columns = start + tile
        y = tl.load(logits + columns, mask=columns < V, other=LOWEST) * scale  # (LANES, WIDTH)
        higher = tl.maximum(m, tl.max(y, 1))
        a = tl.exp2(m - higher)
        y -= higher[:, None]
        e = tl.exp2(y)
        s = a * (s + (m - higher) * l) + tl.sum(e * y, 1)
        l = a * l + tl.sum(e, 1)
        m = higher
    top = tl.max(m, 0)  # the lanes merge once, at the end of the row
    a = tl.exp2(m - top)
    s = tl.sum(a * (s + (m - top) * l), 0)
    l = tl.sum(a * l, 0)
    target = tl.load(targets + row)
    valid = (target >= 0) & (target < V)  # a target outside the vocabulary gives nan, not what lies beside the row
    y = tl.load(logits + target, mask=valid, other=float("nan")) * scale
    tl.store(logprobs + row, (y - top - tl.log2(l)) * LN2)
    tl.store(entropies + row, (tl.log2(l) - s / l) * LN2)
    tl.store(lse2s + row, top + tl.log2(l))


@triton.jit
def _dlogits_kernel(logits, dlogits, targets, lse2s, entropies, dlogprobs, dentropies, scale, stride, dstride,
                    V: tl.constexpr, BLOCK: tl.constexpr):
    """Eq. DLOGITS for a row, written over it. Block k of bf16 covers bytes 2 BLOCK k to 2 BLOCK (k + 1), the fp32
    logits of block k // 2: read in an earlier round unless k is 0, and the barrier makes "earlier" hold for all warps.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dlogits += row * dstride
    target = tl.load(targets + row).to(tl.int32)
    lse2 = tl.load(lse2s + row)
    entropy = tl.load(entropies + row)
    g = tl.load(dlogprobs + row) * (scale * LN2)  # scale is log2 e / T
    u = tl.load(dentropies + row) * (scale * LN2)
    block = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        columns = start + block
        y = tl.load(logits + columns, mask=columns < V, other=LOWEST) * scale - lse2  # log2 p
        d = tl.where(columns == target, g, 0.0) - tl.exp2(y) * (g + u * (y * LN2 + entropy))  # Eq. DLOGITS
        tl.debug_barrier()
        tl.store(dlogits + columns, d.to(dlogits.dtype.element_ty), mask=columns < V)


def row_statistics(logits, targets, temperature, logprobs, entropies, lse2s):
    """Fill three (n,) float32 tensors from unscaled float32 logits (n, V)."""
    n, V = logits.shape
    _statistics_kernel[(n,)](logits, targets, logprobs, entropies, lse2s, LOG2E.value / temperature, logits.stride(0),
                             V=V, LANES=LANES, WIDTH=WIDTH, num_warps=WARPS)


def dlogits_in_place(logits, targets, temperature, lse2s, entropies, dlogprobs, dentropies, dtype):
    """Overwrite float32 logits (n, V) with their gradient; returns it as a (n, V) view of that memory in `dtype`."""
    n, V = logits.shape
    dlogits = logits.view(dtype)[:, :V]  # (n, V), in bf16 the first half of each row's bytes
    _dlogits_kernel[(n,)](logits, dlogits, targets, lse2s, entropies, dlogprobs.float().contiguous(),
                          dentropies.float().contiguous(), LOG2E.value / temperature, logits.stride(0),
                          dlogits.stride(0), V=V, BLOCK=LANES * WIDTH, num_warps=WARPS)
    return dlogits


# ---------------------------------------------------------------------- chunks and matrix products


def chunk_logits(hidden, weight, chunk):
    """Yield (rows, their float32 unscaled logits (n, V)) of every chunk of tokens, all in one buffer of 4 C V bytes."""
    N, V = len(hidden), len(weight)
    buffer = hidden.new_empty(min(N, chunk), V, dtype=torch.float32)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        yield rows, multiply(hidden[rows], weight.T, buffer[: rows.stop - start])


def empty_gradients(hidden, weight, chunk, needs):
    """Where the gradients of hidden and weight go, None for one not needed; chunks of dweight add up in float32."""
    dhidden = hidden.new_empty(hidden.shape) if needs[0] else None
    dtype = weight.dtype if len(hidden) <= chunk else torch.float32
    dweight = weight.new_empty(weight.shape, dtype=dtype) if needs[1] else None
    return dhidden, dweight.zero_() if needs[1] and len(hidden) == 0 else dweight


def add_gradients(dlogits, rows, hidden, weight, dhidden, dweight):
    """One chunk's part of both gradients; the first chunk overwrites what is in dweight."""
    if dhidden is not None:
        multiply(dlogits, weight, dhidden[rows])
    if dweight is not None:
        multiply(dlogits.T, hidden[rows], dweight, add=rows.start > 0)


class LinearLogprob(torch.autograd.Function):
    """Keeps nothing of size V between forward and backward."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        logprobs, entropies, lse2s = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))  # (N,)
        for rows, logits in chunk_logits(hidden, weight, chunk):
            row_statistics(logits, targets[rows], temperature, logprobs[rows], entropies[rows], lse2s[rows])
        ctx.save_for_backward(hidden, weight, targets, lse2s, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs, dentropies):
        hidden, weight, targets, lse2s, entropies = ctx.saved_tensors
        dhidden, dweight = empty_gradients(hidden, weight, ctx.chunk, ctx.needs_input_grad)
        for rows, logits in chunk_logits(hidden, weight, ctx.chunk):
            dlogits = dlogits_in_place(logits, targets[rows], ctx.temperature, lse2s[rows], entropies[rows],
                                       dlogprobs[rows], dentropies[rows], hidden.dtype)
            add_gradients(dlogits, rows, hidden, weight, dhidden, dweight)
        logits = dlogits = None  # gives the chunk's memory back before dweight is cast
        return dhidden, None if dweight is None else dweight.to(weight.dtype), None, None, None


class LinearLogprobLoss(torch.autograd.Function):
    """Computes both gradients in the forward, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, loss_fn, temperature, chunk, differentiate):
        needs = [differentiate and need for need in ctx.needs_input_grad[:2]]
        logprobs, entropies, lse2s = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))  # (N,)
        dhidden, dweight = empty_gradients(hidden, weight, chunk, needs)
        loss = hidden.new_zeros((), dtype=torch.float32)
        for rows, logits in chunk_logits(hidden, weight, chunk):
            row_statistics(logits, targets[rows], temperature, logprobs[rows], entropies[rows], lse2s[rows])
            with torch.set_grad_enabled(any(needs)):
                inputs = [x[rows].detach().requires_grad_(any(needs)) for x in (logprobs, entropies)]
                part = loss_fn(*inputs, rows).sum()
            loss += part.detach()
            if any(needs):
                slopes = torch.autograd.grad(part, inputs, materialize_grads=True)  # dL/dlogprob, dL/dentropy
                dlogits = dlogits_in_place(logits, targets[rows], temperature, lse2s[rows], entropies[rows], *slopes,
                                           hidden.dtype)
                add_gradients(dlogits, rows, hidden, weight, dhidden, dweight)
        logits = dlogits = None  # gives the chunk's memory back before dweight is cast
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        ctx.mark_non_differentiable(logprobs, entropies)
        return loss, logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *unused):
        return *(None if gradient is None else gradient * dloss for gradient in ctx.saved_tensors), *[None] * 5


# ------------------------------------------------------------------------------------- what is called


def linear_logprob(hidden, weight, targets, temperature=1.0, chunk=CHUNK):
    """hidden (N, H), weight (V, H), both bfloat16 or float32, targets (N,) int64 -> logprobs (N,), entropies (N,).

    Float32, differentiable in hidden and weight. A target outside 0 .. V - 1 gives nan.
    """
    return LinearLogprob.apply(hidden, weight, targets.contiguous(), temperature, chunk)


def linear_logprob_loss(hidden, weight, targets, loss_fn, temperature=1.0, chunk=CHUNK):
    """Inputs as above -> loss (), and logprobs (N,) and entropies (N,) without gradient.

    loss_fn(logprobs (n,), entropies (n,), rows: slice of the N tokens) -> losses of these tokens (n,) or their sum; it
    is called once per chunk. Whether gradients are wanted is read here: inside a Function autograd is always off.
    """
    return LinearLogprobLoss.apply(hidden, weight, targets.contiguous(), loss_fn, temperature, chunk,
                                   torch.is_grad_enabled())
