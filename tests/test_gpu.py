"""What only a GPU can show of attention, the policy and the sampler: flash attention in 16 bits, and CUDA graphs.

    python -m pytest -m gpu                everything that needs a GPU, the kernels' tests included

Each test also runs on a CPU, on what takes the GPU's place there; that is how its own lines were tried.
"""
import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels or to compile them")

import torch

from compile_kernels import CARDS, CASES, passed_limits
from engine import policy as policy_module
from engine import sampler
from engine.policy import Layout, Policy, attention, choose_loss, pack, varlen
from engine.sampler import Decoder, Slots, generate
from engine.sampler import sync
from tape import record
from data import seed_of
from triton_interpreter import CUDA


VARLEN_ERROR = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}  # relative, of a whole tensor; bf16 on a CPU: 7e-3


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture
def sixteen(device):
    """The dtype of training: bfloat16 on a GPU. On a CPU float32, so that no mistake can hide behind rounding."""
    return torch.bfloat16 if device == "cuda" else torch.float32


# ----------------------------------------------------------------------------------------- attention


def exact_attention(query, key, value, queries, keys, causal, scale):
    """Float64, a segment and a head at a time. query (T, heads, D), queries and keys: index lists -> (T, heads, D)."""
    out = torch.zeros_like(query)
    for rows, columns in zip(queries, keys):
        for head in range(query.shape[1]):
            group = head * key.shape[1] // query.shape[1]
            scores = query[rows, head] @ key[columns, group].T * scale  # (n, m)
            if causal:  # the last query sees the last key
                late = torch.arange(len(columns)) > torch.arange(len(rows))[:, None] + len(columns) - len(rows)
                scores = scores.masked_fill(late, -torch.inf)
            out = out.index_put((torch.tensor(rows), torch.tensor(head)), scores.softmax(-1) @ value[columns, group])
    return out


def close(found, expected, dtype):
    error = float((found.detach().cpu().double() - expected).norm() / expected.norm())
    assert error <= VARLEN_ERROR[dtype], error


def check_attention(heads, kv_heads, D, T, segments, causal, device, dtype):
    """The output and the gradients of query, key and value of `attention`, against float64 of the same numbers."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(T, n, D, generator=g).to(dtype) for n in (heads, kv_heads, kv_heads)]
    slope, scale = torch.randn(T, heads, D, generator=g).to(dtype), D**-0.5
    leaves = [x.to(device, copy=True).requires_grad_() for x in inputs]
    exact = [x.to(torch.float64, copy=True).requires_grad_() for x in inputs]
    queries, keys = zip(*segments)
    cu_q, cu_k = (torch.tensor([0, *map(len, part)]).cumsum(0).int().to(device) for part in (queries, keys))
    sizes = (cu_q, cu_k, max(map(len, queries)), max(map(len, keys)))
    batch = [x.transpose(0, 1)[None] for x in leaves]  # (1, heads, T, D), as transformers' layers call it
    if causal:
        layout = Layout(*sizes, torch.tensor(sum(keys, []), device=device))
        out, _ = attention(None, *batch, None, seen=layout, scaling=scale)
    else:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        out, _ = attention(None, *batch, None, scaling=scale, **dict(zip(names, sizes)))
    out[0].backward(slope.to(device))
    expected = exact_attention(*exact, queries, keys, causal, scale)
    expected.backward(slope.double())
    assert out.shape == (1, T, heads, D) and out.dtype == dtype
    close(out[0], expected.detach(), dtype)
    for leaf, other in zip(leaves, exact):
        close(leaf.grad, other.grad, dtype)


@pytest.mark.parametrize("heads, kv_heads, D", [(16, 2, 128), (28, 4, 128), (4, 2, 32)], ids=["3B", "7B", "demo"])
def test_packed_attention_shares_prompts_and_aligns_at_the_end(device, sixteen, heads, kv_heads, D):
    """Two prompts of 70 and 1 tokens with responses of 5, 130 and 1, and 3: more keys than queries, grouped heads."""
    lengths, start, segments = [(70, (5, 130, 1)), (1, (3,))], 0, []
    for prompt, responses in lengths:
        prefix, start = list(range(start, start + prompt)), start + prompt
        segments.append((prefix, prefix))
        for n in responses:
            own, start = list(range(start, start + n)), start + n
            segments.append((own, prefix + own))
    check_attention(heads, kv_heads, D, start, segments, True, device, sixteen)


@pytest.mark.parametrize("heads, D", [(16, 80), (4, 24)], ids=["3B and 7B", "demo"])
def test_vision_attention_stays_in_its_windows(device, sixteen, heads, D):
    """Head size 80, no causality; windows of 64, 16, 4 and 100 patches."""
    ends, segments = (0, 64, 80, 84, 184), []
    for first, last in zip(ends, ends[1:]):
        segments.append((list(range(first, last)),) * 2)
    check_attention(heads, heads, D, 184, segments, False, device, sixteen)


def test_decoding_attention_is_that_of_the_last_query_of_a_causal_row(device, sixteen):
    """One row of 200 tokens through the packed path, its last query again through the cache of the decoding path."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 200, 128, generator=g).to(device, sixteen) for n in (28, 4, 4))
    ends = torch.tensor([0, 200], dtype=torch.int32, device=device)
    layout = Layout(ends, ends, 200, 200, torch.arange(200, device=device))
    whole, _ = attention(None, query, key, value, None, seen=layout,
                         scaling=128**-0.5)
    length = torch.tensor([200], device=device)
    last, _ = attention(None, query[:, :, -1:].contiguous(), key, value, None, seen=length, scaling=128**-0.5)
    close(last[:, 0], whole[:, -1].cpu().double(), sixteen)


