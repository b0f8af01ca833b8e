"""The GRPO equations against numbers worked by hand and against a float64 re-derivation."""
import math

import pytest
import torch

from train import Config, group_advantages, grpo_loss, learning_rate, sft_loss

pytestmark = pytest.mark.fast
CLIPS = dict(clip_ratio_low=0.2, clip_ratio_high=0.3, clip_ratio_c=3.0, kl_coef=0.01)


def test_eq_advantage_uses_the_sample_standard_deviation():
    """Rewards 1 1 1 0: mean .75, squared deviations 3 x .0625 + .5625 = .75, std (n-1) .5: advantages .5 .5 .5 -1.5."""
    advantages = group_advantages(torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]]))
    expected = torch.tensor([[0.5, 0.5, 0.5, -1.5], [-0.866, -0.866, 0.866, 0.866]])  # second: .5 / sqrt(1/3)
    torch.testing.assert_close(advantages, expected, atol=1e-4, rtol=0)


def test_eq_advantage_of_equal_rewards_is_zero():
    """In float32 too, where the mean of eight times .7 is not .7."""
    for value in (0.7, 0.1, 1 / 3, 0.99):
        assert torch.equal(group_advantages(torch.full((3, 8), value)), torch.zeros(3, 8))


def test_eq_advantage_knows_no_other_group():
    rewards = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(rewards)[2:3], group_advantages(rewards[2:3]))


def test_eq_advantage_refuses_groups_of_one():
    with pytest.raises(AssertionError, match="G=1"):
        group_advantages(torch.ones(3, 1))


def one_token(ratio, advantage, **changes):
    """Loss and its gradient in logprob for a token of weight 1 whose reference is its log-prob (kl and slope 0)."""
    logprob = torch.tensor([-1.0], requires_grad=True)
    old, ref = logprob.detach() - math.log(ratio), logprob.detach()
    loss, stats = grpo_loss(logprob, old, ref, torch.tensor([advantage]), torch.ones(1), **(CLIPS | changes))
    loss.backward()
    return loss.item(), logprob.grad.item(), stats


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient",
    [
        # the objective is min(r A, clip(r, .8, 1.3) A), the loss its negative; d r / d logprob = r
        (1.0, 2.0, -2.0, -2.0),  # on policy: plain policy gradient
        (1.2, 2.0, -2.4, -2.4),  # inside the clip
        (1.5, 2.0, -2.6, 0.0),  # good and already likelier than 1.3: clipped, no gradient
        (0.5, 2.0, -1.0, -1.0),  # good but less likely: never clipped
        (0.9, -2.0, 1.8, 1.8),  # inside
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely than .8: clipped
        (1.5, -2.0, 3.0, 3.0),  # bad but likelier: not clipped
        (2.9, -2.0, 5.8, 5.8),  # just below the dual clip
        (4.0, -2.0, 6.0, 0.0),  # bad and exploding: the dual clip bounds the loss at 3 |A|
        (4.0, 2.0, -2.6, 0.0),  # the dual clip does not act on good tokens
    ],
)
def test_eq_clip_and_eq_dual_zones(ratio, advantage, loss, gradient):
    got = one_token(ratio, advantage)
    assert got[0] == pytest.approx(loss, abs=1e-5) and got[1] == pytest.approx(gradient, abs=1e-5)


def test_clip_shares_count_the_tokens_whose_gradient_the_clip_takes():
    cases = [(1.5, 2.0, 0, 1), (0.5, -2.0, 1, 0), (1.5, -2.0, 0, 0), (0.5, 2.0, 0, 0), (1.0, 2.0, 0, 0)]
    for ratio, advantage, low, high in cases:
        stats = one_token(ratio, advantage)[2]
        assert (stats["clip_low"].item(), stats["clip_high"].item()) == (low, high)
        assert stats["ratio_max"].item() == pytest.approx(ratio, rel=1e-5)


