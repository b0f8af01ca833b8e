"""LoRA: adapters beside frozen weights are the merged weights, start as the base model, and are PEFT's."""
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import demo
from data import InputError
from engine.lora import adapted, adapters_off, add_adapters, merged, save_adapter, start_adapters


def lora(rank=4, alpha=8.0, targets="all-linear", vision=False):
    return SimpleNamespace(lora_rank=rank, lora_alpha=alpha, lora_targets=targets, lora_vision=vision)


@pytest.fixture(scope="module")
def processor():
    return demo.make_processor(["one two three"])


def adapted_model(processor, settings=None, scale=0.05):
    """A tiny model with adapters that are not zero, in float64."""
    model = demo.make_model(processor)
    add_adapters(model, settings or lora(), torch.float32)
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
    with adapters_off(model):
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)  # merged in float32


def test_the_first_step_is_the_base_model_bit_for_bit(processor):
    model = demo.make_model(processor)
    base = logits(model)
    add_adapters(model, lora(), torch.float32)
    start_adapters(model, seed=3)
    assert torch.equal(logits(model), base)


def test_with_adapters_off_the_model_is_the_base_model(processor):
    model = adapted_model(processor)
    with adapters_off(model):
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


@pytest.mark.parametrize("settings, adapters", [
    (lora(4, 8.0), 2 * 7), (lora(4, 8.0, "attention"), 2 * 4), (lora(4, 8.0, "q_proj,v_proj"), 2 * 2),
    (lora(4, 8.0, "attention", vision=True), 2 * 4 + 5)])  # a vision block: qkv, proj, gate, up, down
def test_targets_choose_the_layers(processor, settings, adapters):
    assert len(adapted(adapted_model(processor, settings))) == adapters


@pytest.mark.parametrize("settings, reason", [
    (lora(0, 8.0), "at most 64"), (lora(65, 8.0), "at most 64"), (lora(4, 8.0, "q_prj"), "did you mean q_proj?"),
    (lora(4, 8.0, "lm_head"), "no decoder layer has lm_head")])
def test_a_rank_or_target_that_does_not_fit_is_refused(processor, settings, reason):
    with pytest.raises(InputError, match=reason):
        add_adapters(demo.make_model(processor), settings, torch.float32)


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
