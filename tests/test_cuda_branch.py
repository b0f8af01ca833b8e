"""The GPU's branch without a GPU: what it computes is what the CPU's does, and what a GPU would refuse is refused."""
import itertools
import json
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels")

import torch

import train
from data import seed_of
from engine import policy as policies
from engine import sampler
from engine.policy import Policy, pack
from engine.sampler import Decoder, generate
from kernels import decode, grpo, logprob, sample
from pretend_cuda import GPU, Cuda, on_cpu, pretend_cuda
from test_gpu import check_attention
from test_train import compare_metrics, largest_difference, questions, stage_1, weights

__all__ = ["questions"]  # a fixture: rows of stage 1


@pytest.fixture
def waits(monkeypatch):
    """A pretended GPU whose bursts are short, because Triton's interpreter takes milliseconds for each program."""
    monkeypatch.setattr(sampler, "BURST", 2)
    monkeypatch.setattr(sample, "BLOCK", 512)
    with pretend_cuda(decode, grpo, logprob, sample) as waits:
        yield waits


# ----------------------------------------------------------------------------------- the pretended GPU itself


def test_its_tensors_say_where_they_are_and_share_memory_with_the_cpu(waits):
    x = torch.zeros(2, 3, device="cuda")
    assert x.is_cuda and x.device == GPU and x.new_ones(2).is_cuda and torch.ones_like(x).is_cuda
    x[0] = torch.arange(3, device=GPU)
    assert x.sum(1).tolist() == [3, 0] and on_cpu(x).device.type == x.cpu().device.type == "cpu"
    weight = torch.nn.Parameter(x.clone())
    (2 * weight).sum().backward()
    assert weight.grad.is_cuda and weight.grad.tolist() == [[2.0] * 3] * 2
    assert (x * torch.tensor(2.0)).is_cuda  # a number on the CPU may meet it


def vector(n=3, dtype=torch.float32, device=GPU):
    return torch.ones(n, dtype=dtype, device=device)


def matrix(dtype=torch.float32, device=GPU):
    return torch.ones(3, 3, dtype=dtype, device=device)


REFUSED = [
    ("aten.add.Tensor: a CPU tensor", lambda: vector() + vector(device="cpu")),
    ("aten.index.Tensor: a CPU tensor", lambda: vector()[torch.tensor([0, 2])]),
    ("aten.index.Tensor: a CPU tensor", lambda: vector(device="cpu")[torch.tensor([0, 2], device=GPU)]),
    ("aten.index_put_.default: a CPU tensor", lambda: vector().index_put_((torch.tensor([0]),), vector(1))),
    ("aten.cat.default: a CPU tensor", lambda: torch.cat([vector(), vector(device="cpu")])),
    ("aten.mm.out: a CPU tensor", lambda: torch.mm(matrix(), matrix(), out=matrix(device="cpu"))),
    ("aten.mm.default: mixed dtypes", lambda: matrix() @ matrix(torch.bfloat16)),
    ("aten.mm.dtype_out: mixed dtypes", lambda: torch.mm(matrix(torch.bfloat16), matrix(), out_dtype=torch.float32,
                                                         out=matrix())),
    ("aten.mm.dtype_out: mixed dtypes", lambda: torch.mm(matrix(torch.bfloat16), matrix(torch.bfloat16),
                                                         out_dtype=torch.float32, out=matrix(torch.bfloat16))),
    ("aten.mm.dtype_out: no product of torch.float32 gives torch.float64", lambda: torch.mm(
        matrix(), matrix(), out_dtype=torch.float64, out=matrix(torch.float64))),
    ("_grpo_kernel: a CPU tensor", lambda: grpo.grpo_loss(*[vector()] * 4, vector(device="cpu"), 0.2, 0.3, 3.0, 0.01)),
]


@pytest.mark.parametrize("message, operation", REFUSED)
def test_a_mixture_is_refused_and_the_operation_named(waits, message, operation):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        operation()


