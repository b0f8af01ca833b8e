"""The sampler against Hugging Face's generate (greedy), a full forward (log-probs) and the distribution asked for."""
import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels or to compile them")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from engine import sampler
from engine.policy import pack
from engine.sampler import Decoder, Slots, capture, generate, stream
from engine.sampler import sync
from kernels import decode, logprob, ops, sample
from kernels.ops import draw, linear_logits
from conftest import both_families
from tape import record
from data import seed_of
from triton_interpreter import interpreted


@pytest.fixture(scope="module")
def vocab_size(processor):
    return len(processor.tokenizer)


@pytest.fixture
def path(request, monkeypatch):
    """How a burst runs: as it stands; recorded once and replayed, as on a GPU; with the Triton kernels, interpreted."""
    if request.param == "replayed":
        monkeypatch.setattr(sampler, "capture", record)
    if request.param != "kernels":
        yield
        return
    monkeypatch.setattr(ops, "on_triton", lambda x: True)
    monkeypatch.setattr(sampler, "BURST", 2)  # the interpreter takes milliseconds for each program
    monkeypatch.setattr(sample, "BLOCK", 512)
    with interpreted(decode, logprob, sample):
        yield


def hf_greedy(model, prompts, max_new_tokens, never):
    """Each prompt alone through Hugging Face's generate; cut after the end token."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        vision = {} if prompt.pixel_values is None else dict(pixel_values=prompt.pixel_values,
                                                             image_grid_thw=prompt.grid_thw)
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            mm_token_type_ids=(ids == model.config.image_token_id).int(), suppress_tokens=never, **vision)
        out.append(tokens[0, ids.shape[1] :].tolist())
    return out


@both_families
@pytest.mark.parametrize("slots, length, path", [(10, 20, "eager"), (4, 20, "eager"), (2, 20, "eager"),
                                                 (4, 20, "replayed"), (10, 4, "kernels")], indirect=["path"])
def test_greedy_equals_hugging_face_generate(tiny_folder, replica, prompts, vocab_size, slots, length, path):
    """Three image shapes, two images, text only; 10 responses through 10, 4 and 2 slots: the last two refill."""
    config = replica.config
    never = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id,
             *range(vocab_size, config.text_config.vocab_size)]
    theirs = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = hf_greedy(theirs, prompts, length, never)
    ends = theirs.generation_config.eos_token_id
    replies = generate(replica, prompts, [0] * 5, 2, length, 0.0, 1.0, slots, vocab_size)
    for reply, tokens in zip(replies, expected):
        for response in reply:
            assert response.ids == tokens
            assert response.finished == (tokens[-1] in ends)


def test_greedy_stops_at_any_end_token(replica, prompts, vocab_size):
    """The second token of the greedy response is declared an end token: responses then have exactly two tokens."""
    [[free]] = generate(replica, prompts[:1], [0], 1, 12, 0.0, 1.0, 4, vocab_size)
    ends = replica.generation_config.eos_token_id
    replica.generation_config.eos_token_id = [*ends, free.ids[1]]
    [[stopped]] = generate(replica, prompts[:1], [0], 1, 12, 0.0, 1.0, 4, vocab_size)
    assert stopped.ids == free.ids[: free.ids.index(free.ids[1]) + 1] and stopped.finished
    assert not free.finished and len(free.ids) == 12


@both_families
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.2, 0.9)])
def test_sampled_logprobs_equal_a_full_forward(replica, prompts, vocab_size, temperature, top_p):
    replies = generate(replica, prompts, [seed_of(1, i) for i in range(5)], 4, 25, temperature, top_p, 8, vocab_size)
    logprobs, _ = replica(pack([(p, [r.ids for r in reply]) for p, reply in zip(prompts, replies)]), temperature)
    sampled = torch.tensor([x for reply in replies for response in reply for x in response.logprobs])
    torch.testing.assert_close(sampled, logprobs.detach(), atol=1e-4, rtol=0)


def test_a_response_depends_on_its_seed_alone(replica, prompts, vocab_size):
    """Neither slots, nor neighbours, nor order change what is sampled: this is what makes 1 and 8 ranks agree."""
    seeds = [seed_of(0, 3, qid) for qid in "abcde"]
    together = generate(replica, prompts, seeds, 3, 30, 1.2, 0.99, 15, vocab_size)
    refilled = generate(replica, prompts, seeds, 3, 30, 1.2, 0.99, 4, vocab_size)
    backwards = generate(replica, prompts[::-1], seeds[::-1], 3, 30, 1.2, 0.99, 7, vocab_size)[::-1]
    for a, b, c in zip(together, refilled, backwards):
        assert [r.ids for r in a] == [r.ids for r in b] == [r.ids for r in c]
    assert len({tuple(r.ids) for reply in together for r in reply}) > 10  # and the responses of a group differ
    other = generate(replica, prompts, [seed + 1 for seed in seeds], 3, 30, 1.2, 0.99, 15, vocab_size)
    assert [r.ids for r in other[0]] != [r.ids for r in together[0]]


@pytest.mark.parametrize("path, top_p, length", [("replayed", 0.9, 9), ("kernels", 1.0, 4), ("kernels", 0.9, 4)],
                         indirect=["path"])
def test_every_path_samples_the_same(replica, prompts, vocab_size, path, top_p, length):
    """Recorded operations and interpreted kernels against plain eager decoding: tokens and log-probs, with refills."""
    found = generate(replica, prompts[:2], [1, 2], 1, length, 1.2, top_p, 1, vocab_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "on_triton", lambda x: False)
        expected = generate(replica, prompts[:2], [1, 2], 1, length, 1.2, top_p, 1, vocab_size, graphs=False)
    for response, other in zip(sum(found, []), sum(expected, []), strict=True):
        assert response.ids == other.ids
        torch.testing.assert_close(torch.tensor(response.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=0)


def planted(monkeypatch, lengths):
    """Responses of so many tokens, in the order of their prompts; returns a list that grows with every burst."""
    lengths, limits, bursts, burst, hand_out = iter(lengths), {}, [], Decoder.burst, sampler.hand_out

    def hand_out_planted(live, free, slots, ids, logprobs, end, limit):
        for slot, tokens, scores in zip(slots, ids, logprobs):
            _, response = live[slot]
            if not response.ids:
                limits[slot] = next(lengths)
            hand_out(live, free, [slot], [tokens], [scores], set(), limits[slot])

    monkeypatch.setattr(sampler, "hand_out", hand_out_planted)
    monkeypatch.setattr(Decoder, "burst", lambda self: bursts.append(1) or burst(self))
    return bursts


def test_one_queue_needs_fewer_bursts_than_chunks(replica, prompts, vocab_size, monkeypatch):
    """Two slots; six responses of 1, 1, 6, 1, 1, 6 bursts. In chunks of three, 1 + 6 bursts each, 14. In one queue the
    third begins when the first two have ended, the sixth beside it at burst 3: 9. They come in the order in which they
    end, and no prompt is taken before there is a slot for it."""
    lengths, settings = [1 + 8 * n for n in (1, 1, 6, 1, 1, 6)], (1, 60, 1.0, 1.0, 2, vocab_size)
    six, seeds, taken = [*prompts, prompts[0]], list(range(6)), []
    bursts = planted(monkeypatch, lengths * 2)
    chunks = [generate(replica, six[i : i + 3], seeds[i : i + 3], *settings) for i in (0, 3)]
    assert len(bursts) == 14
    longest = max(len(prompt.input_ids) for prompt in six)
    queue = stream(replica, (taken.append(1) or prompt for prompt in six), longest, seeds, *settings)
    found = [(q, responses, len(bursts) - 14, len(taken)) for q, responses in queue]
    assert [(q, after, took) for q, _, after, took in found] == [
        (0, 1, 2), (1, 1, 2), (3, 2, 4), (4, 3, 5), (2, 7, 6), (5, 9, 6)]
    assert [response.ids for _, [response], *_ in sorted(found)] == [r.ids for [r] in sum(chunks, [])]


class OnMeta(TorchDispatchMode):
    """Fails at an operation that reads from the host's memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            assert not isinstance(x, torch.Tensor) or x.is_meta, f"{function} reads a tensor on {x.device}"
        return function(*args, **(kwargs or {}))


