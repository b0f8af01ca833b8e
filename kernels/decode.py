"""Attention of one new token per row over a static key-value cache, each row reading only the keys that it has.

    y_j = scale q.k_j log2 e                         score of key j < n in units of log2, n = length of the row
    out = sum_j 2^(y_j - lse) v_j                    lse = log2 sum_j 2^y_j; without a key (n = 0) out = 0

Decoding is bound by reading the cache: each key is read once for the R query heads that share it. Few rows have fewer
(row, kv head) pairs than there are multiprocessors, and all wait for the longest row; so a row is split, and program c
of a pair reads the keys from cC to (c + 1)C alone. It keeps the maximum m of its scores so far, l = sum 2^(y - m) and
a = sum 2^(y - m) v; a new maximum M rescales what it has exactly (online softmax):
    l <- 2^(m - M) l + sum 2^(y - M)        a <- 2^(m - M) a + sum 2^(y - M) v
and leaves out_c = a / l, lse_c = m + log2 l. A second kernel merges the parts by their share of the sum:
    out = sum_c w_c out_c        w_c = 2^(lse_c - lse)        lse = log2 sum_c 2^lse_c
A program whose keys do not exist ends at once and is not merged, so the grid depends on the size of the cache alone:
one captured CUDA graph serves rows of all lengths, and a row of length 0 costs next to nothing.

Symbols: S rows, L length of the cache, n live keys of a row, D head size, R query heads to a kv head, C keys to a
program.
"""
import math

import torch
import triton
import triton.language as tl


LOWEST = tl.constexpr(-1e30)  # stands for -inf: 2^LOWEST is 0 as well, but LOWEST - LOWEST is 0 where inf - inf is nan
ROWS = 16  # the fewest rows of a tensor core's product; R is 8 (3B) or 7 (7B), so half of them are idle
TILE_BYTES = 16384  # of keys that are loaded at once, and of values: two stages of both leave room for two programs
MULTIPROCESSORS = 132  # of an H100 or H200; 108 of an A100
WARPS = 8  # of a program; with 4 the float32 tiles would not fit into registers
MOST_PARTS = 32  # of a row: the merge holds 32 x 128 floats in the registers of 8 warps

# ----------------------------------------------------------------------------------- the two kernels


@triton.jit
def _part_kernel(query, keys, values, lengths, parts, lses, scale, stride, R: tl.constexpr, ROWS: tl.constexpr,
                 D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: CHUNK keys of one row and kv head -> out_c (R, D) and lse_c (R,) of the heads that share them."""
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = part * CHUNK
    end = tl.minimum(first + CHUNK, tl.load(lengths + slot).to(tl.int32))
    if first >= end:
        return
    pair = (slot * tl.num_programs(1) + head).to(tl.int64)  # a cache has more than 2^31 bytes
    keys += pair * stride
    values += pair * stride
    r, d = tl.arange(0, ROWS), tl.arange(0, D)
    rows = pair * R + r  # of all S * heads
    q = tl.load(query + rows[:, None] * D + d[None, :], mask=(r < R)[:, None], other=0.0)  # (ROWS, D)
    m = tl.full((ROWS,), LOWEST, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    a = tl.zeros((ROWS, D), tl.float32)
    for start in range(first, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        inside = j < end
        k = tl.load(keys + j[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)  # (BLOCK, D)
        v = tl.load(values + j[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        y = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (ROWS, BLOCK), not in tf32
        y = tl.where(inside[None, :], y, LOWEST)
        higher = tl.maximum(m, tl.max(y, 1))
        e = tl.exp2(y - higher[:, None])
        shrink = tl.exp2(m - higher)
        l = shrink * l + tl.sum(e, 1)
        a = shrink[:, None] * a + tl.dot(e.to(v.dtype), v, input_precision="ieee")
        m = higher
    places = rows * tl.num_programs(2) + part
    tl.store(parts + places[:, None] * D + d[None, :], a / l[:, None], mask=(r < R)[:, None])
    tl.store(lses + places, m + tl.log2(l), mask=r < R)


@triton.jit
def _merge_kernel(parts, lses, lengths, out, heads, count, COUNT: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """One program: the parts of one row and query head -> its output (D,). count: programs of a row, COUNT >= it."""
    row = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, COUNT), tl.arange(0, D)
    live = c * CHUNK < tl.load(lengths + row // heads)  # the others were never written
    lse = tl.load(lses + row * count + c, mask=live, other=LOWEST)
    w = tl.exp2(lse - tl.max(lse, 0))
    part = tl.load(parts + (row * count + c)[:, None] * D + d[None, :], mask=live[:, None], other=0.0)  # (COUNT, D)
    merged = tl.sum((w / tl.sum(w, 0))[:, None] * part, 0)
    tl.store(out + row * D + d, merged.to(out.dtype.element_ty))


# ------------------------------------------------------------------------------------ what is called


def tile_sizes(pairs: int, L: int, D: int, bytes_per_number: int) -> tuple[int, int]:
    """(keys in a tile, keys in a program) for `pairs` (row, kv head) pairs over a cache of length L."""
    block = min(max(TILE_BYTES // (D * bytes_per_number), 16), 128)
    # 512 keys of a head are 256 KB, beside which a part of 4 KB is little; few pairs need more, shorter programs
    chunk = 512 if pairs >= MULTIPROCESSORS else 128
    return block, max(chunk, triton.next_power_of_2(triton.cdiv(L, MOST_PARTS)))


def decode_attention(query, keys, values, length, scale):
    """query (S, heads, 1, D), keys and values (S, kv heads, L, D), length (S,) int64 -> (S, 1, heads, D).

    Row s sees keys 0 .. length[s] - 1. All of one dtype, bfloat16 or float32; sums are float32. D is a power of two, 16
    or more. Keys and values may be the first L of longer caches. What is launched depends on shapes alone.
    """
    S, heads, _, D = query.shape
    kv_heads, L = keys.shape[1:3]
    assert D >= 16 and D & (D - 1) == 0, f"{D=} is not a power of two, 16 or more"
    assert heads % kv_heads == 0 and heads // kv_heads <= ROWS, f"{heads=} {kv_heads=}"
    assert keys.stride() == values.stride() == (kv_heads * keys.stride(1), keys.stride(1), D, 1), f"{keys.stride()=}"
    block, chunk = tile_sizes(S * kv_heads, L, D, keys.element_size())
    count = triton.cdiv(L, chunk)
    parts = query.new_empty(S, heads, count, D, dtype=torch.float32)
    lses = query.new_empty(S, heads, count, dtype=torch.float32)
    out = query.new_empty(S, 1, heads, D)
    _part_kernel[(S, kv_heads, count)](
        query.contiguous(), keys, values, length, parts, lses, scale * math.log2(math.e), keys.stride(1),
        R=heads // kv_heads, ROWS=ROWS, D=D, CHUNK=chunk, BLOCK=block, num_warps=WARPS)
    _merge_kernel[(S * heads,)](parts, lses, length, out, heads, count, COUNT=triton.next_power_of_2(count), D=D,
                                CHUNK=chunk, num_warps=WARPS)
    return out