class Pretended(torch.Tensor):
    """Numbers of the CPU that say of themselves that they are on a GPU."""

    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("capability, flash", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_before_ampere_attends_over_segments_as_a_cpu_does_and_says_so(monkeypatch, capability, flash):
    """bf16, segments of 3 and 2 queries that see 3 and 5 keys. Later cards call flash attention and say nothing."""
    called, said = [], []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda *args, **options: called.append(options))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(policy_module, "backend", lambda device: "triton")
    monkeypatch.setattr(policy_module, "check_linear_logprob", lambda device: None)
    query, key, value = (torch.randn(n, 2, 16).bfloat16() for n in (5, 8, 8))
    rest = (torch.tensor([0, 3, 5]).int(), torch.tensor([0, 3, 8]).int(), 3, 5, True, 0.25)
    found = varlen(*(x.as_subclass(Pretended) for x in (query, key, value)), *rest)
    assert bool(called) == flash
    assert flash or torch.equal(found, varlen(query, key, value, *rest))
    choose_loss(None, "off", "cuda", said.append)
    assert len(said) == 1 + (not flash) and ("no flash attention" in said[-1]) != flash


def test_a_kernel_that_takes_more_than_a_card_has_or_spills_is_named():
    """80 KB are too much everywhere, 70 KB for a T4 alone; 1,024 threads of 72 registers are 73,728."""
    fine = dict(kernel="merge", registers=64, shared=4096, spills=0, stack=0)
    assert not any(passed_limits(fine | dict(arch=arch), 32) for arch in CARDS)
    assert {arch for arch in CARDS if passed_limits(fine | dict(arch=arch, shared=80_000), 8)} == set(CARDS)
    assert {arch for arch in CARDS if passed_limits(fine | dict(arch=arch, shared=70_000), 8)} == {75}
    assert passed_limits(fine | dict(arch=90, registers=65), 32) == ["merge for 90: 65 registers in 1024 threads"]
    spilling = fine | dict(spills=3)
    names = {(name, arch) for name, *_ in CASES for arch in CARDS
             if not passed_limits(spilling | dict(kernel=name, arch=arch), 4)}
    assert names == {("decode 3B bf16", 75), ("decode 7B bf16", 75)}


# ---------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)],
                         ids=str)
def test_the_patch_embedding_is_transformers_convolution(tiny_folder, prompts, dtype, rounding):
    """The convolution in float64 of the same numbers; output and the weight's gradient, relative."""
    patches = Policy.load(tiny_folder, "cpu", dtype).model.visual.patch_embed
    exact = Policy.load(tiny_folder, "cpu", torch.float64).model.visual.patch_embed
    exact.load_state_dict(patches.state_dict())
    pixels = torch.cat([prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]).to(dtype)
    results = []
    for module, forward, x in ((patches, patches.__call__, pixels),
                               (exact, lambda x: type(exact).forward(exact, x), pixels.double())):
        out = forward(x)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out).to(out.dtype))
        results.append((out, module.proj.weight.grad))
    for found, expected in zip(*results):
        assert found.shape == expected.shape and found.dtype == dtype
        assert float((found.double() - expected).detach().norm() / expected.detach().norm()) <= rounding


@pytest.fixture
def vocab_size(processor):
    return len(processor.tokenizer)


def gradients(tiny_folder, packed, device, dtype):
    """Log-probs of the tiny policy and the gradient of their sum in all parameters, as one vector."""
    policy = Policy.load(tiny_folder, device, dtype)
    logprobs, _ = policy(packed)
    logprobs.sum().backward()
    flat = [x.grad.reshape(-1).double().cpu() for _, x in sorted(policy.named_parameters()) if x.grad is not None]
    return logprobs.detach().cpu(), torch.cat(flat)