@both_families
@torch.no_grad()
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.2, 0.9)])
def test_a_burst_waits_for_no_value(replica, vocab_size, temperature, top_p):
    """On the meta device tensors have no values: what asks for one fails here, and would end a capture on a GPU."""
    state = Slots(replica.to("meta"), 4, 64, 16)
    decoder = Decoder(replica, state, temperature, top_p, vocab_size)
    with OnMeta():
        decoder.burst()
    with pytest.raises(RuntimeError, match="meta"):
        int(state.length.max())
    with pytest.raises(AssertionError, match="reads a tensor on cpu"), OnMeta():
        state.length.copy_(torch.zeros(4))


@torch.no_grad()
@pytest.mark.parametrize("begin", [record, capture], ids=["replayed", "eager"])
def test_a_captured_burst_sees_new_weights_after_sync(policy, replica, prompts, vocab_size, begin):
    """`sync` copies in place: no address changes, and the recorded operations read what lies there now."""
    addresses = [x.data_ptr() for x in replica.parameters()]
    burst, captured = burst_of(replica, vocab_size, begin)
    before = burst_tokens(burst, captured, prompts)
    for parameter in policy.parameters():
        parameter.mul_(1.5)
    sync(policy, replica)
    assert [x.data_ptr() for x in replica.parameters()] == addresses
    after = burst_tokens(burst, captured, prompts)
    plain = burst_of(replica, vocab_size, lambda decoder: decoder.burst)
    assert torch.equal(after, burst_tokens(*plain, prompts)) and not torch.equal(after, before)


def burst_of(replica, vocab_size, begin):
    """A sampling decoder with four slots and what `begin` makes of its burst."""
    decoder = Decoder(replica, Slots(replica, 4, 64 + 16, 16), 1.0, 1.0, vocab_size)
    return begin(decoder), decoder


