"""Draw a token per row from its logits: temperature, forbidden tokens and an exact top-p nucleus, without sorting.

The rule is that of ops.py's `draw`: the tokens stand in a line, each as long as its probability, and a uniform number
u points to one of them. With top_p = 1 they stand in the order of the vocabulary; with less, the likeliest first (equal
ones by index) and the line ends with the token that brings its length to top_p.

The kernel (one program per row) knows tokens by their weight w = p / p_max, a float in [0, 1]. Positive floats are in
the order of the integers with the same bits, so a threshold is an integer from 1 (any weight above 0) to ONE (weight
1). Let M(t) be the sum of all weights whose bits are at least t. M never grows with t, in floating point either: the
same numbers are added in the same order, or zeros in their place, and rounding keeps the order of sums. So both
    t_end   the last token's weight: the largest t with M(t) >= top_p M(1)
    t_u     the drawn token's weight: the largest t with M(t) > u N, N the nucleus' length
are found by search: a pass over the row evaluates M at 7 thresholds and leaves an eighth of the interval, so 10 passes
leave one integer of 2^30. A row of 152 thousand logits is 608 KB: half of 128 rows fit into the L2 of an H100. Several
tokens may have exactly the weight w found. Before them lies A = M(t + 1), so a token with c equals before it
    is in the nucleus if A + c w < top_p M(1)        begins before the point u N, or at it, if A + c w <= u N
and the last token of which both hold is drawn. In the order of the vocabulary that is the last token before which lies
at most u M(1).

Symbols: B rows, V vocabulary.
"""
import math

import torch
import triton
import triton.language as tl


# --------------------------------------------------------------------------------------- the kernel

LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)  # stands for -inf: 2^LOWEST is 0 as well, but LOWEST - LOWEST is 0 where inf - inf is nan
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
PARTS = tl.constexpr(8)  # of the interval, in a pass: 10 passes of 7 sums are less work than 15 of 3 or 8 of 15

WARPS = 32  # with as many rows as multiprocessors each has one program: all the threads that a program can have
BLOCK = 4096  # 4 logits a thread, one 128-bit load


@triton.jit
def _weights(logits, forbidden, columns, scale, top, V: tl.constexpr):
    """Weights of some columns; 0 for a forbidden token and beyond the row.

    The difference comes before the factor: fused into one operation, the other way round would put weights above 1.
    """
    x = tl.load(logits + columns, mask=columns < V, other=LOWEST)
    banned = tl.load(forbidden + columns, mask=columns < V, other=1)
    return tl.exp2(tl.where(banned == 0, x - top, LOWEST) * scale)


@triton.jit
def _sums(logits, forbidden, scale, top, low, step, V: tl.constexpr, BLOCK: tl.constexpr):
    """M(low + step), M(low + 2 step), .., M(low + 7 step) in one pass."""
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero)
    for start in range(0, V, BLOCK):
        w = _weights(logits, forbidden, start + tl.arange(0, BLOCK), scale, top, V)
        bits = w.to(tl.int32, bitcast=True)
        more = ()
        for k in tl.static_range(PARTS - 1):
            more = more + (sums[k] + tl.where(bits >= low + (k + 1) * step, w, 0.0),)
        sums = more
    totals = ()
    for k in tl.static_range(PARTS - 1):
        totals = totals + (tl.sum(sums[k], 0),)
    return totals


@triton.jit
def _search(logits, forbidden, scale, top, low, goal, V: tl.constexpr, BLOCK: tl.constexpr):
    """The largest t with M(t) >= goal, and M(t + 1). goal is given as bits; M(low) is taken to reach it."""
    high = tl.full((), ONE + 1, tl.int32)  # the smallest threshold known not to reach it
    above = 0.0  # M(high)
    while high - low > 1:
        start = low
        step = (high - low + PARTS - 1) // PARTS
        sums = _sums(logits, forbidden, scale, top, start, step, V, BLOCK)
        for k in tl.static_range(1, PARTS):
            t = start + k * step
            reached = sums[k - 1].to(tl.int32, bitcast=True) >= goal
            first = (reached == 0) & (t < high)
            low = tl.where(reached, t, low)
            above = tl.where(first, sums[k - 1], above)
            high = tl.where(first, t, high)
    return low, above


