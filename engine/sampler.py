"""The sampler: prefill each prompt once, continue it G times, give the slot of a finished response to the next prompt.

    replies = generate(replica, prompts, seeds, group_size=8, max_new_tokens=2048, temperature=1.2, top_p=.99, ..)
    for q, responses in stream(replica, prompts, longest, seeds, ..): ..    the same, each group as soon as it has ended
    sync(policy, replica)      after an update: the sharded policy's weights into the sampler's whole copy, in place

A slot is one row of a static key-value cache. A prompt takes G slots: its keys are computed once and copied into them.
All slots decode together, each at its own length; every `BURST` tokens the host looks which have finished and refills
them from the queue. The model is a whole (unsharded) copy on each rank, so nothing here waits for another rank.

A burst is a plain function over buffers that stay where they are. On a GPU it is captured once as a CUDA graph and then
replayed: thousands of kernels at the price of one launch, and no word between device and host until the burst is over.

What a response says depends on (weights, prompt, seed, G, max_new_tokens) alone, up to rounding: token t of response g
uses the uniform number (g, t) that the seed gives. Slots, neighbours and ranks change nothing.

Symbols: S slots, Q prompts, G responses per prompt, V vocabulary, L length of the cache, D head size.
"""
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data import Prompt
from engine.policy import pack
from kernels.ops import linear_logits, sample_tokens


BURST = 8  # tokens between two looks at the slots: a host synchronisation costs more than a few wasted tokens
PREFILL = 16384  # prompt tokens read in one row, about: bounds its memory
BUCKET = 16  # a CPU reads the cache up to the longest live row, rounded up to this: odd lengths are slower


@dataclass
class Response:
    """One sampled response; the end token, when it was drawn, is the last of `ids`."""

    ids: list[int]
    logprobs: list[float]  # of the tokens under softmax(logits / temperature), before top-p
    finished: bool  # False: cut off at max_new_tokens