def burst_tokens(burst, decoder, prompts):
    """Two prompts read into two slots each and continued by a burst: (4, BURST) tokens."""
    decoder.prefill(prompts[:2], [[0, 1], [3, 2]], torch.rand(4, 16, generator=torch.Generator().manual_seed(5)))
    burst()
    return decoder.state.ids.clone()


def test_free_slots_read_nothing(replica, prompts, vocab_size, monkeypatch):
    """At the end all slots are free; each had gone on for up to a burst after its response."""
    states = []
    monkeypatch.setattr(sampler, "Slots", lambda *sizes: states.append(Slots(*sizes)) or states[-1])
    generate(replica, prompts, [0] * 5, 2, 20, 1.0, 1.0, 4, vocab_size)
    assert len(states) == 1 and not states[0].length.any()


def test_vision_tokens_and_unused_rows_are_never_sampled(replica, prompts, vocab_size):
    config = replica.config
    never = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    with torch.no_grad():  # the head now shouts for exactly the forbidden tokens
        weight = torch.zeros_like(replica.lm_head.weight)
        weight[sorted(never | set(range(vocab_size, config.text_config.vocab_size)))] = 1.0
        replica.lm_head.weight = torch.nn.Parameter(weight)
        replica.model.language_model.norm.weight.fill_(5.0)
    for temperature in (0.0, 1.2):
        replies = generate(replica, prompts, list(range(5)), 4, 20, temperature, 0.99, 8, vocab_size)
        drawn = {token for reply in replies for response in reply for token in response.ids}
        assert not drawn & never and max(drawn) < vocab_size


def test_max_new_tokens_is_exact_and_marked_unfinished(replica, prompts, vocab_size):
    replica.generation_config.eos_token_id = -1
    for n in (1, 7, 8, 9):
        replies = generate(replica, prompts[:2], [1, 2], 2, n, 1.0, 1.0, 4, vocab_size)
        assert all(len(r.ids) == len(r.logprobs) == n and not r.finished for reply in replies for r in reply)


def test_no_prompt_gives_no_response(replica, vocab_size):
    assert generate(replica, [], [], 4, 8, 1.0, 1.0, 8, vocab_size) == []


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16():
    """As the fused log-prob computes them: products of bf16 numbers summed in float32."""
    hidden, weight = torch.randn(4, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    logits = linear_logits(hidden, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, (hidden.double() @ weight.double().T).float(), atol=1e-5, rtol=1e-5)


def test_draw_inverts_the_distribution_function_of_the_nucleus():
    """p = .5 .3 .15 .05, top_p .8: the nucleus is {.5, .3}, so tokens 2 and 0 share [0, 1) at 5 : 3."""
    probs = torch.tensor([[0.3, 0.15, 0.5, 0.05]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.9, 1 - 2**-24])
    assert draw(probs, uniform, 0.8).tolist() == [2, 2, 0, 0, 0]
    assert draw(probs, uniform, 0.81).tolist() == [2, 0, 0, 1, 1]  # .8 < .81: the third joins, at (.5+.3)/.95 = .842
    assert draw(probs, torch.full((5,), 0.99), 1.0).tolist() == [3] * 5
    assert draw(probs, torch.full((5,), 0.99), 1e-9).tolist() == [2] * 5  # the likeliest token is always in


def test_draw_never_returns_a_token_of_probability_zero():
    """Not even where rounding makes uniform x total reach the total."""
    probs = torch.tensor([[0.0, 0.3, 0.7 - 1e-7, 0.0]]).expand(2, -1)
    for top_p in (0.99, 1.0):
        assert draw(probs, torch.tensor([0.0, 1.0]), top_p).tolist() == [1 if top_p == 1 else 2, 2 if top_p == 1 else 1]


def test_draw_follows_the_distribution():
    """Chi-square over 200,000 draws, 7 degrees of freedom: the 99.9 % point is 24.3."""
    n, generator = 200_000, torch.Generator().manual_seed(0)
    probs = torch.randn(8, generator=generator).softmax(0)
    counts = torch.bincount(draw(probs.expand(n, -1), torch.rand(n, generator=generator), 1.0), minlength=8)
    assert float(((counts - n * probs) ** 2 / (n * probs)).sum()) < 24.3


def test_top_p_never_draws_outside_the_nucleus():
    """Against Hugging Face's TopPLogitsWarper on random distributions."""
    from transformers import TopPLogitsWarper

    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2000, 50, generator=generator)
    inside = TopPLogitsWarper(0.9)(None, logits.clone()) > -torch.inf
    tokens = draw(logits.softmax(-1), torch.rand(2000, generator=generator), 0.9)
    assert bool(inside.gather(-1, tokens[:, None]).all())


def test_seeds_are_stable_and_distinct():
    assert seed_of(0, 1, "q") == seed_of(0, 1, "q") == 7412687991310582134
    assert len({seed_of(a, b, c) for a in range(9) for b in range(9) for c in "abcdefghi"}) == 9**3
