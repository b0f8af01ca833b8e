"""LoRA: adapters beside frozen weights are the merged weights, start as the base model, and are PEFT's.

And in the stages: the reference is the policy without them, the sampler shares what is frozen, and what is saved,
resumed, exported and divided over ranks are the adapters.
"""
import importlib.util
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import demo
import train
from conftest import both_families
from data import InputError
from engine.lora import adapted, add_adapters, merged, save_adapter, start_adapters
from engine.plan import GB, always_bytes, load_models, make_plan, shape_of, training_bytes
from engine.policy import Policy, pack
from engine.sampler import sync
from engine.weights import export
from kernels.ops import linear_logprob_loss
from ranks import ranks
from test_train import compare_metrics, largest_difference, metrics, questions, stage_1, weights

__all__ = ["questions"]  # a fixture: rows of stage 1


def lora(rank=4, alpha=8.0, targets="all-linear", vision=False):
    return SimpleNamespace(lora_rank=rank, lora_alpha=alpha, lora_targets=targets, lora_vision=vision)


def adapted_model(processor, config=None, scale=0.05):
    """A tiny model with adapters that are not zero, in float64."""
    model = demo.make_model(processor)
    add_adapters(model, config or lora(), torch.float32)
    start_adapters(model, seed=3)
    generator = torch.Generator().manual_seed(1)
    for module in adapted(model).values():
        module.lora_B.data.normal_(0, scale, generator=generator)
    return model.double()


def logits(model, ids=((5, 9, 2, 7),)):
    return model(input_ids=torch.tensor(ids)).logits


def test_adapters_equal_the_merged_weights(processor):
    model = adapted_model(processor)
    before = logits(model)
    for name, module in adapted(model).items():
        module.weight.data = merged(model, f"{name}.weight", torch.float64)
    with Policy.adapters_off(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)  # merged in float32


def test_the_first_step_is_the_base_model_bit_for_bit(processor):
    model = demo.make_model(processor)
    base = logits(model)
    add_adapters(model, lora(), torch.float32)
    start_adapters(model, seed=3)
    assert torch.equal(logits(model), base)


def test_with_adapters_off_the_model_is_the_base_model(processor):
    model = adapted_model(processor)
    with Policy.adapters_off(model):
        off = logits(model)
    assert torch.equal(off, logits(demo.make_model(processor).double())) and not torch.equal(off, logits(model))


def test_only_adapters_are_trained_and_their_gradient_is_that_of_the_product(processor):
    # y = x W^T + s (x A^T) B^T, so dL/dB = s dL/dy^T (x A^T) and dL/dA = s B^T dL/dy^T x.
    model = adapted_model(processor)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    module = next(iter(adapted(model).values()))
    x, dy = torch.randn(5, module.in_features).double(), torch.randn(5, module.out_features).double()
    module(x).backward(dy)
    scale = 8.0 / 4
    torch.testing.assert_close(module.lora_B.grad, scale * dy.T @ (x @ module.lora_A.T))
    torch.testing.assert_close(module.lora_A.grad, scale * module.lora_B.T @ dy.T @ x)


@pytest.mark.parametrize("config, adapters", [
    (lora(4, 8.0), 2 * 7), (lora(4, 8.0, "attention"), 2 * 4), (lora(4, 8.0, "q_proj,v_proj"), 2 * 2),
    (lora(4, 8.0, "attention", vision=True), 2 * 4 + 5)])  # a vision block: qkv, proj, gate, up, down
def test_targets_choose_the_layers(processor, config, adapters):
    assert len(adapted(adapted_model(processor, config))) == adapters


@pytest.mark.parametrize("config, reason", [
    (lora(65, 8.0), "at most 64"), (lora(4, 8.0, "q_prj"), "q_prj: give all-linear, attention, or some of .*q_proj"),
    (lora(4, 8.0, "lm_head"), "lm_head: give all-linear")])
def test_a_rank_or_target_that_does_not_fit_is_refused(processor, config, reason):
    with pytest.raises(InputError, match=reason):
        add_adapters(demo.make_model(processor), config, torch.float32)


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
def test_peft_loads_the_adapter_with_equal_outputs_and_gradients(processor, tmp_path):
    from peft import PeftModel

    model = adapted_model(processor)
    save_adapter(str(tmp_path / "adapter"), model, "base", writer=True)
    theirs = PeftModel.from_pretrained(demo.make_model(processor), tmp_path / "adapter", is_trainable=True).double()
    ours_out, their_out = logits(model), logits(theirs)
    torch.testing.assert_close(their_out, ours_out, rtol=0, atol=1e-6)  # the file is float32
    for out in (ours_out, their_out):
        out.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    for name, module in adapted(model).items():
        for part in ("lora_A", "lora_B"):
            torch.testing.assert_close(gradients[f"base_model.model.{name}.{part}.default.weight"],
                                       getattr(module, part).grad, rtol=1e-4, atol=1e-9)


