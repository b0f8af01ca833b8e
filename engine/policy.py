"""The policy: a Qwen-VL that loads into FSDP2 shards, scores packed groups and lends its weights to the sampler.

    policy = Policy.load("Qwen/Qwen2.5-VL-7B-Instruct", device, mesh=mesh)  fp32 weights, each rank reads its own rows
    logprobs, entropies = policy(pack(groups), temperature)                 one root forward, response tokens only

Three ideas carry the file.
1. Packing. A group is a prompt (with its image) and its G responses. A row is [prompt, r1, .., rG, prompt', ..], so the
   prompt and the image are computed once, not G times. The queries of r_g see the keys of [prompt, r_g] only: `Layout`.
2. One root forward. `Policy.forward` does all up to the log-probs, so FSDP2 gathers the head's weight, tied or not.
3. Gradients are summed over ranks (never averaged): the caller divides by a token count of the whole optimiser step.

Symbols: T tokens in a row, N response tokens, P prompt tokens, G responses of a group, H hidden size.
"""
import contextlib
import functools
import os
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from data import InputError, Prompt
from engine.lora import AdaptedLinear, add_adapters, share_frozen, start_adapters
from engine.weights import find_model, foreign, model_config, other_files, read_weights, transformers_class
from kernels.ops import (backend, check_linear_logprob, choose_grpo_loss, decode_attention, linear_logprob,
                         linear_logprob_loss)

# ---------------------------------------------------------------------------------------- attention

ATTENTION = "packed_flash"  # transformers gives the vision tower cu_seqlens only if this says "flash", else it loops


class Layout(NamedTuple):
    """Which queries see which keys in a packed row; travels through transformers' layers as `seen`.

    Segment s: queries cu_q[s]:cu_q[s+1] of the row, keys row[key_index[cu_k[s]:cu_k[s+1]]], causal, aligned at the end.
    """

    cu_q: Tensor  # (S + 1,) int32
    cu_k: Tensor  # (S + 1,) int32
    max_q: int
    max_k: int
    key_index: Tensor  # (keys,) int64


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    """Attention over ragged segments. q (Tq, heads, D), k and v (Tk, kv heads, D) -> (Tq, heads, D)."""
    # Flash attention has no more than 16 bits, and needs Ampere (compute capability 8.0) or later: a T4 has 7.5.
    if q.is_cuda and q.dtype.itemsize == 2 and torch.cuda.get_device_capability(q.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window)
    lengths, out = zip(cu_q.diff().tolist(), cu_k.diff().tolist()), []
    runs = [(n, m, len(list(run))) for (n, m), run in groupby(lengths)]  # S neighbours of one length are one call
    parts = (q.split([n * S for n, _, S in runs]), *(x.split([m * S for _, m, S in runs]) for x in (k, v)))
    for (n, m, S), *qkv in zip(runs, *parts):
        query, key, value = (x.unflatten(0, (S, -1)).transpose(1, 2) for x in qkv)  # (S, heads, length, D)
        mask = None
        if causal and n != m:  # torch's own causal mask is aligned at the start, which is the same only for a square
            mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal and n == m, scale=scale,
                                                  enable_gqa=True)
        out.append(attended.transpose(1, 2).flatten(0, 1))  # (S * length, heads, D)
    return torch.cat(out)


def attention(module, query, key, value, attention_mask, scaling=None, seen=None, cu_seq_lens_q=None,
              cu_seq_lens_k=None, max_length_q=None, max_length_k=None, **unused):
    """The one attention here, called by transformers' layers: query (B, heads, T, D), key, value (B, kv heads, L, D).

    `seen` tells its three users apart: a Layout (packed training, and reading prompts), a Tensor (S,) of how many keys
    of its cache each row sees (decoding, one query per row), None (the vision tower, which has cu_seq_lens). The mask
    is None: transformers makes none for an attention that it does not know. Returns (B, T, heads, D), no weights.
    """
    if isinstance(seen, Tensor):
        return decode_attention(query, key, value, seen, scaling), None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if isinstance(seen, Layout):
        key, value = key[seen.key_index], value[seen.key_index]  # its backward sums over a prompt's responses
        out = varlen(query, key, value, *seen[:4], True, scaling)
    else:
        out = varlen(query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, False, scaling)
    return out[None], None


# ------------------------------------------------------------------------------------------ packing

Group = tuple[Prompt, list[list[int]]]  # a prompt and some of its responses, as token ids