def test_packed_logprobs_and_gradients_of_16_bits_are_those_of_float32_on_a_cpu(tiny_folder, prompts, device):
    """Images and text, two responses each. bfloat16 on a CPU differs by .07 and .017 in this rough tiny model."""
    groups = [(prompt, [[5, 6, 7, 8], [9, 10]]) for prompt in prompts]
    expected = gradients(tiny_folder, pack(groups), "cpu", torch.float32)
    found = gradients(tiny_folder, pack(groups, device), device, torch.bfloat16)
    assert (found[0] - expected[0]).abs().mean() <= 0.2
    assert torch.cosine_similarity(found[1], expected[1], dim=0) >= 0.95


# --------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "eager"])
def test_greedy_tokens_of_float32_are_those_of_a_cpu(tiny_folder, prompts, vocab_size, device, graphs):
    """Ten responses of 20 tokens through four slots: prefills between replays."""
    found = generate(Policy.load(tiny_folder, device).eval(), prompts, [0] * 5, 2, 20, 0.0, 1.0, 4, vocab_size, graphs)
    expected = generate(Policy.load(tiny_folder, "cpu").eval(), prompts, [0] * 5, 2, 20, 0.0, 1.0, 4, vocab_size)
    assert [[r.ids for r in reply] for reply in found] == [[r.ids for r in reply] for reply in expected]


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.2, 0.9)])
def test_captured_bursts_draw_what_eager_bursts_draw(tiny_folder, prompts, vocab_size, device, sixteen, temperature,
                                                     top_p):
    replica = Policy.load(tiny_folder, device, sixteen).eval()
    seeds = [seed_of(1, i) for i in range(5)]
    captured, eager = (generate(replica, prompts, seeds, 4, 25, temperature, top_p, 8, vocab_size, graphs)
                       for graphs in (True, False))
    assert [[r.ids for r in reply] for reply in captured] == [[r.ids for r in reply] for reply in eager]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.2, 0.9)])
def test_sampled_logprobs_equal_a_full_forward(tiny_folder, prompts, vocab_size, device, temperature, top_p):
    """In float32, where nothing but the order of sums differs; it takes the decode and the sample kernel on a GPU."""
    replica = Policy.load(tiny_folder, device).eval()
    replies = generate(replica, prompts, [seed_of(1, i) for i in range(5)], 4, 25, temperature, top_p, 8, vocab_size)
    with torch.no_grad():
        packed = pack([(p, [r.ids for r in reply]) for p, reply in zip(prompts, replies)], device)
        logprobs, _ = replica(packed, temperature)
    sampled = torch.tensor([x for reply in replies for response in reply for x in response.logprobs])
    torch.testing.assert_close(sampled, logprobs.cpu(), atol=5e-4, rtol=0)


@torch.no_grad()
def test_a_captured_burst_sees_new_weights_after_sync(tiny_folder, prompts, vocab_size, device, sixteen, monkeypatch):
    """Captured, replayed, weights changed and copied in, replayed: each time what an eager burst draws."""
    if device == "cpu":
        monkeypatch.setattr(sampler, "capture", record)
    policy, replica = Policy.load(tiny_folder, device), Policy.load(tiny_folder, device, sixteen).eval()
    policy.reshard = list  # this one is not sharded
    decoders = [Decoder(replica, Slots(replica, 4, 64 + 16, 16), 1.0, 1.0, vocab_size) for _ in range(2)]
    bursts = [sampler.capture(decoders[0]), decoders[1].burst]
    drawn = []
    for factor in (1.0, 1.5):
        for parameter in policy.parameters():
            parameter.mul_(factor)
        sync(policy, replica)
        for burst, decoder in zip(bursts, decoders):
            numbers = torch.rand(4, 16, generator=torch.Generator().manual_seed(5))
            decoder.prefill(prompts[:2], [[0, 1], [3, 2]], numbers)
            burst()
            drawn.append(decoder.state.ids.tolist())
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0] != drawn[2]


@pytest.mark.parametrize("device", [CUDA])
def test_nothing_of_cache_and_graph_is_left_after_generate(tiny_folder, prompts, vocab_size, device, sixteen):
    """Memory in use after a second call is that after the first, which leaves the libraries' workspaces behind."""
    replica, used = Policy.load(tiny_folder, device, sixteen).eval(), []
    for _ in range(2):
        generate(replica, prompts, [0] * 5, 2, 9, 1.0, 0.9, 4, vocab_size)
        used.append(torch.cuda.memory_allocated())
    assert used[1] <= used[0]