# ------------------------------------------------------------------------------------------ in the stages

FLAGS = ["--lora_rank", "4", "--lora_alpha", "8", "--lr", "1e-3", "--epochs", "2", "--save_every", "1"]


def settings(*argv):
    return train.read_config(["--stage", "1", "--plan", "--model", "m", "--clip_weight", "0", "--lora_rank", "4",
                              *argv])


@pytest.fixture(scope="module")
def run(tiny_folder, questions, tmp_path_factory):
    """Two steps of stage 1 with adapters, on one process; a checkpoint after each."""
    out = tmp_path_factory.mktemp("lora")
    assert train.main(stage_1(tiny_folder, questions, out, *FLAGS)) == 0
    return str(out / "stage1")


def moved(policy):
    """Adapters that are not zero."""
    for module in adapted(policy).values():
        module.lora_B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return policy


def test_stage_1_moves_the_merged_weights_and_the_reference_stays_the_base(run, tiny_folder):
    first, second = metrics(run)
    before = load_file(os.path.join(tiny_folder, "model.safetensors"))
    after = weights(run)
    targets = {name for name in after if ".layers." in name and name.endswith("proj.weight")}
    base = {name.replace("model.visual", "visual").replace("model.language_model", "model"): weight
            for name, weight in before.items()}
    assert {name for name in after if not torch.equal(after[name], base[name])} == targets
    assert second["policy/kl"] > 0 and first["opt/skipped"] == 0
    assert max(first["policy/sampler_gap"], second["policy/sampler_gap"]) < 2e-5  # float32: the sampler has them too


def test_a_checkpoint_holds_adapters_and_their_moments_only(run):
    path = os.path.join(run, "checkpoints", "step-000002")
    names = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    saved = {name for name in names if name.startswith("weights.")}
    assert len(saved) == 2 * 7 * 2 and all(name.endswith(("lora_A", "lora_B")) for name in saved)
    assert not [name for name in names if "optimizer.state" in name and "lora_" not in name]


def test_resuming_adapters_continues_bit_for_bit(run, tiny_folder, questions, tmp_path):
    whole = shutil.copytree(run, tmp_path / "whole")
    for name in ("model", "adapter", "checkpoints/step-000002"):
        shutil.rmtree(os.path.join(run, name))
    assert train.main(stage_1(tiny_folder, questions, os.path.dirname(run), *FLAGS)) == 0
    assert largest_difference(weights(run), weights(whole)) == 0
    compare_metrics(run, whole)
    adapters = [load_file(os.path.join(folder, "adapter", "adapter_model.safetensors")) for folder in (run, whole)]
    assert largest_difference(*adapters) == 0


def test_two_processes_equal_one_with_adapters(run, tiny_folder, questions, tmp_path):
    argv = stage_1(tiny_folder, questions, tmp_path, *FLAGS)
    ranks(2, train.main, argv)
    assert largest_difference(weights(tmp_path / "stage1"), weights(run)) < 2e-4
    compare_metrics(str(tmp_path / "stage1"), run)


def test_bfloat16_weights_and_float32_adapters_are_sharded_together(tiny_folder, questions, tmp_path):
    """As on GPUs: two ranks, activations computed again, adapters in both towers."""
    argv = stage_1(tiny_folder, questions, tmp_path, *FLAGS[:4], "--lr", "1e-3", "--dtype", "bfloat16",
                   "--gradient_checkpointing", "True", "--lora_vision", "True")
    ranks(2, train.main, argv)
    (step,) = metrics(tmp_path / "stage1")
    assert step["opt/skipped"] == 0 and step["opt/grad_norm"] > 0 and step["policy/sampler_gap"] < 0.05


@both_families
def test_the_export_of_untrained_adapters_is_the_base_bit_for_bit(tiny_folder, processes, processor, tmp_path):
    policy = Policy.load(tiny_folder, processes[0], torch.float32, processes[1], torch.float32, lora=settings())
    plain = Policy.load(tiny_folder, processes[0], torch.float32, processes[1], torch.float32)
    for name, model in (("model", policy), ("plain", plain)):
        export(str(tmp_path / name), model, processor)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "plain"))
    assert largest_difference(ours, theirs) == 0
    assert os.path.exists(tmp_path / "adapter" / "adapter_config.json")


@both_families
def test_without_adapters_the_policy_is_the_sharded_base(tiny_folder, processes, prompts):
    """In bfloat16, as shards compute: exactly."""
    device, mesh = processes
    packed = pack([(prompts[0], [[5, 6, 7], [9]])])
    policy = moved(Policy.load(tiny_folder, device, torch.bfloat16, mesh, lora=settings()))
    plain, _ = Policy.load(tiny_folder, device, torch.float32, mesh)(packed)
    with policy.adapters_off():
        off, _ = policy(packed)
    assert torch.equal(off, plain) and not torch.equal(policy(packed)[0], plain)


