"""The packed forward against Hugging Face's padded batch; loading and exporting against from_pretrained."""
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import data
import demo
from data import InputError
from engine.policy import Policy, dummy_group, micro_batches, pack, varlen
from engine.sampler import generate, sync
from engine.weights import export, hub_name, load_processor
from plumbing.processes import start_processes
from conftest import all_families, both_families
from ranks import ranks


def responses_to(prompts, group_size=3, seed=0):
    """Groups with random responses of lengths 1 to 7."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (len(prompts), group_size), generator=generator).tolist()
    return [(p, [torch.randint(250, (n,), generator=generator).tolist() for n in row])
            for p, row in zip(prompts, lengths)]


def padded_logprobs(model, groups, temperature):
    """The reference: each response a right-padded row, positions by Hugging Face itself -> (N,) in pack's order."""
    rows = [(prompt, response) for prompt, responses in groups for response in responses]
    length = max(len(prompt.input_ids) + len(response) for prompt, response in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, (prompt, response) in enumerate(rows):
        row = torch.tensor(prompt.input_ids + response)
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    images = [prompt for prompt, _ in rows if prompt.pixel_values is not None]
    vision = {}
    if images:
        vision = dict(pixel_values=torch.cat([p.pixel_values for p in images]),
                      image_grid_thw=torch.cat([p.grid_thw for p in images]))
    kinds = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, **vision).logits / temperature
    logprobs = logits.log_softmax(-1)
    out = []
    for i, (prompt, response) in enumerate(rows):
        P = len(prompt.input_ids)
        out.append(logprobs[i, P - 1 : P - 1 + len(response)].gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(out)


@all_families
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4), (2,), (3,)])
def test_packed_logprobs_and_gradients_equal_the_padded_batch(processes, tiny_folder, prompts, chosen):
    """In float64, so that rounding hides nothing: the patch embedding is a product here and a convolution there."""
    groups = responses_to([prompts[i] for i in chosen])
    theirs = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float64)
    policy = Policy.load(tiny_folder, processes[0], torch.float64, processes[1], torch.float64)
    expected = padded_logprobs(theirs, groups, temperature=1.2)
    logprobs, _ = policy(pack(groups), temperature=1.2)
    torch.testing.assert_close(logprobs, expected, atol=1e-12, rtol=0)

    slope = torch.linspace(-1, 1, len(expected))  # any gradient that differs from token to token
    (expected * slope).sum().backward()
    (logprobs * slope).sum().backward()
    for name, parameter in policy.named_parameters():
        gradient, reference = parameter.grad.full_tensor(), theirs.get_parameter(name).grad
        if reference is None:  # no image in the batch: the blank image's gradient is exactly 0
            reference = torch.zeros_like(gradient)
        atol = 1e-4 * float(reference.abs().max()) + 1e-7
        torch.testing.assert_close(gradient, reference, atol=atol, rtol=0, msg=name)


def test_a_prompt_and_its_first_response_are_one_segment():
    """Prompts of 4 and 1 tokens, responses of 3 and 2, and none: queries 0 to 6, 7 and 8, 9."""
    groups = [(data.Prompt(None, [5] * n, torch.arange(n).expand(3, n), None, None), responses)
              for n, responses in ((4, [[1, 2, 3], [4, 6]]), (1, []))]
    layout = pack(groups).layout
    assert layout.cu_q.tolist() == [0, 7, 9, 10] and layout.cu_k.tolist() == [0, 7, 13, 14]
    assert layout.key_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 7, 8, 9]
    assert (layout.max_q, layout.max_k) == (7, 7)
    assert pack(groups).predictors.tolist() == [3, 4, 5, 3, 7]  # the prompt's end predicts both first tokens


