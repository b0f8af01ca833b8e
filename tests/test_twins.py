"""The fused policy loss is train.py's, and a fork's edit is found: interpreted on a CPU, compiled on a GPU (-m gpu)."""
import math

import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels or to compile them")

import torch

import train
from kernels import grpo, logprob, ops, twins
from test_kernels import GRADIENT_ERROR, distance, exact, problem
from triton_interpreter import device_fixture


SETTINGS = (0.2, 0.3, 3.0, 0.01)  # clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_coef
device = device_fixture(logprob, grpo)

# --------------------------------------------------------------- the kernel against float64


def tokens(N, logprobs, seed=3):
    """Float64 tokens: given log-probs, old and reference ones around them, advantages, weights that add up to 1."""
    g = torch.Generator().manual_seed(seed)
    old, ref = (logprobs + 0.8 * torch.randn(N, generator=g, dtype=torch.float64) for _ in range(2))
    A, weights = torch.randn(N, generator=g, dtype=torch.float64), torch.rand(N, generator=g, dtype=torch.float64)
    return logprobs, old, ref, A, weights / weights.sum()


def compare_losses(device, logprobs, *others, rtol=1e-6, settings=SETTINGS):
    """Loss, gradient and statistics of the kernel in float32 against train.py's in float64, of the same numbers."""
    rounded = [x.float() for x in (logprobs, *others)]
    ours, theirs = rounded[0].clone().to(device).requires_grad_(), rounded[0].double().requires_grad_()
    loss, stats = grpo.grpo_loss(ours, *(x.to(device) for x in rounded[1:]), *settings)
    expected, expected_stats = train.grpo_loss(theirs, *(x.double() for x in rounded[1:]), *settings)
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6, rel=rtol)
    torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, atol=1e-7, rtol=2 * rtol)
    assert list(stats) == list(expected_stats)
    for name, value in stats.items():
        assert value.item() == pytest.approx(expected_stats[name].item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("log_ratio", [-25.0, -1.0, -0.1, 0.0, 0.1, 0.5, 1.0, 1.5, 25.0])
def test_eq_clip_eq_dual_and_eq_kl3_in_every_zone(device, log_ratio):
    """Below, inside, above the clip, beyond dual bound and clamps; good, bad, neutral tokens; KL small and cut."""
    A, gap = torch.cartesian_prod(torch.tensor([2.0, -2.0, 0.0]), torch.tensor([-25.0, -1.0, 0.0, 1.0, 9.0])).T
    logprobs = torch.full((15,), -3.0)
    compare_losses(device, logprobs, logprobs - log_ratio, logprobs + gap, A, torch.full((15,), 1 / 15))


@pytest.mark.parametrize("log_ratio", [-25.0, -15.0])
def test_eq_ratio_has_no_gradient_where_its_clamp_acts(device, log_ratio):
    """The advantage is so large that e^-20 of it could be seen; a GPU's fast exp(-20) is good to 2e-6."""
    logprobs = torch.tensor([-30.0])
    compare_losses(device, logprobs, logprobs - log_ratio, logprobs, torch.tensor([1e9]), torch.ones(1), rtol=5e-6)


@pytest.mark.parametrize("N", [1, 512, 1300])
def test_eq_loss_of_many_tokens(device, N):
    """One program, a full one, several with a ragged end."""
    compare_losses(device, *tokens(N, -3 * torch.rand(N, dtype=torch.float64)), settings=(0.2, 0.3, 3.0, 0.04))


def test_tokens_of_weight_zero_count_nowhere(device):
    logprobs, old, ref, A, weights = tokens(20, torch.full((20,), -1.0, dtype=torch.float64))
    compare_losses(device, logprobs, old - 30 * (weights == 0), ref, A, weights * (torch.arange(20) < 7))
    compare_losses(device, logprobs, old, ref, A, 0 * weights)


def test_a_loss_without_tokens_is_zero(device):
    logprobs = torch.zeros(0, device=device, requires_grad=True)
    loss, stats = grpo.grpo_loss(logprobs, *[torch.zeros(0, device=device)] * 4, *SETTINGS)
    loss.backward()
    assert loss == 0 and logprobs.grad.shape == (0,) and not any(stats.values())


@pytest.mark.parametrize("bad", range(5))
def test_a_nan_anywhere_reaches_the_loss(device, bad):
    vectors = [x.float().to(device) for x in tokens(4, torch.full((4,), -1.0, dtype=torch.float64))]
    vectors[bad][2] = math.nan
    assert grpo.grpo_loss(*vectors, *SETTINGS)[0].isnan()


def test_the_loss_kernel_takes_a_gradient_from_above_and_vectors_in_any_order(device):
    vectors = [x.float().to(device) for x in tokens(30, torch.full((30,), -1.0, dtype=torch.float64))]
    spread = [x.repeat_interleave(2)[::2].requires_grad_() for x in vectors]
    gradients = []
    for logprobs, *others in (vectors, spread):
        logprobs.requires_grad_()
        (3 * grpo.grpo_loss(logprobs, *others, *SETTINGS)[0]).backward()
        gradients.append(logprobs.grad)
    (expected,) = torch.autograd.grad(train.grpo_loss(*vectors, *SETTINGS)[0], vectors[0])
    torch.testing.assert_close(gradients[0], 3 * expected)
    assert torch.equal(*gradients)


def test_the_grpo_kernel_inside_the_loss_form_equals_float64(device):
    """All of it: hidden states in bf16 -> clipped loss within 1e-6 -> both gradients."""
    inputs = problem(device, 16, 1000, dtype=torch.bfloat16)
    *values, hidden, weight = exact(*inputs, 0.9)
    _, *others = tokens(16, values[0].detach())

    def loss_fn(logprobs, entropies, rows):
        return grpo.grpo_loss(logprobs, *(x[rows].to(device) for x in others), *SETTINGS)[0]

    loss, *_ = logprob.linear_logprob_loss(*inputs, loss_fn, 0.9, 6)
    loss.backward()
    expected, _ = train.grpo_loss(values[0], *others, *SETTINGS)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    assert abs(loss.item() - expected.item()) <= 1e-6
    assert max(distance(x.grad, y) for x, y in zip(inputs, gradients)) <= GRADIENT_ERROR[torch.bfloat16]


# ------------------------------------------------------------- is the twin what stands in train.py?


def edited(logprobs, old_logprobs, ref_logprobs, advantages, weights, clip_ratio_low, clip_ratio_high, clip_ratio_c,
           kl_coef, edit=None):
    """train.py's loss as a fork might leave it; without an edit it is the same, written once more."""
    change = logprobs - old_logprobs
    ratio = (change.clamp(-25 if edit == "ratio's lower clamp" else -20, 20) if edit != "no clamp" else change).exp()
    high = 1 + clip_ratio_high + (0.01 if edit == "clip bound" else 0)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_ratio_low, high) * advantages
    objective = torch.minimum(unclipped, clipped)
    bounded = {"no dual clip": advantages > 1e30, "dual clip for all": advantages < 1e30}.get(edit, advantages <= 0)
    objective = torch.where(bounded, torch.maximum(objective, clip_ratio_c * advantages), objective)
    gap = (ref_logprobs - logprobs).clamp(-20, 20)
    kl = gap.exp() - gap - 1
    kl = kl.clamp(max={"kl not cut": 1e9, "kl cut a little later": 10.1}.get(edit, 10))
    if edit == "k1":
        kl = -gap
    if edit == "nan tokens left out":
        objective, kl = (x.nan_to_num() for x in (objective, kl))
    if edit == "mean":
        weights = torch.ones_like(weights) / len(weights)
    if edit == "weights add up to 1":
        weights = weights / weights.sum()
    loss = (weights * (-objective + kl_coef * kl)).sum()
    if edit == "one more term":
        loss = loss + 1e-3 * (weights * logprobs).sum()
    if edit == "detached":
        loss = loss.detach()
    active = (clipped < unclipped).detach()
    with torch.no_grad():
        stats = {"kl": (weights * kl).sum(), "clip_low": (weights * (active & (advantages < 0))).sum(),
                 "clip_high": (weights * (active & (advantages > 0))).sum(),
                 "ratio_max": torch.where(weights > 0, ratio, 0.0).max()}
    if edit == "statistic of all tokens":
        stats["ratio_max"] = ratio.detach().max()
    if edit == "new statistic":
        stats["ratio_min"] = ratio.detach().min()
    if edit == "statistic gone":
        del stats["kl"]
    return (loss, stats) if edit != "another result" else loss


