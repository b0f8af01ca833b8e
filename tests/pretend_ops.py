"""Attention over segments and matrix products as a GPU wants them, and what of both a CPU lacks, computed on one.

The functions that compute stand in for operations of torch, with their arguments in their order.
"""
import torch
from torch import Tensor


def check_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, window):
    """What flash attention asks (flash_api.cpp: mha_varlen_fwd), and what it takes on trust. RuntimeError: not so."""
    rules = {
        "(T, heads, D) with a contiguous last axis": all(x.dim() == 3 and x.stride(-1) == 1 for x in (q, k, v)),
        "16 bits, all of one dtype": q.dtype == k.dtype == v.dtype and q.dtype.itemsize == 2,
        "keys and values of one shape, heads as large as the queries'": k.shape == v.shape and q.shape[2] == k.shape[2],
        "a head size of at most 256, a multiple of 8": q.shape[2] <= 256 and q.shape[2] % 8 == 0,
        "query heads a multiple of key heads": q.shape[1] % k.shape[1] == 0,
        "cu_seq contiguous, of int32": all(x.dtype == torch.int32 and x.is_contiguous() for x in (cu_q, cu_k)),
        "as many segments of queries as of keys": cu_q.shape == cu_k.shape and len(cu_q) > 1,
        "the window of causal or of full attention": tuple(window) == ((-1, 0) if causal else (-1, -1)),
    }
    for name, cu, most, x in (("q", cu_q, max_q, q), ("k", cu_k, max_k, k)):  # believed: longer ones are cut in silence
        lengths = cu.diff().tolist()
        rules[f"max_{name} no less than the longest of {lengths}"] = max(lengths) <= most
        rules[f"cu_seq_{name} from 0 up to {len(x)}"] = cu[0] == 0 and sum(lengths) == len(x) and min(lengths) >= 0
    for rule, holds in rules.items():
        if not holds:
            raise RuntimeError(f"varlen_attn: wants {rule}")


def segments(q, k, v, cu_q, cu_k, causal, scale):
    """For each segment its rows and columns, its float32 queries, keys and values, and the shares (heads, n, m)."""
    for first, last, left, right in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]):
        query = q[first:last].float()  # (n, heads, D)
        key, value = (x[left:right].float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        if causal:  # the last query sees the last key
            late = torch.ones(scores.shape[1:], dtype=torch.bool).triu(right - left - (last - first) + 1)
            scores = scores.masked_fill(late, -torch.inf)
        yield slice(first, last), slice(left, right), query, key, value, scores.softmax(-1)


def attend(q, k, v, cu_q, cu_k, max_q, max_k, causal=False, scale=None, window=(-1, -1)):
    """torch_attn._varlen_attn: the output; what its backward would need is not needed here."""
    check_attention(q, k, v, cu_q, cu_k, max_q, max_k, causal, window)
    outs = [torch.einsum("hqk,khd->qhd", share, value)
            for *_, value, share in segments(q, k, v, cu_q, cu_k, causal, scale)]
    return torch.cat(outs).to(q.dtype), torch.zeros(q.shape[1], len(q)), torch.zeros(2)


def attend_backward(slope, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, rng, scale=None, window=(-1, -1)):
    """torch_attn._varlen_attn_backward: the gradients of q, k and v."""
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for rows, columns, query, key, value, share in segments(q, k, v, cu_q, cu_k, causal, scale):
        above = slope[rows].float()
        dshare = torch.einsum("qhd,khd->hqk", above, value)
        dscore = share * (dshare - (share * dshare).sum(-1, keepdim=True)) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", dscore, key)
        for grad, left, right in ((dk, dscore, query), (dv, share, above)):
            wide = torch.einsum("hqk,qhd->khd", left, right)
            grad[columns] = wide.unflatten(1, (k.shape[1], -1)).sum(2)  # the heads that share a key add up
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def check_product(name, *args, out=None, **unused):
    """mm, addmm, bmm, baddbmm, with out_dtype or without (Blas.cpp). RuntimeError: dtypes that cuBLAS does not take."""
    *added, a, b = [x for x in args if isinstance(x, Tensor)]
    dtype = next((x for x in args if isinstance(x, torch.dtype)), a.dtype)
    results = [str(x.dtype) for x in (*added, *([] if out is None else [out]))]
    if a.dtype != b.dtype or set(results) - {str(dtype)}:
        raise RuntimeError(f"{name}: mixed dtypes, {a.dtype} @ {b.dtype} to {dtype} in {results}")
    if dtype != a.dtype and (dtype, a.dtype.itemsize) != (torch.float32, 2):
        raise RuntimeError(f"{name}: no product of {a.dtype} gives {dtype}")


def product(*args, out, **unused):
    """mm.dtype_out and addmm.dtype_out: factors of 16 bits multiply without rounding in float32."""
    *added, a, b, dtype = args
    return out.copy_(a.to(dtype) @ b.to(dtype) + (added[0] if added else 0))