@pytest.mark.parametrize("causal", [True, False])
def test_neighbours_of_one_length_attend_in_one_call_and_as_each_would_alone(causal, monkeypatch):
    """Five segments, three calls: queries 3, 3, 5, 2, 2 see keys 4, 4, 5, 6, 6. The reference is a float64 softmax."""
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda query, *rest, **options: (calls.append(len(query)), sdpa(query, *rest, **options))[1])
    generator, queries, keys = torch.Generator().manual_seed(0), [3, 3, 5, 2, 2], [4, 4, 5, 6, 6]
    inputs = [torch.randn(n, heads, 8, generator=generator) for n, heads in ((15, 4), (25, 2), (25, 2))]
    leaves, exact = ([x.to(dtype, copy=True).requires_grad_() for x in inputs]
                     for dtype in (torch.float32, torch.float64))
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys))
    found = varlen(*leaves, cu_q, cu_k, 5, 6, causal, 0.3)
    expected = []
    for query, key, value in zip(*(x.split(n) for x, n in zip(exact, (queries, keys, keys)))):
        scores = 0.3 * torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1))
        late = torch.ones_like(scores[0], dtype=torch.bool).triu(1 + len(key) - len(query))  # aligned at the end
        weights = scores.masked_fill(late & causal, -torch.inf).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1)))
    assert calls == [2, 1, 2]
    for out in (found, torch.cat(expected)):
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=1e-6, rtol=0)
    for leaf, other in zip(leaves, exact):
        torch.testing.assert_close(leaf.grad.double(), other.grad, atol=2e-6, rtol=0)


def test_packed_entropy_is_that_of_the_full_distribution(replica, prompts):
    groups = responses_to(prompts[:1], group_size=1)
    T = 0.7
    _, entropies = replica(pack(groups), T)
    packed = pack(groups)
    hidden = replica.model.language_model(
        **replica.embed(packed.input_ids, packed.pixel_values, packed.grid_thw), use_cache=False,
        position_ids=packed.position_ids, seen=packed.layout).last_hidden_state
    logits = replica.lm_head(hidden)[0, packed.predictors] / T
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5, rtol=0)


@all_families
def test_logprobs_change_when_the_image_does(replica, samples, prompts, processor):
    flipped = data.encode_prompt(
        data.Sample("a", samples[0].question, (samples[0].images[0].rotate(90),), "2"), processor)
    response = [[5, 6, 7]]
    before, _ = replica(pack([(prompts[0], response)]))
    after, _ = replica(pack([(flipped, response)]))
    assert (before - after).abs().max() > 1e-3


@both_families
def test_a_response_does_not_see_its_siblings(replica, prompts):
    alone, _ = replica(pack([(prompts[0], [[5, 6, 7]])]))
    together, _ = replica(pack([(prompts[0], [[9, 9, 9, 9], [5, 6, 7]])]))
    torch.testing.assert_close(together[4:], alone, atol=1e-5, rtol=0)


@both_families
def test_a_dummy_row_has_no_gradient_but_runs_the_vision_tower(policy):
    logprobs, _ = policy(pack([dummy_group()]))
    (0.0 * logprobs.sum()).backward()
    assert all(float(p.grad.full_tensor().abs().max()) == 0 for p in policy.parameters())  # every parameter took part


def test_micro_batches_cover_every_response_once_within_the_budget():
    prompts, responses = [10, 3, 20], [[4, 5, 6], [1, 1], [30, 2]]
    rows = micro_batches(prompts, responses, token_budget=25)
    # 10+4+5+6 = 25 fits; 3+1+1 = 5, but the prompt of 20 does not fit beside it; 20+30 > 25 has a row of its own; 20+2
    assert rows == [[(0, [0, 1, 2])], [(1, [0, 1])], [(2, [0])], [(2, [1])]]
    rows = micro_batches(prompts, responses, token_budget=20)
    assert rows == [[(0, [0, 1])], [(0, [2]), (1, [0])], [(1, [1])], [(2, [0])], [(2, [1])]]


def test_a_group_cut_over_rows_gives_the_same_logprobs(replica, prompts):
    groups = responses_to(prompts[:2], group_size=4)
    whole, _ = replica(pack(groups))
    lengths = [len(p.input_ids) for p in prompts[:2]]
    rows = micro_batches(lengths, [[len(r) for r in rs] for _, rs in groups], token_budget=max(lengths) + 9)
    assert len(rows) > 2
    pieces = [replica(pack([(groups[q][0], [groups[q][1][g] for g in chosen]) for q, chosen in row]))[0]
              for row in rows]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=0)