class Slots:
    """S rows of decoding state. To transformers' layers it is the cache: all they call is `update`."""

    def __init__(self, model, slots: int, length: int, max_new_tokens: int):
        config, weight = model.config.text_config, model.lm_head.weight
        if weight.is_cuda:
            torch.cuda.empty_cache()  # training has left memory in pieces, and the keys of a layer are one large block
        head = model.model.language_model.layers[0].self_attn.head_dim
        shape = (slots, config.num_key_value_heads, length, head)
        make = dict(dtype=weight.dtype, device=weight.device)
        self.keys = [torch.zeros(shape, **make) for _ in range(config.num_hidden_layers)]  # each (S, kv heads, L, D)
        self.values = [torch.zeros(shape, **make) for _ in range(config.num_hidden_layers)]
        self.rows = torch.arange(slots, device=weight.device)
        self.token = torch.zeros_like(self.rows)  # (S,) last token drawn, not yet in the cache
        self.length = torch.zeros_like(self.rows)  # (S,) tokens in the cache
        self.offset = torch.zeros_like(self.rows)  # (S,) rope position minus length: images take fewer positions
        self.drawn = torch.zeros_like(self.rows)  # (S,) tokens drawn so far
        self.uniform = torch.zeros(slots, max_new_tokens + BURST, device=weight.device)  # (S, tokens) random streams
        self.ids = self.token.new_empty(slots, BURST)  # what the last burst drew
        self.logprobs = torch.empty(slots, BURST, device=weight.device,
                                    dtype=torch.promote_types(weight.dtype, torch.float32))
        self.view = length  # how far decoding may read the cache
        self.prefill = []  # while prompts are read: (their slots, first token, end) for each prompt in the packed row

    def update(self, key, value, layer, **unused):
        """Store new keys and values (B, kv heads, T, D) of a layer, return what its attention reads."""
        K, V = self.keys[layer], self.values[layer]
        if self.prefill:
            for slots, start, end in self.prefill:
                K[slots, :, : end - start] = key[:, :, start:end]  # one prompt, copied into its G slots
                V[slots, :, : end - start] = value[:, :, start:end]
            return key, value
        K[self.rows, :, self.length] = key[:, :, 0]
        V[self.rows, :, self.length] = value[:, :, 0]
        return K[:, :, : self.view], V[:, :, : self.view]

    def narrow(self, live: list[int]):
        """On a CPU, trim the cache view to the longest live row: attention there reads all that it is given.

        A GPU's kernel reads only what is live in each row, and a captured graph needs one shape for all bursts.
        """
        if not self.rows.is_cuda:
            need = int(self.length[live].max()) + BURST
            self.view = min(-(-need // BUCKET) * BUCKET, self.keys[0].shape[2])


class Decoder:
    """The model steps of `generate`: read prompts into slots, and draw one more token in every slot."""

    def __init__(self, model, state: Slots, temperature: float, top_p: float, vocab_size: int):
        self.model, self.state, self.temperature, self.top_p = model, state, temperature, top_p
        config = model.config
        # Never sample image tokens, nor the padding ids beyond the tokenizer.
        self.forbidden = torch.arange(config.text_config.vocab_size, device=state.rows.device) >= vocab_size  # (V,)
        for token in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            self.forbidden[getattr(config, token)] = True

    def pick(self, hidden, rows):
        """Next token of some slots and its log-prob. hidden (B, H), rows (B,) slots -> two (B,)."""
        logits = linear_logits(hidden, self.model.lm_head.weight)  # (B, V)
        uniform = self.state.uniform[rows, self.state.drawn[rows]]  # (B,)
        return sample_tokens(logits, self.forbidden, uniform, self.temperature, self.top_p)

    def prefill(self, prompts: list[Prompt], slots: list[list[int]], uniform: Tensor):
        """Read prompts, in one packed row, into G slots each; returns every response's first token and its log-prob."""
        state, model = self.state, self.model
        packed = pack([(prompt, []) for prompt in prompts], state.rows.device)
        ends = torch.tensor([len(prompt.input_ids) for prompt in prompts]).cumsum(0).tolist()
        state.prefill = [(torch.tensor(group, device=state.rows.device), end - len(prompt.input_ids), end)
                         for prompt, group, end in zip(prompts, slots, ends)]
        hidden = self.run(packed.position_ids, packed.layout,
                          **model.embed(packed.input_ids, packed.pixel_values, packed.grid_thw))
        state.prefill = []
        rows = torch.tensor([slot for group in slots for slot in group], device=state.rows.device)
        per_slot = [i for i, group in enumerate(slots) for _ in group]  # which prompt each slot belongs to
        lengths = torch.tensor([len(prompts[i].input_ids) for i in per_slot], device=rows.device)
        next_position = torch.tensor([int(prompts[i].position_ids.max()) + 1 for i in per_slot], device=rows.device)
        state.length[rows], state.offset[rows], state.drawn[rows] = lengths, next_position - lengths, 0
        state.uniform[rows, : uniform.shape[1]] = uniform.to(rows.device)
        last = torch.tensor([ends[i] - 1 for i in per_slot], device=rows.device)
        token, logprob = self.pick(hidden[0, last], rows)
        state.token[rows], state.drawn[rows] = token, 1
        return token, logprob

    def step(self):
        """Feed every slot its last token and draw the next: (S,) tokens and log-probs. Finished slots idle along."""
        state = self.state
        position = (state.length + state.offset)[None, :, None].expand(3, -1, 1)  # (3, S, 1)
        embeddings = self.model.get_input_embeddings()(state.token)[:, None]  # (S, 1, H)
        hidden = self.run(position, state.length + 1, inputs_embeds=embeddings)
        token, logprob = self.pick(hidden[:, 0], state.rows)
        state.token.copy_(token)
        state.length.add_(1).clamp_(max=state.keys[0].shape[2] - 1)
        state.drawn.add_(1).clamp_(max=state.uniform.shape[1] - 1)
        return token, logprob

    def burst(self):
        """BURST steps into state.ids and state.logprobs. Nothing here depends on a value or waits for one."""
        for i in range(BURST):
            self.state.ids[:, i], self.state.logprobs[:, i] = self.step()

    def run(self, position_ids, seen, **inputs):
        """The decoder layers over what `Policy.embed` returns -> (B, T, H)."""
        # By position, because the cache is called past_key_values in some versions of transformers, cache in others.
        return self.model.model.language_model(None, None, position_ids, self.state, **inputs, seen=seen,
                                               use_cache=True).last_hidden_state


@functools.cache
def capture_stream():
    """One for all captures: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream()


def capture(decoder: Decoder):
    """A function that does what `decoder.burst` does; on a GPU as one CUDA graph. All slots have to be free."""
    if not decoder.state.rows.is_cuda:
        return decoder.burst
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decoder.burst()  # once for real: kernels are compiled and libraries set up, which a capture does not allow
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL's threads may go on
        decoder.burst()
    return graph.replay


def hand_out(live: dict[int, tuple[int, Response]], free: list[int], slots: list[int], ids, logprobs, end: set[int],
             limit: int):
    """Give the tokens drawn in some slots to their responses; a response that has ended frees its slot."""
    for slot, tokens, scores in zip(slots, ids, logprobs):
        _, response = live[slot]
        for token, logprob in zip(tokens, scores):
            response.ids.append(token)
            response.logprobs.append(logprob)
            response.finished = token in end
            if response.finished or len(response.ids) == limit:
                free.append(slot)
                del live[slot]
                break


def generate(model, prompts: list[Prompt], seeds: list[int], *settings, **more) -> list[list[Response]]:
    """What `stream` yields, as a list: for each prompt its responses. The settings are those of `stream`."""
    longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
    return [responses for _, responses in sorted(stream(model, prompts, longest, seeds, *settings, **more))]


@torch.no_grad()
def stream(model, prompts: Iterable[Prompt], longest: int, seeds: list[int], group_size: int, max_new_tokens: int,
           temperature: float, top_p: float, slots: int, vocab_size: int,
           graphs: bool = True) -> Iterator[tuple[int, list[Response]]]:
    """Sample `group_size` responses to each prompt; yields (which prompt, its responses) as soon as all have ended.

    A prompt is taken when there are slots for it. longest: tokens of the longest; seeds: one per prompt (`seed_of`);
    temperature 0 is greedy, with the log-probs at 1; slots: rows decoded together, at least group_size; vocab_size: the
    tokenizer's; graphs: on a GPU, decode in CUDA graphs.
    """
    assert slots >= group_size, f"{slots=} cannot hold a group of {group_size}"
    if not seeds:
        return
    slots = min(slots, len(seeds) * group_size)
    state = Slots(model, slots, longest + max_new_tokens + BURST, max_new_tokens)
    decoder = Decoder(model, state, temperature, top_p, vocab_size)
    burst = capture(decoder) if graphs else decoder.burst
    end = set(torch.tensor(model.generation_config.eos_token_id).view(-1).tolist())  # one token or several
    waiting, prompts, free = deque(range(len(seeds))), iter(prompts), list(range(slots))
    live, groups = {}, {}  # slot -> (which prompt, its Response); which prompt -> its responses, until all have ended

    while waiting or live:
        new, read = {}, 0
        while waiting and len(free) >= group_size * (len(new) + 1) and (not new or read <= PREFILL):
            new[waiting.popleft()] = prompt = next(prompts)
            read += len(prompt.input_ids)
        if new:
            groups |= {q: [Response([], [], False) for _ in range(group_size)] for q in new}
            places = [[free.pop() for _ in range(group_size)] for _ in new]
            random = [torch.Generator().manual_seed(seeds[q]) for q in new]
            uniform = torch.cat([torch.rand(group_size, max_new_tokens, generator=numbers) for numbers in random])
            first = decoder.prefill(list(new.values()), places, uniform)
            rows = [slot for group in places for slot in group]
            live.update(zip(rows, ((q, response) for q in new for response in groups[q])))
            hand_out(live, free, rows, *(column[:, None].tolist() for column in first), end, max_new_tokens)
        if live:
            state.narrow(list(live))
            burst()
            ids, logprobs = state.ids.tolist(), state.logprobs.tolist()  # the host waits here, and nowhere in the burst
            rows = list(live)
            hand_out(live, free, rows, [ids[slot] for slot in rows], [logprobs[slot] for slot in rows], end,
                     max_new_tokens)
            state.length[free] = 0  # a slot without a response has nothing to read
        for q in sorted(groups.keys() - {q for q, _ in live.values()}):
            yield q, groups.pop(q)


# --------------------------------------------------------------------- its weights, after each update


@torch.no_grad()
def sync(policy, replica):
    """Copy the sharded master weights into the whole replica of each rank, in place. What is frozen is equal."""
    policy.reshard()  # after a forward without a backward the root's weights are still gathered
    for master, copy in zip(policy.parameters(), replica.parameters(), strict=True):
        if master.requires_grad:
            master = master.detach().to(copy.dtype)  # before gathering: half the traffic
            copy.copy_(master.full_tensor() if isinstance(master, DTensor) else master)