@both_families
@pytest.mark.parametrize("flags", [[], ["--lora_vision", "True"]], ids=str)
def test_on_one_process_the_frozen_weights_are_there_once(tiny_folder, processes, prompts, flags):
    """The reference is the policy, the sampler has its storage; in bfloat16 all three compute the same."""
    config = settings(*flags)
    policy, reference, replica = load_models(config, tiny_folder, *processes)
    assert reference is policy
    moved(policy)
    sync(policy, replica)
    for (name, ours), copy in zip(policy.named_parameters(), replica.parameters(), strict=True):
        shared = ours.to_local().data_ptr() == copy.data_ptr()
        assert shared == (not ours.requires_grad) == ("lora_" not in name), name
    packed = pack([(prompts[0], [[5, 6, 7], [9]])])
    torch.testing.assert_close(policy(packed)[0], replica(packed)[0], rtol=0, atol=1e-6)


def test_a_frozen_head_takes_no_gradient_and_the_rest_is_exact():
    hidden, weight, targets = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8), torch.arange(6)
    gradients = []
    for trained in (True, False):
        weight = weight.detach().requires_grad_(trained)
        hidden.grad = None
        linear_logprob_loss(hidden, weight, targets, lambda logprobs, *_: logprobs.sum())[0].backward()
        gradients.append(hidden.grad)
        assert (weight.grad is not None) == trained
    assert torch.equal(*gradients)


# --------------------------------------------------------------------------------------------- memory


def allocated(tensors) -> int:
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


@both_families
def test_the_training_state_is_what_is_planned_and_below_a_third_of_full_finetunings(tiny_folder, processes):
    """Weights, moments, gradients, the sampler's copy and the reference: bytes of their storages, each once."""
    found = {}
    for rank in ("8", "0"):
        config = settings("--lora_rank", rank)
        models = load_models(config, tiny_folder, *processes)
        optimizer = train.make_optimizer(models[0], config)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        gradients = [weight.grad for weight in models[0].parameters() if weight.grad is not None]
        found[rank] = allocated([*(weight for model in models for weight in model.parameters()), *moments, *gradients])
        shape = shape_of(tiny_folder)
        planned = sum(always_bytes(config, shape, 1).values()) + training_bytes(config, shape, 1)["gradients, fp32"]
        assert found[rank] == planned
    assert found["8"] < found["0"] / 3


@pytest.mark.parametrize("gb", [16, 24])
def test_the_small_recipe_fits_every_stage_on_one_card(gb):
    for stage in ("sft", "sample", "1", "2"):
        flags = ["--stage", stage, "--plan", "--model", "qwen2.5-vl-3b", "--recipe", "small"]
        config = train.read_config(flags)
        assert config.lora_rank == 16 and make_plan(config, shape_of(config.model), 1, gb * GB).fits, stage
    # eval.py holds what stage sample does, and CLIP
    assert train.main([*flags, "--gpus", "1", "--gpu_gb", str(gb), "--clip_weight", "1"]) == 0


def test_a_recipe_gives_way_to_the_command_line():
    assert settings("--recipe", "small", "--lora_rank", "8").lora_rank == 8
    assert settings("--recipe=small").token_budget == train.RECIPES["small"]["token_budget"]


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("flags, reason", [
    (["--lora_rank", "-1"], "--lora_rank -1 is not in"), (["--lora_rank", "400"], "--lora_rank 400: a layer has only"),
    (["--lora_rank", "4", "--lora_alpha", "0"], "--lora_alpha 0.0 is not in"),
    (["--lora_rank", "4", "--lora_targets", "q_porj"], "some of down_proj,"),
    (["--lora_rank", "4", "--lora_targets", ""], "give all-linear"),
    (["--recipe", "large"], "invalid choice: 'large'")])
def test_bad_flags_of_adapters_are_one_line(tiny_folder, questions, tmp_path, capsys, flags, reason):
    assert train.main(stage_1(tiny_folder, questions, tmp_path, *flags)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and reason in error


def test_an_adapter_folder_is_no_model(run, questions, tmp_path, capsys):
    adapter = os.path.join(run, "adapter")
    about = json.loads(open(os.path.join(adapter, "adapter_config.json")).read())
    assert (about["r"], about["lora_alpha"], len(about["target_modules"])) == (4, 8.0, 14)
    assert train.main(stage_1(adapter, questions, tmp_path)) == 2
    assert "give the merged model, which training writes beside it" in capsys.readouterr().err


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
def test_peft_on_the_base_is_the_exported_model(run, tiny_folder):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    theirs = PeftModel.from_pretrained(Model.from_pretrained(tiny_folder), os.path.join(run, "adapter"))
    ours = Model.from_pretrained(os.path.join(run, "model"))
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=2e-5)