@all_families
def test_loading_shards_equals_from_pretrained(policy, tiny_folder):
    theirs = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    for (name, ours), (_, reference) in zip(policy.named_parameters(), theirs.named_parameters(), strict=True):
        assert isinstance(ours, DTensor) and torch.equal(ours.full_tensor(), reference), name
    for (name, ours), (_, reference) in zip(policy.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(ours, reference), name


@both_families
def test_an_untied_head_is_loaded_scored_and_exported(tiny_folder, processes, processor, prompts, tmp_path):
    """Qwen2.5-VL 7B has a head of its own, 3B shares the embeddings; in Qwen3-VL 8B and 32B have one."""
    config = AutoConfig.from_pretrained(tiny_folder)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    theirs = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "untied")
    policy = Policy.load(str(tmp_path / "untied"), *processes[:1], torch.float64, processes[1], torch.float64)
    assert policy.lm_head.weight is not policy.get_input_embeddings().weight
    groups = responses_to(prompts[:2])
    logprobs, _ = policy(pack(groups))
    torch.testing.assert_close(logprobs, padded_logprobs(theirs.double(), groups, 1.0), atol=1e-12, rtol=0)
    logprobs.sum().backward()
    assert float(policy.lm_head.weight.grad.full_tensor().abs().max()) > 0
    export(str(tmp_path / "export"), policy, processor, torch.float32)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    assert torch.equal(again.lm_head.weight, theirs.lm_head.weight.float())


# The names of all weights in the hub's folders of the 3B and the 7B, and their config.json, which has an older layout.
HUB_NAMES = re.compile(
    r"visual\.(patch_embed\.proj\.weight|merger\.ln_q\.weight|merger\.mlp\.[02]\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]\.weight|(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)\.(weight|bias)))"
    r"|model\.(embed_tokens|norm|layers\.\d+\.((input|post_attention)_layernorm|self_attn\.o_proj"
    r"|mlp\.(gate|up|down)_proj))\.weight|model\.layers\.\d+\.self_attn\.[qkv]_proj\.(weight|bias)|lm_head\.weight")
HUB_CONFIG = dict(
    architectures=["Qwen2_5_VLForConditionalGeneration"], attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
    vision_start_token_id=3, vision_end_token_id=4, vision_token_id=5, image_token_id=6, video_token_id=7,
    hidden_act="silu", hidden_size=48, initializer_range=0.2, intermediate_size=101, max_position_embeddings=128000,
    max_window_layers=70, model_type="qwen2_5_vl", num_attention_heads=6, num_hidden_layers=3, num_key_value_heads=2,
    rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768, torch_dtype="bfloat16",
    transformers_version="4.41.2", use_cache=True, use_sliding_window=False, vocab_size=263,
    rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2]),
    vision_config=dict(depth=2, hidden_act="silu", hidden_size=32, intermediate_size=67, num_heads=2, in_chans=3,
                       out_hidden_size=48, patch_size=14, spatial_merge_size=2, spatial_patch_size=14, window_size=56,
                       fullatt_block_indexes=[1], tokens_per_second=2, temporal_patch_size=2))


def read_and_export(tiny_folder, *folders):
    """What each of two ranks does: from_pretrained reads all there is, we our own rows."""
    device, mesh = start_processes()
    for folder in folders:
        policy = Policy.load(folder, device, torch.float32, mesh, torch.float32)
        theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        for (name, ours), (_, whole) in zip(policy.named_parameters(), theirs.named_parameters(), strict=True):
            rows = (*whole.chunk(2), whole[:0])[mesh.get_rank()]  # of an odd number rank 0 has one more, of one all
            assert torch.equal(ours.to_local(), rows), name
        for (name, ours), (_, reference) in zip(policy.named_buffers(), theirs.named_buffers(), strict=True):
            assert torch.equal(ours, reference), name
        export(folder + "/two", policy, load_processor(tiny_folder, 784, 12544), file_bytes=80_000)


def gradients_and_export(groups, processor, folder, out):
    """Of as many ranks as there are: each has its share of the groups, and rank 0 writes what all have together."""
    device, mesh = start_processes()
    policy = Policy.load(folder, device, torch.float64, mesh, torch.float64)
    logprobs, _ = policy(pack(groups[mesh.get_rank() :: mesh.size()]))
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()}
    if mesh.get_rank() == 0:
        save_file(gradients, out + ".safetensors")
    export(out, policy, processor, torch.float64)