@triton.jit
def _masses(logits, forbidden, columns, scale, top, bits, V: tl.constexpr, EQUAL: tl.constexpr):
    """What `_pick` adds up: a 1 for each token of exactly the weight with these bits, or the weights themselves."""
    w = _weights(logits, forbidden, columns, scale, top, V)
    if EQUAL:
        w = tl.where(w.to(tl.int32, bitcast=True) == bits, 1.0, 0.0)
    return w


@triton.jit
def _pick(logits, forbidden, scale, top, bits, most, V: tl.constexpr, EQUAL: tl.constexpr, BLOCK: tl.constexpr):
    """The last token with a mass, in the order of the vocabulary, before which lies a mass of at most `most`."""
    found = 0
    seen = 0.0  # mass of the blocks so far
    before = 0.0  # of those before the block that holds the token
    for start in range(0, V, BLOCK):
        mass = tl.sum(_masses(logits, forbidden, start + tl.arange(0, BLOCK), scale, top, bits, V, EQUAL), 0)
        here = (mass > 0) & (seen <= most)
        found = tl.where(here, start, found)
        before = tl.where(here, seen, before)
        seen += mass
    columns = found + tl.arange(0, BLOCK)
    mass = _masses(logits, forbidden, columns, scale, top, bits, V, EQUAL)
    inside = (mass > 0) & (before + (tl.cumsum(mass, 0) - mass) <= most)
    return tl.max(tl.where(inside, columns, 0), 0)


@triton.jit
def _sample_kernel(logits, forbidden, uniform, tokens, logprobs, scale, stride, top_p, V: tl.constexpr,
                   NUCLEUS: tl.constexpr, BLOCK: tl.constexpr):
    """One row: the token drawn, and its log-prob among all tokens, forbidden ones too."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    m = tl.full((BLOCK,), LOWEST, tl.float32)  # online logsumexp, as in logprob.py
    l = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), LOWEST, tl.float32)  # of the allowed tokens
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=LOWEST)
        banned = tl.load(forbidden + columns, mask=columns < V, other=1)
        best = tl.maximum(best, tl.where(banned == 0, x, LOWEST))
        higher = tl.maximum(m, x)
        l = l * tl.exp2((m - higher) * scale) + tl.exp2((x - higher) * scale)
        m = higher
    highest = tl.max(m, 0)
    l = tl.sum(l * tl.exp2((m - highest) * scale), 0)
    top = tl.max(best, 0)
    u = tl.load(uniform + row)
    total = _sums(logits, forbidden, scale, top, 0, 1, V, BLOCK)[0]  # M(1), summed as the search sums
    bits = 0
    most = u * total
    if NUCLEUS:
        goal = tl.maximum((top_p * total).to(tl.int32, bitcast=True), 1)
        end, above = _search(logits, forbidden, scale, top, tl.full((), 1, tl.int32), goal, V, BLOCK)  # t_end
        w = end.to(tl.float32, bitcast=True)
        count = tl.ceil((top_p * total - above) / w)  # how many tokens of weight w are in the nucleus
        target = u * (above + count * w)
        goal = target.to(tl.int32, bitcast=True) + 1  # the next float: what is more than the target reaches it
        bits, before = _search(logits, forbidden, scale, top, end, goal, V, BLOCK)  # t_u
        most = (target - before) / bits.to(tl.float32, bitcast=True)
        most = tl.where(bits == end, tl.minimum(most, count - 1), most)
    token = _pick(logits, forbidden, scale, top, bits, most, V, NUCLEUS, BLOCK)
    x = tl.load(logits + token)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, ((x - highest) * scale - tl.log2(l)) * LN2)


def sample_tokens(logits, forbidden, uniform, temperature, top_p):
    """logits (B, V) float32, forbidden (V,) bool, uniform (B,) float32 in [0, 1) -> tokens (B,), log-probs (B,).

    The temperature is above 0. The log-probs are those of softmax(logits / temperature) over all tokens, before
    anything is left out.
    """
    B, V = logits.shape
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(B, dtype=torch.float32, device=logits.device)
    _sample_kernel[(B,)](logits, forbidden, uniform.contiguous(), tokens, logprobs, math.log2(math.e) / temperature,
                         logits.stride(0), float(top_p), V=V, NUCLEUS=top_p < 1, BLOCK=BLOCK, num_warps=WARPS)
    return tokens, logprobs