class Packed(NamedTuple):
    """Groups in one row, ready for `Policy.forward`."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (3, 1, T) time, height and width positions
    layout: Layout
    predictors: Tensor  # (N,) where in the row the hidden state that predicts each response token lies
    targets: Tensor  # (N,) the response tokens, group after group, response after response
    pixel_values: Tensor | None  # (patches, patch_dim)
    grid_thw: Tensor | None  # (images, 3)


def pack(groups: list[Group], device="cpu") -> Packed:
    """Lay groups out as [prompt, r1, .., rG, prompt', ..]; every response continues the positions of its prompt."""
    ids, positions, predictors, targets = [], [], [], []
    queries, keys, key_index = [0], [0], []
    for prompt, responses in groups:
        start, P = len(ids), len(prompt.input_ids)
        prefix = torch.arange(start, start + P)
        ids += prompt.input_ids
        positions.append(prompt.position_ids)
        queries.append(P), keys.append(P), key_index.append(prefix)
        after = int(prompt.position_ids.max()) + 1
        for g, response in enumerate(responses):
            first, n = len(ids), len(response)
            ids += response
            positions.append((after + torch.arange(n)).expand(3, n))
            own = torch.arange(first, first + n)
            if g == 0:  # it goes on in its prompt's segment; to the others the prompt's keys are shown again
                queries[-1], keys[-1] = P + n, P + n
                key_index.append(own)
            else:
                queries.append(n), keys.append(P + n), key_index.extend([prefix, own])
            predictors += [start + P - 1, *range(first, first + n - 1)]  # the prompt's end predicts the first token
            targets += response
    layout = Layout(torch.tensor(queries).cumsum(0).int().to(device), torch.tensor(keys).cumsum(0).int().to(device),
                    max(queries), max(keys), torch.cat(key_index).to(device))
    images = [prompt for prompt, _ in groups if prompt.pixel_values is not None]
    return Packed(
        torch.tensor(ids, device=device)[None],
        torch.cat(positions, 1)[:, None].to(device),
        layout,
        torch.tensor(predictors, device=device),
        torch.tensor(targets, device=device),
        torch.cat([prompt.pixel_values for prompt in images]).to(device) if images else None,
        torch.cat([prompt.grid_thw for prompt in images]).to(device) if images else None,
    )


def dummy_group() -> Group:
    """A row for a rank that has run out of work while others have not; its loss gets weight 0."""
    return Prompt(None, [0, 0], torch.arange(2).expand(3, 2), None, None), [[0, 0]]


def micro_batches(prompt_lengths: list[int], response_lengths: list[list[int]],
                  token_budget: int) -> list[list[tuple[int, list[int]]]]:
    """Cut groups into rows of at most `token_budget` tokens, in order; a cut group has its prompt computed again.

    Returns rows of (group, its responses) indices, padded with empty ones to equally many on all ranks, as FSDP needs.
    """
    rows, used = [], token_budget
    for q, lengths in enumerate(response_lengths):
        for g, n in enumerate(lengths):
            fresh = used + n > token_budget or rows[-1][-1][0] != q  # the prompt is not in this row yet
            if used + n + prompt_lengths[q] * fresh > token_budget:
                rows.append([])
                used, fresh = 0, True
            if fresh:
                rows[-1].append((q, []))
                used += prompt_lengths[q]
            rows[-1][-1][1].append(g)
            used += n
    most = torch.tensor(len(rows))
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return rows + [[] for _ in range(int(most) - len(rows))]


# --------------------------------------------------------------------------------------- the policy


class Policy:
    """What a Qwen-VL of transformers gains here: a forward that returns the log-probs of response tokens.

    `policy_class` joins it with the family's own class, so an instance is also a Qwen3VLForConditionalGeneration, say.
    """

    def embed(self, input_ids, pixel_values, grid_thw) -> dict:
        """What the decoder layers take, of input_ids (1, T): embeddings (1, T, H) with image features in place of image
        tokens and, in Qwen3-VL, further features that its first layers add to these tokens (deepstack).

        The vision tower runs even without an image: an FSDP rank that skipped it would leave the others waiting for it.
        """
        embeddings, visual = self.get_input_embeddings()(input_ids), self.model.visual  # (1, T, H)
        if pixel_values is None:  # of a blank image nothing is taken, and its gradient is 0
            merge = visual.spatial_merge_size
            pixel_values = embeddings.new_zeros(merge**2, visual.patch_embed.proj.weight[0].numel())
            grid_thw = torch.tensor([[1, merge, merge]], device=input_ids.device)
        output, images = self.model.get_image_features(pixel_values, grid_thw), input_ids == self.config.image_token_id
        features = torch.cat(output.pooler_output).to(embeddings.dtype)  # (image tokens, H)
        inputs = {"inputs_embeds": embeddings.masked_scatter(images[..., None], features)}
        if deepstack := getattr(output, "deepstack_features", None):
            inputs |= {"visual_pos_masks": images, "deepstack_visual_embeds": deepstack}
        return inputs

    def forward(self, packed: Packed, temperature: float = 1.0, loss_fn: Callable | None = None):
        """Log-probs and entropies of all response tokens under softmax(logits / temperature): two (N,) in float32.

        With loss_fn(logprobs (n,), entropies (n,), rows: slice of the N tokens) -> loss of these tokens, the result is
        (loss, logprobs, entropies): the gradient is then computed chunk by chunk while the logits are there.
        """
        inputs = self.embed(packed.input_ids, packed.pixel_values, packed.grid_thw)
        hidden = self.model.language_model(
            **inputs, position_ids=packed.position_ids, seen=packed.layout, use_cache=False,
        ).last_hidden_state  # (1, T, H)
        head = (hidden[0, packed.predictors], self.lm_head.weight, packed.targets)
        if loss_fn is None:
            return linear_logprob(*head, temperature)
        return linear_logprob_loss(*head, loss_fn, temperature)

    def prepare_training(self, freeze_vision: bool, gradient_checkpointing: bool):
        """Choose what is trained, and whether activations are kept or computed again."""
        if freeze_vision:
            self.model.visual.requires_grad_(False)
        if gradient_checkpointing:
            self.gradient_checkpointing_enable({"use_reentrant": False})
            self.train()  # transformers computes activations again in this mode only

    @contextlib.contextmanager
    def adapters_off(self):
        """Within, LoRA's adapters do nothing: the base model, which is the reference policy. See engine/lora.py.

        Afterwards it is sharded as before: a forward without a backward leaves embeddings and head gathered.
        """
        AdaptedLinear.adapters_on = False
        yield
        AdaptedLinear.adapters_on = True
        if isinstance(self, FSDPModule):
            self.reshard()

    @staticmethod
    def load(path, device, dtype=torch.float32, mesh=None, compute_dtype=torch.bfloat16, lora=None, shared=None):
        """Read a Hugging Face folder or hub name; with a mesh into FSDP2 shards, each rank its own rows only.

        dtype: what weights are kept in; compute_dtype: what shards compute in; lora: a Config whose adapters are added,
        in float32 where there is a mesh; shared: a policy of one process whose frozen weights are used.
        """
        from transformers import AttentionInterface, GenerationConfig

        folder = find_model(path)
        config = model_config(folder)
        AttentionInterface.register(ATTENTION, attention)
        with torch.device("meta"):
            policy = policy_class(config.model_type)._from_config(config, dtype=dtype)
        for part in (policy.model.visual.config, policy.model.language_model.config):
            part._attn_implementation = ATTENTION
        if lora:
            add_adapters(policy, lora, dtype if mesh is None else torch.float32)
        if mesh is not None:
            shard(policy, mesh, compute_dtype)
        if shared is not None:
            share_frozen(shared, policy)
        policy._apply(lambda x: torch.empty_like(x, device=device) if x.device.type == "meta" else x)
        policy.tie_weights()  # now the head is another tensor than the embeddings
        policy.model.visual.patch_embed.forward = functools.partial(embed_patches, policy.model.visual.patch_embed.proj)
        read_weights(policy, folder)
        if lora:
            start_adapters(policy, lora.seed)
        policy.files = other_files(folder)  # for the export, when the folder may be gone
        if os.path.exists(os.path.join(folder, "generation_config.json")):  # else it is what config.json says
            with foreign(f"model {folder}: generation_config.json cannot be read", "take the file of the base model"):
                policy.generation_config = GenerationConfig.from_pretrained(folder)
        if policy.generation_config.eos_token_id is None:
            raise InputError(f"model {folder} has no eos_token_id: take the base model's generation_config.json")
        return policy


def embed_patches(proj, pixels):
    """(patches, patch_dim) -> (patches, Hv): the product that transformers' Conv3d is, its kernel being its stride.

    In bfloat16 cuDNN is slow at it or cannot do it (pytorch 166643, 174051).
    """
    return F.linear(pixels.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)


@functools.cache
def policy_class(model_type: str):
    """Our methods in front of transformers' model, whose layers, weights and names stay as they are."""
    return type("Policy", (Policy, transformers_class(model_type, "ForConditionalGeneration")), {})


def shard(policy, mesh, compute_dtype):
    """FSDP2 around every block, layer and the rest; weights gathered in compute_dtype, gradients summed in fp32."""
    # Inputs are not cast: that would round the vision tower's fp32 rope tables at each block, in the forward but not in
    # a checkpoint's recomputation, and not in the sampler's copy (pytorch 159359). The layers cast what they need.
    precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    for module in [*policy.model.visual.blocks, *policy.model.language_model.layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in policy.modules():
        if isinstance(module, FSDPModule):  # both settings hold for one module only, not for those inside it
            module.set_gradient_divide_factor(1.0)  # a sum: the loss is already divided by the global token count
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it reduces


def choose_loss(reference: Callable, fused: str, device, log=print) -> Callable:
    """The policy loss of a run (kernels.ops.choose_grpo_loss). What a GPU runs has to be what stands in train.py, so
    the fused log-probs are compared with their reference as well; InputError where they differ."""
    try:
        log(f"log-probs and loss by {backend(device)}")
        if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            log("this GPU is older than Ampere and has no flash attention: attention runs a segment at a time, slowly")
        check_linear_logprob(device)
        return choose_grpo_loss(reference, fused, device, log)
    except ValueError as error:
        raise InputError(str(error)) from error