EDITS = ["clip bound", "no dual clip", "dual clip for all", "k1", "kl not cut", "kl cut a little later", "mean",
         "weights add up to 1", "one more term", "detached", "no clamp", "ratio's lower clamp",
         "nan tokens left out", "statistic of all tokens", "new statistic", "statistic gone", "another result"]


def with_edit(edit):
    def grpo_loss(logprobs, old, ref, advantages, weights, low, high, c, kl_coef):
        return edited(logprobs, old, ref, advantages, weights, low, high, c, kl_coef, edit)

    return grpo_loss


def test_the_twin_is_what_stands_in_train(device):
    """Also written in other words, which round differently."""
    assert twins.grpo_difference(train.grpo_loss, grpo.grpo_loss, device) is None
    assert twins.grpo_difference(with_edit(None), grpo.grpo_loss, device) is None


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_loss_is_found(device, edit):
    assert twins.grpo_difference(with_edit(edit), grpo.grpo_loss, device)


def test_another_signature_and_a_loss_that_wants_other_shapes_are_found(device):
    def with_entropy(logprobs, old, ref, advantages, weights, low, high, c, kl_coef, entropy_coef=0.0):
        return train.grpo_loss(logprobs, old, ref, advantages, weights, low, high, c, kl_coef)

    def by_group(logprobs, old, ref, advantages, weights, low, high, c, kl_coef):
        return train.grpo_loss(logprobs, old, ref, advantages.view(-1, 7), weights, low, high, c, kl_coef)

    assert twins.grpo_difference(with_entropy, grpo.grpo_loss, device) == "they do not take the same arguments"
    assert twins.grpo_difference(by_group, grpo.grpo_loss, device).startswith("RuntimeError: shape '[-1, 7]'")


