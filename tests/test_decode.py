"""The sampler's two kernels against float64: interpreted on a CPU, compiled where there is a GPU (-m gpu)."""
import math

import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels or to compile them")

import torch

from kernels import decode, ops, sample
from triton_interpreter import device_fixture


device = device_fixture(decode, sample)
HEADS = {"3B": (16, 2, 128), "7B": (28, 4, 128), "demo": (4, 2, 32), "tiny": (4, 1, 16), "not grouped": (2, 2, 64)}
ATTENTION_ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # outputs are below 4, where bf16 rounds by up to 2^-7
EDGE = 2e-6  # how far float32 sums put the edges of a token's interval from where they are

# ------------------------------------------------------------------------------------------ attention


def rows(device, S, heads, kv_heads, D, L, dtype, spread=1.0, seed=0):
    """A query per row and a cache of random keys and values."""
    g = torch.Generator().manual_seed(seed)
    query = spread * torch.randn(S, heads, 1, D, generator=g)
    keys, values = torch.randn(2, S, kv_heads, L, D, generator=g)
    return [x.to(device, dtype) for x in (query, keys, values)]


def exact_attention(query, keys, values, length, scale):
    """Each row and head on its own, in float64, over the live keys alone."""
    S, heads, _, D = query.shape
    out = torch.zeros(S, 1, heads, D, dtype=torch.float64)
    for s, n in enumerate(length.tolist()):
        for head in range(heads if n else 0):
            group = head * keys.shape[1] // heads
            key, value = (x[s, group, :n].cpu().double() for x in (keys, values))  # (n, D)
            out[s, 0, head] = (key @ query[s, head, 0].cpu().double() * scale).softmax(0) @ value
    return out


