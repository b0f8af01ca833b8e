"""AdamW whose two moments take 2 bytes each instead of 4: a quarter of the training state less.

    exp_avg    <- beta1 exp_avg + (1 - beta1) gradient
    exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) gradient^2
    weight     <- weight (1 - lr decay) - lr (exp_avg / (1 - beta1^t)) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)

All in float32, as torch's AdamW, but the moments are stored in bfloat16, whose spacing is 1/256 of a number or half of
that. One step changes exp_avg_sq by a thousandth, so rounding to the nearest would leave it where it is for ever: it is
rounded up or down at random, with probabilities that make it right on average. The random numbers are a function of
(step, rank), so a run repeats itself and resumes exactly; another number of ranks rounds differently.
"""
import torch
from torch.distributed.tensor import DTensor

PIECE = 1 << 24  # numbers updated at a time: their float32 copies take 0.3 GB, however large the parameter


def round_stochastically(x: torch.Tensor, out: torch.Tensor, generator: torch.Generator):
    """out (bfloat16) <- x (float32), up or down at random, so that the mean is x.

    A bfloat16 is the upper half of a float32: a random number of 16 bits is added to the lower half, which is then cut.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    out.copy_(((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32))


class AdamW(torch.optim.Optimizer):
    """torch's AdamW (arXiv 1711.05101) with moments in bfloat16; parameters and gradients are float32 shards."""

    def __init__(self, parameters, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One step on the gradients there are; closure stands here because torch's signature has it."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = None  # one for all parameters
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                state["step"] += 1
                t = int(state["step"])
                if generator is None:
                    generator = torch.Generator(parameter.device).manual_seed(t << 20 | rank)
                shards = (x.to_local() if isinstance(x, DTensor) else x for x in (
                    parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
                for piece in zip(*(shard.view(-1).split(PIECE) for shard in shards)):
                    self.update(*piece, t, group, generator)

    def update(self, weight, gradient, exp_avg, exp_avg_sq, t: int, group: dict, generator):
        """The three equations for some numbers of a shard, all (n,), in place."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        mean = exp_avg.float().lerp_(gradient, 1 - beta1)
        square = exp_avg_sq.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.mul_(1 - lr * group["weight_decay"])
        weight.addcdiv_(mean, (square / (1 - beta2**t)).sqrt_().add_(group["eps"]), value=-lr / (1 - beta1**t))
        round_stochastically(mean, exp_avg, generator)
        round_stochastically(square, exp_avg_sq, generator)