def test_the_tokens_of_the_comparison_lie_in_all_zones():
    """Of both clips, the dual clip, both clamps, the cut of kl; good, bad and neutral tokens; and with weight 0."""
    counts = torch.zeros(11)
    for spread in twins.SPREADS:
        logprobs, old, ref, A, weights = twins.grpo_tokens(spread, "cpu")
        change, gap, ratio = logprobs - old, ref - logprobs, (logprobs - old).exp()
        kl = gap.exp() - gap - 1
        zones = [(A > 0) & (ratio > 1.3), (A > 0) & (ratio < 0.8), (A < 0) & (ratio < 0.8), (A < 0) & (ratio > 3),
                 (A < 0) & (ratio > 1.3) & (ratio < 3), change > 20, (change < -20) & (ratio * A > 1e-3), kl > 10,
                 (kl > 1) & (kl < 10), (change == 0) & (gap == 0), (weights == 0) & (ratio > 1.3) & (A != 0)]
        counts += torch.stack([zone.sum() for zone in zones])
    assert counts.min() >= 3, counts
    assert abs(weights.sum() - 1) > 1 and (A == 0).sum() > 9


@pytest.fixture
def lines(monkeypatch):
    """Choosing for a GPU that may not be there: `choose(reference, fused)` compares on the CPU, interpreted."""
    difference = twins.grpo_difference
    monkeypatch.setattr(twins, "grpo_difference", lambda reference, twin, device: difference(reference, twin, "cpu"))
    return []


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_the_loss_that_runs_on_a_gpu_is_the_one_that_train_has(device, lines):
    """An equal one is fused; an edited one runs itself and says so once; "on" refuses it; "off" never asks."""
    def choose(reference, fused):
        return ops.choose_grpo_loss(reference, fused, "cuda", lines.append)

    assert choose(train.grpo_loss, "auto") is choose(train.grpo_loss, "on") is grpo.grpo_loss and not lines
    fork = with_edit("k1")
    assert choose(fork, "auto") is fork
    (line,) = lines
    assert line.startswith("train.py's grpo_loss and its fused twin, kernels/grpo.py's grpo_loss, differ (")
    assert line.endswith("): train.py's runs") and "\n" not in line
    with pytest.raises(ValueError, match="^--fused_loss on: train.py's grpo_loss and .*kernels/grpo.py's grpo_loss.*$"):
        choose(fork, "on")
    assert choose(fork, "off") is fork and choose(train.grpo_loss, "off") is train.grpo_loss and len(lines) == 1