def check_attention(query, keys, values, length, scale):
    length = torch.tensor(length, device=query.device)
    found = decode.decode_attention(query, keys, values, length, scale)
    expected = exact_attention(query, keys, values, length, scale)
    assert found.shape == expected.shape and found.dtype == query.dtype
    assert float((found.cpu().double() - expected).abs().max()) <= ATTENTION_ERROR[query.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", HEADS)
def test_attention_equals_float64_for_any_length(device, name, dtype):
    """No key, one, the edges of a tile (32, 64, 128) and of a program (128), all but one, all; beside each other."""
    heads, kv_heads, D = HEADS[name]
    lengths = [0, 1, 32, 65, 127, 128, 129, 299, 300] if D < 128 else [0, 65, 128, 129]
    inputs = rows(device, len(lengths), heads, kv_heads, D, max(lengths), dtype)
    check_attention(*inputs, lengths, D**-0.5)


def test_a_row_is_split_and_merged(device):
    """5,000 keys: programs of 256, the next power of two of 5,000 / 32; 20 of them, of which 1 to 20 have keys."""
    assert decode.tile_sizes(2, 5000, 16, 4) == (128, 256)
    check_attention(*rows(device, 3, 2, 1, 16, 5000, torch.float32), [5000, 257, 3], 0.25)


def test_large_scores_neither_overflow_nor_vanish(device):
    """Scores have standard deviation 1,000: each softmax has one key, found in any of the programs."""
    check_attention(*rows(device, 4, 4, 2, 16, 300, torch.float32, spread=1000.0), [300, 300, 299, 150], 0.25)


def test_what_lies_beyond_a_row_is_not_read(device):
    query, keys, values = rows(device, 3, 4, 2, 32, 150, torch.float32)
    for row, n in enumerate((0, 5, 140)):
        keys[row, :, n:] = values[row, :, n:] = math.nan
    check_attention(query, keys, values, [0, 5, 140], 0.2)


def test_the_beginning_of_a_longer_cache_will_do(device):
    query, keys, values = rows(device, 3, 4, 2, 32, 150, torch.float32)
    check_attention(query, keys[:, :, :64], values[:, :, :64], [64, 1, 40], 0.2)


@pytest.mark.parametrize("pairs, D, number_bytes, expected", [
    (256, 128, 2, (64, 512)), (256, 128, 4, (32, 512)), (16, 128, 2, (64, 128)), (256, 16, 4, (128, 512))])
def test_the_plan_depends_on_shapes_alone(pairs, D, number_bytes, expected):
    """16 KB of keys at once; programs of 512 keys, of 128 where there are few; at most 32 to a row."""
    assert decode.tile_sizes(pairs, 4096, D, number_bytes) == expected
    assert decode.tile_sizes(pairs, 100_000, D, number_bytes) == (expected[0], 4096)


@pytest.mark.parametrize("name", HEADS)
def test_on_a_cpu_the_reference_is_picked_and_equals_float64(name):
    heads, kv_heads, D = HEADS[name]
    inputs, length = rows("cpu", 4, heads, kv_heads, D, 70, torch.float64), torch.tensor([1, 9, 69, 70])
    torch.testing.assert_close(ops.decode_attention(*inputs, length, 0.1), exact_attention(*inputs, length, 0.1))


# -------------------------------------------------------------------------------------------- drawing

LOGITS = {  # (B, V) from a generator
    "random": lambda B, V, g: 3 * torch.randn(B, V, generator=g),
    "flat": lambda B, V, g: 0.01 * torch.randn(B, V, generator=g),
    "peaked": lambda B, V, g: torch.randn(B, V, generator=g) + 14.0 * (torch.rand(B, V, generator=g) < 2 / V),
    "tied": lambda B, V, g: torch.randint(-3, 4, (B, V), generator=g).float(),
    "all equal": lambda B, V, g: torch.full((B, V), 2.5),
}


def drawing(device, name, B, V, seed=0):
    """Logits, a tenth of the vocabulary forbidden, and uniform numbers with both ends of [0, 1)."""
    g = torch.Generator().manual_seed(seed)
    logits, forbidden, uniform = LOGITS[name](B, V, g), torch.rand(V, generator=g) < 0.1, torch.rand(B, generator=g)
    forbidden[0] = False  # not all of a tiny vocabulary
    uniform[:2] = torch.tensor([0.0, 1 - 2**-24])
    return logits.to(device), forbidden.to(device), uniform.to(device)


def check_drawing(inputs, temperature, top_p):
    """Each token's interval, in float64, holds the point its uniform number names, and it is in the nucleus."""
    tokens, logprobs = (x.cpu() for x in sample.sample_tokens(*inputs, temperature, top_p))
    logits, forbidden, uniform = (x.cpu() for x in inputs)
    z = logits.double() / temperature
    expected = z.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-5, rtol=0)
    assert not forbidden[tokens].any()
    probs, order = z.masked_fill(forbidden, -torch.inf).softmax(-1), torch.arange(z.shape[1]).expand_as(z)
    if top_p < 1:
        probs, order = probs.sort(descending=True, stable=True)
    before = probs.cumsum(-1) - probs
    place = (order == tokens[:, None]).int().argmax(-1, keepdim=True)  # where in the line the token stands
    start, p = (x.gather(-1, place)[:, 0] for x in (before, probs))
    shorter, longer = ((probs * (before < top_p + edge)).sum(-1) for edge in (-EDGE, EDGE))
    assert bool((start < top_p + EDGE).all()) and bool((p > 0).all())
    assert bool((start <= uniform * longer + EDGE).all()) and bool((uniform * shorter <= start + p + EDGE).all())


@pytest.mark.parametrize("name, top_p, temperature", [
    *((name, *setting) for name in LOGITS for setting in [(1.0, 1.0), (0.99, 1.2), (0.5, 0.7)]),
    ("peaked", 1e-6, 1.0), ("tied", 1e-6, 1.0)])
def test_the_token_is_the_one_that_the_uniform_number_points_to(device, name, top_p, temperature):
    check_drawing(drawing(device, name, 3, 1000), temperature, top_p)