def kl_of(logprob, ref):
    logprob = torch.tensor([logprob], requires_grad=True)
    loss, stats = grpo_loss(logprob, logprob.detach(), torch.tensor([ref]), torch.zeros(1), torch.ones(1),
                            **(CLIPS | {"kl_coef": 1.0}))
    loss.backward()
    return stats["kl"].item(), logprob.grad.item()


def test_eq_kl3_by_hand():
    """ref - logprob = ln 2: kl = 2 - ln 2 - 1 = .3069, slope 1 - 2 = -1: descent raises logprob towards ref."""
    assert kl_of(-1.0, -1.0 + math.log(2)) == pytest.approx((0.30685, -1.0), abs=1e-4)
    assert kl_of(-1.0, -1.0 - math.log(2)) == pytest.approx((0.19315, 0.5), abs=1e-4)  # .5 + ln 2 - 1; slope 1 - .5


def test_eq_kl3_is_zero_only_at_equality_and_never_negative():
    assert kl_of(-2.0, -2.0) == (0.0, 0.0)
    assert all(kl_of(-2.0, -2.0 + d)[0] > 0 for d in (-9.0, -1.0, -0.1, 0.1, 1.0, 3.0))
    assert kl_of(-9.0, -1.0) == (10.0, 0.0)  # e^8 - 9 is cut at 10, and then pulls no more
    assert math.isfinite(kl_of(-300.0, -1.0)[0]) and math.isfinite(kl_of(-1.0, -300.0)[0])


def test_eq_loss_gradient_equals_float64_autograd_of_the_equations():
    """Random tokens in all zones; the equations written again, in float64 and with min, max and exp alone."""
    g = torch.Generator().manual_seed(3)
    logprobs = (-3 * torch.rand(400, generator=g, dtype=torch.float64)).requires_grad_()
    old = logprobs.detach() + 0.8 * torch.randn(400, generator=g, dtype=torch.float64)
    ref = logprobs.detach() + 0.8 * torch.randn(400, generator=g, dtype=torch.float64)
    A, w = torch.randn(400, generator=g, dtype=torch.float64), torch.rand(400, generator=g, dtype=torch.float64)
    total = 0
    for i in range(400):
        r = (logprobs[i] - old[i]).exp()
        objective = min(r * A[i], min(max(r, 0.8), 1.3) * A[i])
        if A[i] < 0:
            objective = max(objective, 3.0 * A[i])
        d = ref[i] - logprobs[i]
        total = total + w[i] * (-objective + 0.01 * (d.exp() - d - 1))
    (expected,) = torch.autograd.grad(total, logprobs)
    loss, _ = grpo_loss(logprobs, old, ref, A, w, **CLIPS)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss, torch.as_tensor(total))
    torch.testing.assert_close(gradient, expected)


def test_a_token_of_weight_zero_changes_nothing():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, stats = grpo_loss(logprobs, torch.tensor([-1.0, -40.0]), torch.zeros(2), torch.tensor([1.0, -5.0]),
                            torch.tensor([1.0, 0.0]), **CLIPS)
    loss.backward()
    alone, _ = grpo_loss(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.zeros(1), torch.ones(1), torch.ones(1),
                         **CLIPS)
    assert loss.item() == pytest.approx(alone.item()) and logprobs.grad[1] == 0 and stats["ratio_max"] == 1


def test_eq_sft_is_the_mean_cross_entropy():
    logits, targets = torch.randn(6, 11), torch.randint(11, (6,))
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(sft_loss(logprobs, torch.full((6,), 1 / 6)), expected)


def test_learning_rate_warms_up_then_follows_the_cosine():
    """40 steps, warm-up .1 = 4 steps: 1/4, 2/4, 3/4, 1, then half way down (step 4 + 18) a half."""
    config = Config(lr=1.0, warmup_ratio=0.1, lr_decay="cosine")
    rates = [learning_rate(config, i, 40) for i in range(40)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0]) and rates[22] == pytest.approx(0.5)
    assert 0 < rates[39] < 0.01
    assert {learning_rate(Config(lr=2.0), i, 40) for i in range(40)} == {2.0}  # the RL default: constant from the start