@both_families
def test_two_ranks_equal_one_when_one_has_no_image(processes, tiny_folder, processor, prompts, tmp_path):
    """Rank 0 has rows with one and two images, rank 1 one of text alone: gradients of every weight, and the export."""
    groups, two = responses_to([prompts[i] for i in (0, 2, 3)]), str(tmp_path / "two")
    ranks(2, gradients_and_export, groups, processor, tiny_folder, two)
    policy = Policy.load(tiny_folder, processes[0], torch.float64, processes[1], torch.float64)
    for share in (groups[::2], groups[1::2]):
        logprobs, _ = policy(pack(share))
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    found, weights = load_file(two + ".safetensors"), load_file(os.path.join(two, "model.safetensors"))
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad.full_tensor(), atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(weights[hub_name(policy.config, name)], parameter.full_tensor()), name
    named = "deepstack" if policy.config.model_type == "qwen3_vl" else "merger"
    assert all(gradient.any() for name, gradient in found.items() if named in name and name.endswith("weight"))


def hub_folder(folder, tied: bool) -> str:
    """A tiny model in the files, names and layout that the hub has for Qwen2.5-VL 3B (tied) and 7B (untied)."""
    folder.mkdir()
    config = HUB_CONFIG | dict(tie_word_embeddings=tied)
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).to(torch.bfloat16)
    model.save_pretrained(folder / "new")
    weights = load_file(folder / "new" / "model.safetensors")
    assert all(HUB_NAMES.fullmatch(name) for name in weights) and ("lm_head.weight" in weights) == (not tied)
    names = sorted(weights)
    files = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
             "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_hubs_files_are_read_and_exported_on_one_and_two_ranks(tiny_folder, processor, processes, tmp_path):
    """Every rank holds exactly its rows; whatever wrote an export, from_pretrained finds the same tensors in it."""
    folders = [hub_folder(tmp_path / name, tied) for name, tied in (("3B", True), ("7B", False))]
    ranks(2, read_and_export, tiny_folder, *folders)
    for folder in folders:
        theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        policy = Policy.load(folder, processes[0], torch.float32, processes[1], torch.float32)
        for (name, ours), (_, reference) in zip(policy.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(ours.full_tensor(), reference), name
        frequencies = 1e6 ** (-torch.arange(0, 8, 2) / 8)  # heads of 8: the flat layout's rope_theta has arrived
        torch.testing.assert_close(policy.model.language_model.rotary_emb.inv_freq, frequencies)
        export(os.path.join(folder, "one"), policy, processor, file_bytes=80_000)
        names = set(json.load(open(os.path.join(folder, "model.safetensors.index.json")))["weight_map"])
        for path in (os.path.join(folder, name) for name in ("one", "two")):
            index = json.load(open(os.path.join(path, "model.safetensors.index.json")))
            assert set(index["weight_map"]) == names
            sizes = [os.path.getsize(os.path.join(path, file)) for file in set(index["weight_map"].values())]
            assert len(sizes) > 3 and max(sizes) < 90_000 and index["metadata"]["total_size"] < sum(sizes)
            again = AutoModelForImageTextToText.from_pretrained(path)
            assert again.dtype == torch.bfloat16
            for (name, ours), (_, reference) in zip(again.named_parameters(), theirs.named_parameters(), strict=True):
                assert torch.equal(ours.float(), reference), name


def test_sync_makes_the_replica_the_rounded_policy(policy, tiny_folder, processes):
    replica = Policy.load(tiny_folder, processes[0], torch.bfloat16)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.7)
    policy(pack([dummy_group()]))  # leaves the root gathered, as an evaluation does
    sync(policy, replica)
    for master, copy in zip(policy.parameters(), replica.parameters(), strict=True):
        assert torch.equal(master.full_tensor().bfloat16(), copy)


@both_families
@pytest.mark.parametrize("file_bytes", [4 << 30, 100_000])
def test_an_export_loads_everywhere_and_answers_alike(policy, replica, tiny_folder, processor, prompts, side,
                                                      tmp_path, file_bytes):
    folder = str(tmp_path / "model")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    export(folder, policy, processor, torch.float32, file_bytes)
    assert os.path.exists(os.path.join(folder, "model.safetensors.index.json")) == (file_bytes < 1 << 30)
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    for (name, ours), (_, reference) in zip(policy.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), reference), name
    sync(policy, replica)
    reloaded = Policy.load(folder, "cpu", torch.float32)
    greedy = [generate(model, prompts, [0] * 5, 1, 12, 0, 1.0, 8, len(processor.tokenizer))
              for model in (replica, reloaded)]
    assert greedy[0] == greedy[1]
    size = AutoProcessor.from_pretrained(folder).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (side**2, 16 * side**2)  # training's limits travel along