@pytest.mark.parametrize("name, top_p", [("random", 0.99), ("tied", 0.7), ("flat", 1.0)])
def test_several_blocks_with_a_ragged_end(device, name, top_p):
    check_drawing(drawing(device, name, 3, 9001), 1.0, top_p)


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_one_row_of_a_real_vocabulary(device, top_p):
    logits, forbidden, uniform = drawing(device, "random", 3, 151_936)
    check_drawing((2 * logits[2:], forbidden, uniform[2:]), 1.2, top_p)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_same_tokens_as_draw(device, top_p):
    """Not one of 8 draws lies within rounding of an edge here, so all have to be equal."""
    inputs = drawing(device, "random", 8, 50)
    found, expected = sample.sample_tokens(*inputs, 1.2, top_p), ops.sample_tokens_ref(*inputs, 1.2, top_p)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=5e-6, rtol=0)


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_cpu_the_likeliest_come_first_as_in_a_stable_sort(name, dtype):
    """Forbidden tokens have probability 0 and stay in line, equal ones by index."""
    logits, forbidden, _ = drawing("cpu", name, 5, 700)
    probs = logits.to(dtype).masked_fill(forbidden, -torch.inf).softmax(-1)
    for found, expected in zip(ops.likeliest_first(probs), probs.sort(stable=True, dim=-1, descending=True)):
        assert torch.equal(found, expected)


def test_ties_go_by_index_and_the_nucleus_ends_among_them(device):
    """Five tokens of weight 1 and one of e^-9, top_p .5: 2.50006 tokens reach it, so 1, 3, 4 share [0, 1) equally."""
    logits = torch.tensor([[-9.0, 0, -torch.inf, 0, 0, 0, 0]], device=device).expand(6, -1).contiguous()
    uniform = torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, 1 - 2**-24], device=device)
    tokens, _ = sample.sample_tokens(logits, torch.zeros(7, dtype=torch.bool, device=device), uniform, 1.0, 0.5)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("top_p", [1.0, 0.99])
def test_forbidden_tokens_are_never_drawn_however_likely(device, top_p):
    """They are e^200 times as likely as the others, which still share the line as without them."""
    logits, forbidden, uniform = drawing(device, "random", 4, 300)
    tokens, logprobs = sample.sample_tokens(logits + 200 * forbidden, forbidden, uniform, 1.0, top_p)
    assert torch.equal(tokens, ops.sample_tokens_ref(logits, forbidden, uniform, 1.0, top_p)[0])
    assert logprobs.max() < -150


@pytest.mark.parametrize("top_p, n, shares", [(1.0, 20, [0.3, 0.15, 0.1, 0.05, 0.4]),
                                              (0.8, 10, [0.3 / 0.85, 0.15 / 0.85, 0, 0, 0.4 / 0.85])])
def test_evenly_spaced_numbers_draw_each_token_in_proportion(device, top_p, n, shares):
    """Each count is within 1 of n times the token's share of the nucleus, and 0 outside of it."""
    logits = torch.tensor([0.3, 0.15, 0.1, 0.05, 0.4], device=device).log().expand(n, -1).contiguous()
    uniform = (torch.arange(n, device=device) + 0.5) / n
    tokens, _ = sample.sample_tokens(logits, torch.zeros(5, dtype=torch.bool, device=device), uniform, 1.0, top_p)
    counts = torch.bincount(tokens.cpu(), minlength=5)
    assert all(abs(count - n * share) <= 1 for count, share in zip(counts.tolist(), shares)), counts
    assert all((count > 0) == (share > 0) for count, share in zip(counts.tolist(), shares))


def test_temperature_zero_is_argmax_with_the_log_probs_at_one(device):
    logits, forbidden, uniform = drawing(device, "random", 6, 300)
    tokens, logprobs = ops.sample_tokens(logits + 50 * forbidden, forbidden, uniform, 0.0, 0.9)
    assert torch.equal(tokens, logits.masked_fill(forbidden, -torch.inf).argmax(-1))
    expected = (logits + 50 * forbidden).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_nan_among_the_logits_gives_a_token_of_the_vocabulary_and_a_nan(device, top_p):
    """A number outside would stop the GPU at the next embedding; the nan stops the run with a message."""
    logits, forbidden, uniform = drawing(device, "random", 4, 300)
    logits[:, 7] = math.nan
    tokens, logprobs = sample.sample_tokens(logits, forbidden, uniform, 1.0, top_p)
    assert bool(((tokens >= 0) & (tokens < 300)).all()) and bool(logprobs.isnan().all())
