"""Do a Triton function and its plain torch reference compute the same? Asked once, when a run starts on a GPU.

    grpo_difference       train.py's `grpo_loss` and grpo.py's
    logprob_difference    ops.py's `linear_logprob_ref` and logprob.py's `linear_logprob`, or both forms with a loss

Each returns None, or in a few words what differs. Without the question, a fork that edits an equation would change what
a CPU computes and be ignored on a GPU.
"""
import inspect

import torch


TOKENS = 400  # in one comparison of losses
SETTINGS = [(0.2, 0.3, 3.0, 0.01),  # clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_coef: as the method has them
            (0.1, 0.9, 1.5, 0.3), (0.9, 4.0, 20.0, 0.0), (0.0, 0.0, 1.1, 1.0)]
SPREADS = [0.4, 3.0, 12.0, 40.0]  # of differences of log-probs: at the clips, the dual clip, the clamps, far beyond
ROUNDING = 2e-5  # of float32 sums and a GPU's fast exp, relative
FAILED = (TypeError, ValueError, RuntimeError, AssertionError)  # from a loss that wants other arguments or shapes


def grpo_tokens(spread: float, device) -> list:
    """logprobs, old and reference log-probs, advantages, weights, each (TOKENS,), in all zones of `grpo_loss`.

    Some tokens have changed nothing (ratio 1, kl 0), some have no advantage, some the weight 0, also the one with the
    largest ratio. The weights do not add up to 1: a loss that divides by their sum is another one. Where a ratio is
    tiny, good tokens have an advantage so large that their product counts: else nobody could see whether the ratio is
    bounded from below.
    """
    g = torch.Generator().manual_seed(int(10 * spread))
    logprobs, weights = -3 * torch.rand(TOKENS, generator=g), 0.5 + torch.rand(TOKENS, generator=g)
    old, ref = logprobs + spread * torch.randn(2, TOKENS, generator=g)
    advantages, places = torch.randn(TOKENS, generator=g), torch.arange(TOKENS)
    old, ref = torch.where(places % 7 == 0, logprobs, old), torch.where(places % 11 == 0, logprobs, ref)
    advantages, weights = advantages * (places % 13 > 0), weights * (places % 17 > 0)
    weights[(logprobs - old).argmax()] = 0.0
    tiny = (logprobs - old < -10) & (advantages > 0)
    advantages = torch.where(tiny, advantages * (old - logprobs).clamp(max=25).exp(), advantages)
    return [x.to(device) for x in (logprobs, old, ref, advantages, weights)]


def grpo_results(loss_fn, vectors: list, settings: tuple) -> dict:
    """By name: the loss, each statistic, and the gradient in the log-probs. Each (1,) or (TOKENS,), float32."""
    logprobs, *others = (x.clone() for x in vectors)  # a loss that writes into its arguments then harms nobody
    loss, statistics = loss_fn(logprobs.requires_grad_(), *others, *settings)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    results = {"loss": loss, "gradient": gradient} | {f"statistic {name}": x for name, x in statistics.items()}
    return {name: torch.as_tensor(value).detach().float().reshape(-1) for name, value in results.items()}


def first_difference(found: dict, expected: dict) -> str | None:
    """The first result that differs by more than rounding; a sum over all tokens is rounded oftener than one token."""
    if set(found) != set(expected):
        return "only one of them has " + ", ".join(sorted(set(found) ^ set(expected)))
    for name, value in expected.items():
        bound = ROUNDING if len(value) > 1 else 50 * ROUNDING
        if not torch.allclose(found[name], value, ROUNDING, bound, equal_nan=True):
            worst = (found[name] - value).abs().argmax()
            return f"{name} {found[name][worst].item():.6g}, not {value[worst].item():.6g}"
    return None


def grpo_difference(reference, twin, device) -> str | None:
    """What differs between two losses on random tokens in all zones: loss, statistics or gradient. None: nothing."""
    if len(inspect.signature(reference).parameters) != len(inspect.signature(twin).parameters):
        return "they do not take the same arguments"
    for spread in SPREADS:
        vectors = grpo_tokens(spread, device)
        for settings in SETTINGS:
            try:
                found = grpo_results(reference, vectors, settings)
            except FAILED as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())}"
            different = first_difference(found, grpo_results(twin, vectors, settings))
            if different:
                return different
    vectors[0][1] = torch.nan
    if reference(*vectors, *settings)[0].isnan() != twin(*vectors, *settings)[0].isnan():
        return "what becomes of a nan"
    return None


def logprob_difference(reference, twin, device) -> str | None:
    """What differs between two ways to log-probs of 12 tokens of a vocabulary of 300, in chunks of 5; None: nothing.

    Of the log-probs, the entropies, and the gradients of hidden states and weight in bfloat16, as training has them.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=g).to(device, torch.bfloat16).requires_grad_() for n in (12, 300))
    targets, slopes = torch.randint(300, (12,), generator=g).to(device), torch.randn(2, 12, generator=g).to(device)

    def loss_fn(logprobs, entropies, rows=slice(None)):
        return slopes[0, rows] * logprobs + slopes[1, rows] * entropies

    def results(function):
        with_loss = "loss_fn" in inspect.signature(function).parameters
        arguments = (hidden, weight, targets, *([loss_fn] if with_loss else []), 0.7, 5)
        *loss, logprobs, entropies = function(*arguments)
        gradients = torch.autograd.grad(loss[0] if with_loss else loss_fn(logprobs, entropies).sum(), (hidden, weight))
        return dict(zip(("log-probs", "entropies", "hidden's gradient", "weight's gradient"),
                        (x.detach().double() for x in (logprobs, entropies, *gradients))))

    expected = results(twin)
    for name, found in results(reference).items():
        error = float((found - expected[name]).norm() / expected[name].norm())
        if not error <= (1e-2 if "gradient" in name else 1e-4):  # bfloat16 keeps 8 bits of a gradient; also not nan
            return f"{name} by {error:.1g} of their size"
    return None