@all_families
def test_export_writes_the_names_of_the_hub(policy, processor, tiny_folder, tmp_path):
    export(str(tmp_path / "model"), policy, processor, torch.float32)
    ours, theirs = (load_file(os.path.join(f, "model.safetensors")).keys()
                    for f in (str(tmp_path / "model"), tiny_folder))
    assert set(ours) == set(theirs)
    ours = ("model.visual.blocks.0.x", "model.language_model.layers.0.x", "lm_head.weight")
    hubs = ours if policy.config.model_type == "qwen3_vl" else ("visual.blocks.0.x", "model.layers.0.x", ours[2])
    assert tuple(hub_name(policy.config, name) for name in ours) == hubs


@pytest.mark.parametrize("family", ["qwen3_vl"], indirect=True)
def test_the_hubs_files_of_qwen3_vl_load_as_those_that_transformers_5_writes(tiny_folder, samples, processor, tmp_path):
    """The hub's config.json has rope_theta beside rope_scaling; its processor's files are those of transformers 4."""
    ours = json.loads((Path(tiny_folder) / "config.json").read_text())
    rope = ours["text_config"].pop("rope_parameters")
    ours["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": {
        "mrope_interleaved": True, "mrope_section": rope["mrope_section"], "rope_type": "default"}}
    images = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2,
              "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor",
              "image_processor_type": "Qwen2VLImageProcessorFast"}
    files = {"config.json": ours, "preprocessor_config.json": images,
             "chat_template.json": {"chat_template": demo.CHAT_TEMPLATE}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        os.symlink(os.path.join(tiny_folder, name), tmp_path / name)
    size = processor.image_processor.size
    hubs = load_processor(str(tmp_path), size.shortest_edge, size.longest_edge)
    rows = [pack([(data.encode_prompt(samples[0], each), [[5, 6, 7]])]) for each in (processor, hubs)]
    logprobs = [Policy.load(folder, "cpu", torch.float32)(row, 1.0)[0]
                for folder, row in zip((tiny_folder, str(tmp_path)), rows)]
    assert torch.equal(*logprobs)


def test_a_failed_export_leaves_the_old_one(policy, processor, tmp_path, monkeypatch):
    folder = str(tmp_path / "model")
    export(folder, policy, processor, torch.float32)
    before = sorted(os.listdir(folder))
    monkeypatch.setattr("engine.weights.changed_files", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export(folder, policy, processor, torch.float32)
    assert sorted(os.listdir(folder)) == before


def test_missing_and_wrong_models_are_one_line(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="neither a folder nor"):
        Policy.load(str(tmp_path / "absent"), "cpu")
    with pytest.raises(InputError, match="no config.json"):
        Policy.load(str(tmp_path), "cpu")
    for name in ("config.json",):
        (tmp_path / name).write_bytes(open(os.path.join(tiny_folder, name), "rb").read())
    with pytest.raises(InputError, match="in .*safetensors .* is missing"):
        Policy.load(str(tmp_path), "cpu")
    weights = load_file(os.path.join(tiny_folder, "model.safetensors"))
    weights["visual.merger.mlp.0.bias"] = weights["visual.merger.mlp.0.bias"][:-1].clone()
    save_file(weights, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="visual.merger.mlp.0.bias is .* config.json says"):
        Policy.load(str(tmp_path), "cpu")
    del weights["visual.merger.mlp.0.bias"]
    save_file(weights, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="visual.merger.mlp.0.bias is missing, config.json says"):
        Policy.load(str(tmp_path), "cpu")
    config = json.load(open(tmp_path / "config.json"))
    json.dump(config | {"model_type": "llama"}, open(tmp_path / "config.json", "w"))
    with pytest.raises(InputError, match="llama"):
        Policy.load(str(tmp_path), "cpu")
