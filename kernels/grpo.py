"""The clipped, KL-regularised policy loss of N response tokens, its gradient and its statistics, in one pass.

    ratio = exp(logprob - old_logprob)                                  Eq. RATIO   difference clamped to +-20
    obj   = min(ratio A, clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high) A)    Eq. CLIP
    obj   = max(obj, clip_ratio_c A)  where A < 0                       Eq. DUAL
    kl    = exp(ref - logprob) - (ref - logprob) - 1                    Eq. KL3     clamped to +-20, kl to at most 10
    loss  = sum_tokens weight (-obj + kl_coef kl)                       Eq. LOSS

Gradient. d ratio / d logprob = ratio where the difference is not clamped, d kl / d logprob = 1 - exp(ref - logprob)
where kl is not cut (which includes the clamp: at +-20 kl is beyond 10). Where a clip or the dual bound is what counts,
the objective is constant. So with live = "neither clip, dual bound nor clamp acts":
    dloss / dlogprob = weight (-[live] ratio A + kl_coef [kl <= 10] (1 - exp(ref - logprob)))

The plain-torch reference is train.py's `grpo_loss`: same arguments, same results. A run on a GPU asks at its start
whether that still holds, and takes train.py's own function where somebody has edited it: ops.py's `choose_grpo_loss`.
All choices are written as comparisons, which are false for nan: a nan in any input reaches the loss, where the trainer
sees it and skips the step.
"""
import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

BLOCK = 512  # tokens of a program, 4 a thread of 4 warps; the vectors are short, the launch is what they cost
PARTS = tl.constexpr(5)  # sums per program: loss, kl, clip_low, clip_high; and the largest ratio
LARGEST = tl.constexpr(20.0)  # bound of a difference of log-probs: e^20 is still far from overflow
KL_LARGEST = tl.constexpr(10.0)  # bound of one token's kl


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit(do_not_specialize=["N"])  # N varies with every micro-batch: one compilation for all
def _grpo_kernel(logprobs, old_logprobs, ref_logprobs, advantages, weights, gradient, partial, N,
                 clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_coef, BLOCK: tl.constexpr):
    """BLOCK tokens: their gradient (BLOCK,), and PARTS sums of theirs in partial[program]."""
    program = tl.program_id(0).to(tl.int64)
    tokens = program * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < N
    logprob = tl.load(logprobs + tokens, mask=inside, other=0.0)
    A = tl.load(advantages + tokens, mask=inside, other=0.0)
    weight = tl.load(weights + tokens, mask=inside, other=0.0)
    change = logprob - tl.load(old_logprobs + tokens, mask=inside, other=0.0)
    ratio = tl.exp(_clamp(change, -LARGEST, LARGEST))  # Eq. RATIO
    unclipped = ratio * A
    clipped = _clamp(ratio, 1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * A
    active = clipped < unclipped  # the clip took part of the objective, and with it the gradient
    objective = tl.where(active, clipped, unclipped)  # Eq. CLIP
    bounded = (A < 0) & (objective < clip_ratio_c * A)
    objective = tl.where(bounded, clip_ratio_c * A, objective)  # Eq. DUAL
    live = (active == 0) & (bounded == 0) & (change >= -LARGEST) & (change <= LARGEST)
    gap = tl.load(ref_logprobs + tokens, mask=inside, other=0.0) - logprob
    gap = _clamp(gap, -LARGEST, LARGEST)
    kl = tl.exp(gap) - gap - 1.0
    slope = tl.where(kl > KL_LARGEST, 0.0, 1.0 - tl.exp(gap))
    kl = tl.where(kl > KL_LARGEST, KL_LARGEST, kl)  # Eq. KL3
    tl.store(gradient + tokens, weight * (kl_coef * slope - tl.where(live, unclipped, 0.0)), mask=inside)
    partial += program * PARTS
    tl.store(partial, tl.sum(weight * (kl_coef * kl - objective), 0))  # Eq. LOSS
    tl.store(partial + 1, tl.sum(weight * kl, 0))
    tl.store(partial + 2, tl.sum(tl.where(active & (A < 0), weight, 0.0), 0))
    tl.store(partial + 3, tl.sum(tl.where(active & (A > 0), weight, 0.0), 0))
    tl.store(partial + 4, tl.max(tl.where(weight > 0, ratio, 0.0), 0))


class GRPOLoss(torch.autograd.Function):
    """Loss (), and kl, clip_low, clip_high, ratio_max (4,) without gradient."""

    @staticmethod
    def forward(ctx, logprobs, old_logprobs, ref_logprobs, advantages, weights, *settings):
        N = len(logprobs)
        programs = max(1, triton.cdiv(N, BLOCK))  # one program without tokens writes the zeros of an empty batch
        gradient = torch.empty_like(logprobs)  # (N,)
        partial = logprobs.new_empty(programs, PARTS.value)  # (programs, PARTS)
        _grpo_kernel[(programs,)](logprobs, old_logprobs, ref_logprobs, advantages, weights, gradient, partial, N,
                                  *settings, BLOCK=BLOCK, num_warps=4)
        ctx.save_for_backward(gradient)
        statistics = torch.cat([partial[:, 1:-1].sum(0), partial[:, -1:].max(0).values])  # (4,)
        ctx.mark_non_differentiable(statistics)
        return partial[:, 0].sum(), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, unused):
        return ctx.saved_tensors[0] * dloss, *[None] * 8


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, clip_ratio_low, clip_ratio_high, clip_ratio_c,
              kl_coef):
    """All (N,), weights 0 for padding -> the loss, differentiable in logprobs, and its statistics as weighted sums."""
    vectors = [x.float().contiguous() for x in (logprobs, old_logprobs, ref_logprobs, advantages, weights)]
    settings = map(float, (clip_ratio_low, clip_ratio_high, clip_ratio_c, kl_coef))
    loss, statistics = GRPOLoss.apply(*vectors, *settings)
    return loss, dict(zip(("kl", "clip_low", "clip_high", "ratio_max"), statistics.unbind()))
