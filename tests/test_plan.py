"""The memory plan against what is really allocated: sizes of storages, and the allocator's own record of a step."""
import dataclasses
import gc
import json
import os
from unittest import mock

import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels or to compile them")

import torch
from torch.autograd.profiler import profile
from transformers import AutoConfig, AutoModelForImageTextToText

import train
import worst
from data import InputError
from engine import plan, sampler
from engine.plan import (
    GB,
    advice,
    always_bytes,
    head_bytes,
    make_optimizer,
    make_plan,
    most_slots,
    rollout_bytes,
    shape_of,
    training_bytes,
    worst_row,
)
from engine.policy import Policy, dummy_group, pack
from engine.sampler import BURST, generate
from conftest import both_families
from kernels import logprob
from train import read_config
from triton_interpreter import interpreted
from worst import blank_prompt, worst_groups, worst_prompts, worst_rollout


CONFIGS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "speed", "configs")


def resized(config, hidden=192, mlp=512, layers=2, blocks=3, vision_hidden=64, vision_mlp=128):
    """A tiny model's config with layers in which the activations are what counts."""
    changed = config.to_dict()
    text, vision = changed["text_config"], changed["vision_config"]
    head = hidden // 4
    text |= dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=4,
                 num_key_value_heads=2, layer_types=["full_attention"] * layers)
    if "head_dim" in text:  # Qwen3-VL: heads that are wider together than the hidden size
        text["head_dim"] = head = hidden // 2 // 2
        vision["deepstack_visual_indexes"] = [0, blocks - 1]
    text["rope_parameters"]["mrope_section"] = [head // 8, head // 8, head // 2 - 2 * (head // 8)]
    vision |= dict(depth=blocks, hidden_size=vision_hidden, intermediate_size=vision_mlp, num_heads=4,
                   out_hidden_size=hidden, fullatt_block_indexes=[blocks - 1], window_size=448)  # few windows
    if "embed_dim" in vision:  # Qwen2-VL calls them otherwise
        vision |= dict(embed_dim=vision_hidden, mlp_ratio=vision_mlp // vision_hidden, hidden_size=hidden)
        vision.pop("intermediate_size")
    return type(config).from_dict(changed)


def allocated_peak(function) -> int:
    """The most bytes that the CPU allocator had handed out during a call, beyond those from before it."""
    with profile(profile_memory=True) as record:  # its raw events: the tree that it makes of them takes seconds
        function()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def settings(*argv):
    return read_config(["--stage", "1", "--plan", "--model", "m", "--clip_weight", "0", *argv])


def bytes_of(tensors) -> int:
    """Bytes of the local storages, each counted once."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


@pytest.mark.parametrize("name, total, vision", [("3b", 3.755e9, 0.669e9), ("7b", 8.292e9, 0.677e9)])
def test_the_hub_configs_have_the_published_sizes(name, total, vision):
    shape = shape_of(os.path.join(CONFIGS, f"qwen2.5-vl-{name}.json"))
    assert shape.total == pytest.approx(total, rel=1e-3) and shape.vision == pytest.approx(vision, rel=1e-3)
    assert shape.kv * 2 * 2 * shape.layers == {"3b": 36, "7b": 56}[name] * 1024  # bytes of cache a token, in bf16


def test_weights_moments_and_gradients_are_what_is_allocated(tiny_folder, processes):
    """Exactly, in float32 on one process: what `always` and the gradients' row count."""
    config = settings("--dtype", "float32")
    device, mesh = processes
    policy = Policy.load(tiny_folder, device, torch.float32, mesh, torch.float32)
    optimizer = make_optimizer(policy, config)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    planned = always_bytes(config, shape_of(tiny_folder), 1)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = {"master weights, fp32": bytes_of(policy.parameters()), "Adam's moments, fp32": bytes_of(moments)}
    weights = bytes_of(Policy.load(tiny_folder, device, torch.float32).parameters())
    found |= {"sampler's copy of the weights": weights, "reference policy": weights}
    assert planned == found
    gradients = training_bytes(config, shape_of(tiny_folder), 1)["gradients, fp32"]
    assert gradients == bytes_of(p.grad for p in policy.parameters())


STEPS = {  # name: (changes of the model, flags)
    "checkpointed": ({}, []),
    "all activations kept": ({}, ["--no_gradient_checkpointing"]),
    "wide mlp, float32": (dict(mlp=1024), ["--dtype", "float32"]),
    "vision": (dict(hidden=64, mlp=128, layers=1, vision_hidden=128, vision_mlp=384), ["--max_pixels", "300000"]),
    "vision, all kept": (dict(hidden=64, mlp=128, layers=1, vision_hidden=128), ["--no_gradient_checkpointing"]),
    "vision frozen": (dict(vision_hidden=128, vision_mlp=384), ["--freeze_vision", "True"]),
    "LoRA": ({}, ["--lora_rank", "8"]),
    "LoRA, all activations kept": (dict(mlp=1024), ["--lora_rank", "8", "--no_gradient_checkpointing"]),
    "LoRA of the vision tower": (dict(hidden=64, mlp=128, layers=1, vision_hidden=128, vision_mlp=384),
                                 ["--max_pixels", "300000", "--lora_rank", "8", "--lora_vision", "True"]),
}


@pytest.mark.parametrize("family, name", [
    *(("qwen2_5_vl", name) for name in STEPS), *(("qwen3_vl", name) for name in (
        "checkpointed", "all activations kept", "vision", "vision, all kept", "LoRA of the vision tower")),
    ("qwen2_vl", "vision, all kept")], indirect=["family"])
def test_the_planned_peak_of_a_step_is_within_a_tenth_of_the_allocators(tiny_folder, processes, tmp_path, name):
    """The worst row forward and backward in FSDP2; gradients from an earlier row are there already."""
    changes, flags = STEPS[name]
    config = settings("--token_budget", "3600", "--max_prompt", "600", "--max_response", "600", "--group_size", "4",
                      "--max_pixels", "200000", *flags)
    model_config = resized(AutoConfig.from_pretrained(tiny_folder), **changes)
    AutoModelForImageTextToText.from_config(model_config, dtype=torch.float32).save_pretrained(tmp_path)
    dtype, lora = getattr(torch, config.dtype), config.lora_rank > 0
    policy = Policy.load(str(tmp_path), processes[0], dtype if lora else torch.float32, processes[1], dtype,
                         lora=config if lora else None)
    policy.prepare_training(config.freeze_vision, config.gradient_checkpointing)
    groups = worst_groups(config, model_config)
    row = worst_row(config, model_config.vision_config)
    packed = pack(groups)
    assert packed.input_ids.shape[1] == row.tokens == config.token_budget and len(packed.targets) == row.response
    assert len(packed.pixel_values) == pytest.approx(row.prompts * row.patches, rel=0.06)  # a rectangle of patches

    def step(groups):
        packed = pack(groups)
        loss, _, _ = policy(packed, 1.0, lambda logprobs, entropies, rows: 0 * logprobs.sum())
        loss.backward()

    @torch.no_grad()
    def score():
        for model in (policy, reference):
            with reference.adapters_off():
                model(pack(groups))
        reference.reshard()

    reference = policy if lora else Policy.load(str(tmp_path), processes[0], torch.float32, processes[1], dtype)
    step([dummy_group()])
    gc.collect()
    planned = training_bytes(config, shape_of(str(tmp_path)), 1)
    planned.pop("gradients, fp32")
    if name in ("vision frozen", "LoRA"):  # the steps that take least
        assert allocated_peak(score) < sum(planned.values())
    assert allocated_peak(lambda: step(groups)) == pytest.approx(sum(planned.values()), rel=0.1)


def test_a_warm_up_with_held_out_questions_is_planned_with_its_sampler():
    flags = ["--stage", "sft", "--plan", "--model", "qwen2.5-vl-3b", "--eval_data", "x", "--eval_every", "5"]
    config = train.read_config(flags)
    plan = make_plan(config, shape_of(config.model), 8, 80 * GB)
    assert plan.slots > 1 and "rollout" in plan.phases and "sampler's copy of the weights" in plan.phases["always"]


@pytest.mark.parametrize("N, chunk", [(96, 32), (24, 32)])
def test_the_head_takes_what_is_planned(N, chunk):
    """The kernels as a GPU runs them, interpreted: logits of one chunk, both gradients."""
    H, V = 64, 8192
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets = torch.arange(N)
    with interpreted(logprob):
        found = allocated_peak(lambda: logprob.linear_logprob_loss(
            hidden, weight, targets, lambda logprobs, entropies, rows: logprobs.sum(), 1.0, chunk))
    assert found == pytest.approx(head_bytes(N, H, V, 4, chunk), rel=0.1)


@both_families
def test_the_planned_peak_of_a_rollout_is_within_a_tenth_of_the_allocators(tiny_folder, replica, processor,
                                                                           monkeypatch):
    """Every slot's cache at its full length; a cache this long is most of it."""
    config = settings("--dtype", "float32", "--slots", "16", "--max_prompt", "300", "--max_response", "2000",
                      "--max_pixels", "12544", "--group_size", "8")
    assert [len(prompt.input_ids) for prompt in worst_prompts(config, replica.config)] == [300, 300]

    def rollout():
        worst_rollout(config, replica, len(processor.tokenizer))

    rollout()
    shape = shape_of(tiny_folder)
    cache = next(iter(rollout_bytes(config, shape, 16).values()))
    head = replica.config.text_config.to_dict().get("head_dim", 32)
    assert cache == 2 * 4 * 16 * (300 + 2000 + BURST) * 2 * 2 * head  # K and V, fp32, .., layers, heads
    monkeypatch.setattr(plan, "PREFILL", 300)  # both prompts are in one row of 600 tokens
    assert allocated_peak(rollout) == pytest.approx(sum(rollout_bytes(config, shape, 16).values()), rel=0.1)


class Read(Exception):
    """Ends a rollout when its first row of prompts is to be read."""


@pytest.mark.parametrize("flags", [[], ["--max_prompt", "600", "--max_response", "30000", "--token_budget", "40000"],
                                   ["--slots", "16"]])
def test_the_worst_rollout_is_what_generate_takes_at_most(tiny_folder, replica, monkeypatch, flags):
    """Slots, length of the cache, and the first row that `generate` reads of prompts as long as they may be."""
    config, taken = settings("--slots", "128", *flags), []

    def make_slots(model, *sizes):
        return mock.Mock(sizes=sizes, rows=torch.arange(1))

    def read(self, prompts, slots, uniform):
        taken.append((self.state.sizes, [len(p.input_ids) for p in prompts], list(map(len, slots)), uniform.shape))
        raise Read

    for module in (worst, sampler):
        monkeypatch.setattr(module, "Slots", make_slots)
    monkeypatch.setattr(sampler.Decoder, "prefill", read)
    prompts = [blank_prompt(1, 4, config.max_prompt, replica.config)] * 20
    with pytest.raises(Read):
        generate(replica, prompts, [0] * 20, 8, config.max_response, 1.2, 1.0, config.slots, 9)
    with pytest.raises(Read):
        worst_rollout(config, replica, 9)
    assert taken[0] == taken[1]


@pytest.mark.parametrize("flags", [
    [], ["--max_prompt", "16", "--max_response", "4"], ["--max_pixels", "600"], ["--token_budget", "4096"],
    ["--max_prompt", "8", "--max_response", "8", "--token_budget", "16", "--slots", "8"]])
def test_the_worst_row_can_be_packed_whatever_the_limits(tiny_folder, flags):
    """Prompts of any size, images of one token, budgets below one chunk of logits: every response has a token."""
    config, model_config = settings(*flags), AutoConfig.from_pretrained(tiny_folder)
    groups = worst_groups(config, model_config)
    packed = pack(groups)
    assert len(packed.targets) == len(packed.predictors) == sum(len(ids) for _, replies in groups for ids in replies)
    assert all(len(ids) for _, replies in groups for ids in replies)
    assert packed.input_ids.shape[1] == max(config.token_budget, 8 * len(groups) + len(groups[0][0].input_ids))
    assert len(worst_prompts(config, model_config)[0].input_ids) <= config.max_prompt + config.max_response


def test_the_slots_chosen_are_the_most_whole_groups_that_fit():
    config, shape = settings(), shape_of(os.path.join(CONFIGS, "qwen2.5-vl-3b.json"))
    for room in (10 * GB, 20 * GB, 30 * GB):
        slots = most_slots(config, shape, room)
        assert slots % 8 == 0 and sum(rollout_bytes(config, shape, slots).values()) <= room
        assert slots == 256 or sum(rollout_bytes(config, shape, slots + 8).values()) > room
    assert most_slots(config, shape, 1 * GB) == 0 and most_slots(config, shape, 1e15) == 256


def test_more_gpus_divide_what_is_sharded_and_nothing_else():
    config, shape = settings(), shape_of(os.path.join(CONFIGS, "qwen2.5-vl-7b.json"))
    one, eight = (always_bytes(config, shape, n) for n in (1, 8))
    for name in one:
        shares = 1 if name.startswith("sampler") else 8
        assert one[name] == shares * eight[name], name


@pytest.mark.parametrize("model, gpus, gb", [("3b", 1, 80), ("7b", 1, 141)])
def test_advice_names_flags_with_which_it_does_fit(model, gpus, gb):
    """Neither fits as it is; what is advised does, and without any one of its flags it does not."""
    config, shape = settings(), shape_of(os.path.join(CONFIGS, f"qwen2.5-vl-{model}.json"))
    assert not make_plan(config, shape, gpus, gb * GB).fits
    words = advice(config, shape, gpus, gb * GB).split(" or ")[0].split()
    assert words.pop(0) == "with"
    assert make_plan(settings(*words), shape, gpus, gb * GB).fits
    for i in range(0, len(words), 2):
        assert not make_plan(settings(*words[:i], *words[i + 2 :]), shape, gpus, gb * GB).fits, words[i]


def test_every_saving_saves():
    config, shape = settings("--no_gradient_checkpointing", "--slots", "256"), shape_of(
        os.path.join(CONFIGS, "qwen2.5-vl-7b.json"))
    peaks = [make_plan(config, shape, 1, 80 * GB).phases]
    savings = dict(gradient_checkpointing=True, token_budget=8192, slots=0, kl_coef=0, freeze_vision=True, lora_rank=16)
    for name, value in savings.items():
        config = dataclasses.replace(config, **{name: value})
        peaks.append(make_plan(config, shape, 1, 80 * GB).phases)
    assert len(peaks) == 7
    totals = [sum(sum(rows.values()) for rows in phases.values()) for phases in peaks]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


def test_the_command_prints_a_plan_without_data_weights_or_gpu(tmp_path, capsys):
    out = ["--out", str(tmp_path / "runs")]
    model = ["--model", os.path.join(CONFIGS, "qwen2.5-vl-7b.json")]
    for stage in ("sft", "sample", "1", "2"):
        assert train.main(["--stage", stage, "--plan", "--gpus", "8", "--gpu_gb", "80", *model, *out]) == 0
        text = capsys.readouterr().out
        assert "8.29 B parameters" in text and "fits" in text and ("slots (chosen)" in text) == (stage != "sft")
        assert ("master weights" in text) == (stage != "sample")
    assert train.main(["--stage", "1", "--plan", "--gpus", "1", *model, *out]) == 0
    assert "does not fit; fits with --lora_rank 16 or on 4 such GPUs as it is" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    torn = tmp_path / "config.json"
    torn.write_text(json.dumps({"model_type": "llama"}))
    assert train.main(["--stage", "1", "--plan", "--model", str(torn)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_plan_for_a_model_yet_to_be_made_is_that_of_its_base(tmp_path):
    assert read_config(["--stage", "1", "--plan", "--out", str(tmp_path)]).model == "Qwen/Qwen2.5-VL-7B-Instruct"
    wrong = str(tmp_path / "modle")  # of a name that was given, no other model is planned
    assert read_config(["--stage", "1", "--plan", "--out", str(tmp_path), "--model", wrong]).model == wrong
    for flags in ([], ["--plan", "False"]):
        with pytest.raises(InputError, match="is missing"):
            read_config(["--stage", "1", "--out", str(tmp_path), *flags])