def varlen(change):
    """Three segments of 4, 1 and 3 queries over 5, 1 and 6 keys, with one thing changed."""
    from torch.nn.attention.varlen import varlen_attn

    q, k = (torch.ones(n, heads, 8, dtype=torch.bfloat16, device=GPU) for n, heads in ((8, 4), (12, 2)))
    arguments = dict(query=q, key=k, value=k.clone(), cu_seq_q=torch.tensor([0, 4, 5, 8], dtype=torch.int32, device=GPU),
                     cu_seq_k=torch.tensor([0, 5, 6, 12], dtype=torch.int32, device=GPU), max_q=4, max_k=6, scale=1.0)
    return varlen_attn(**arguments | {name: function(arguments[name]) for name, function in change.items()})


@pytest.mark.parametrize("rule, change", [
    ("16 bits", dict(query=Cuda.float)),
    ("16 bits", dict(value=Cuda.half)),
    ("a contiguous last axis", dict(query=lambda q: q.transpose(1, 2).contiguous().transpose(1, 2))),
    ("a head size", dict(query=lambda q: q[..., :7].contiguous(), key=lambda k: k[..., :7].contiguous(),
                         value=lambda v: v[..., :7].contiguous())),
    ("query heads a multiple", dict(query=lambda q: q[:, :3])),
    ("cu_seq contiguous, of int32", dict(cu_seq_q=Cuda.long)),
    ("as many segments", dict(cu_seq_q=lambda cu: cu[1:])),
    ("max_k no less than the longest", dict(max_k=lambda most: most - 1)),
    ("cu_seq_k from 0 up to 12", dict(cu_seq_k=lambda cu: cu - 1)),
])
def test_what_flash_attention_would_not_take_is_refused(waits, rule, change):
    varlen({})
    with pytest.raises(RuntimeError, match=f"^varlen_attn: wants .*{rule}"):
        varlen(change)


# -------------------------------------------------------------------- what runs there equals what a CPU computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, D, causal", [(16, 2, 128, True), (28, 4, 128, True), (16, 16, 80, False)],
                         ids=["3B", "7B", "vision"])
def test_attention_is_that_of_float64(waits, heads, kv_heads, D, causal, dtype):
    """Output and gradients. A prompt of 5 tokens and responses of 3 and 1, or windows of 5, 3 and 1 patches."""
    prompt, rest = list(range(5)), ([5, 6, 7], [8])
    segments = [(prompt, prompt), *((own, prompt + own if causal else own) for own in rest)]
    check_attention(heads, kv_heads, D, 9, segments, causal, GPU, dtype)


def score(tiny_folder, prompts, device, dtype, checkpointing=False):
    """Log-probs of 6 tokens to each prompt, and the gradient of their sum in all parameters, both on the CPU."""
    policy = Policy.load(tiny_folder, device, dtype)
    policy.prepare_training(False, checkpointing)
    logprobs, _ = policy(pack([(prompt, [[5, 6, 7, 8], [9, 10]]) for prompt in prompts], device))
    logprobs.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert all(isinstance(x, Cuda) == (device == GPU) for x in (logprobs, *gradients, *policy.buffers()))
    return on_cpu(logprobs).detach(), torch.cat([on_cpu(gradient).flatten().float() for gradient in gradients])


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policy_in_float32_is_that_of_a_cpu(tiny_folder, prompts, waits, checkpointing):
    ours, exact = (score(tiny_folder, prompts, device, torch.float32, checkpointing) for device in (GPU, "cpu"))
    assert max(map(error, ours, exact)) <= 1e-5


def test_the_policy_in_bfloat16_is_as_near_to_float32_as_on_a_cpu(tiny_folder, prompts, waits):
    ours, theirs = (score(tiny_folder, prompts, device, torch.bfloat16) for device in (GPU, "cpu"))
    exact = score(tiny_folder, prompts, "cpu", torch.float32)
    for found, other, expected in zip(ours, theirs, exact):
        print(error(found, expected), error(other, expected))
        assert error(found, expected) <= 1.5 * error(other, expected)