def test_without_a_gpu_the_loss_is_that_of_train():
    assert ops.choose_grpo_loss(train.grpo_loss, "auto", "cpu") is train.grpo_loss
    assert ops.choose_grpo_loss(train.grpo_loss, "off", "cpu") is train.grpo_loss
    with pytest.raises(ValueError, match="^--fused_loss on: the fused loss needs a CUDA GPU, this is a cpu; leave"):
        ops.choose_grpo_loss(train.grpo_loss, "on", "cpu")


# --------------------------------------------------------- are the log-probs those of their reference?

LOGPROBS = [(ops.linear_logprob_ref, logprob.linear_logprob),
            (ops.linear_logprob_loss_ref, logprob.linear_logprob_loss)]


@pytest.mark.parametrize("reference, twin", LOGPROBS, ids=["plain", "loss"])
def test_log_probs_are_those_of_their_reference(device, reference, twin):
    assert twins.logprob_difference(reference, twin, device) is None


@pytest.mark.parametrize("reference, twin", LOGPROBS, ids=["plain", "loss"])
@pytest.mark.parametrize("edit, found", [("softcap", "log-probs"), ("entropy", "entropies"),
                                         ("no gradient of the weight", "weight's gradient")])
def test_an_edit_of_the_log_probs_is_found(device, monkeypatch, reference, twin, edit, found):
    logprob_ref = ops.logprob_ref

    def fork(hidden, weight, targets, temperature):
        if edit == "softcap":
            weight = 100 * (weight / 100).tanh()
        if edit == "no gradient of the weight":
            weight = weight + 0.02 * (weight.detach() - weight)
        logprobs, entropies = logprob_ref(hidden, weight, targets, temperature)
        return logprobs, entropies * (1.001 if edit == "entropy" else 1)

    monkeypatch.setattr(ops, "logprob_ref", fork)
    assert twins.logprob_difference(reference, twin, device).startswith(found)


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_a_run_does_not_start_with_log_probs_that_differ_from_their_reference(device, monkeypatch):
    ops.check_linear_logprob("cpu")  # nothing to compare
    difference = twins.logprob_difference
    monkeypatch.setattr(twins, "logprob_difference", lambda reference, twin, _: difference(reference, twin, "cpu"))
    ops.check_linear_logprob("cuda")
    logprob_ref = ops.logprob_ref
    monkeypatch.setattr(ops, "logprob_ref", lambda *inputs: [2 * x for x in logprob_ref(*inputs)])
    with pytest.raises(ValueError, match="^kernels/ops.py's linear_logprob_ref and kernels/logprob.py's linear_log"):
        ops.check_linear_logprob("cuda")
