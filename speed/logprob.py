"""From hidden states to the policy loss and back, as several projects compute it, in one run on one machine.

    python speed/logprob.py --out speed/results/logprob.json        one GPU, a few minutes
    python speed/logprob.py --smoke                                 tiny sizes on a CPU: that everything runs, no speed

Every provider gets the same bf16 hidden states (N, H) and head (V, H), targets, old and reference log-probs. Measured:
the log-probs alone without gradient, loss and both gradients, the peak memory above the inputs, and the error of loss
and gradients against float64. The machine's own matrix product and copy come first, and a time is also given as a
multiple of its floor: 2NHV flops for the forward, 6NHV with the gradients. All providers but Liger, which has its own,
get the loss on top from the same function. Other projects are imported if installed, else named and left out.
"""
import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from torch import Tensor

import train
from kernels.ops import CHUNK, backend, choose_grpo_loss, linear_logprob, linear_logprob_loss, multiply

HEADS = {"3b": (2048, 151936), "7b": (3584, 152064), "tiny": (32, 1000)}  # H, V of Qwen2.5-VL
TEMPERATURE = 0.9
SETTINGS = dict(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, kl_coef=0.04)
ERROR_TOKENS = 1024  # whose float64 logits, 1.2 GB, fit beside everything else


@dataclass
class Problem:
    """Inputs of one measurement; B sequences of T tokens, N = B T."""

    hidden: Tensor  # (N, H) bf16, to differentiate
    weight: Tensor  # (V, H) bf16, to differentiate
    targets: Tensor  # (N,)
    old: Tensor  # (N,) log-probs of the policy that sampled
    ref: Tensor  # (N,)
    advantages: Tensor  # (N,) one value per sequence
    length: int  # T
    grpo_loss: Callable


def make_problem(head: str, N: int, length: int, peaked: bool, device, seed: int) -> Problem:
    """Logits of standard deviation 1; peaked: 85 % of the targets also stand 25 above, so nearly certain (ln V = 12).

    Zeros or constants would be unfair: a GPU multiplies them faster than real numbers.
    """
    H, V = HEADS[head]
    g = torch.Generator(device).manual_seed(seed)
    hidden, noise = (torch.randn(N, n, generator=g, device=device) for n in (H, 3))
    weight = torch.randn(V, H, generator=g, device=device) / H**0.5
    targets = torch.randint(V, (N,), generator=g, device=device)
    if peaked:
        certain = torch.rand(N, 1, generator=g, device=device) < 0.85
        hidden += 25 * certain * weight[targets]  # |weight row| is 1
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    with torch.no_grad():
        logprobs, _ = linear_logprob(hidden, weight, targets, TEMPERATURE)  # (N,)
    advantages = noise[::length, 2].repeat_interleave(length)  # (N,)
    return Problem(hidden, weight, targets, logprobs + 0.2 * noise[:, 0], logprobs + 0.1 * noise[:, 1], advantages,
                   length, choose_grpo_loss(train.grpo_loss, "auto", device))


# ------------------------------------------- providers: a problem -> log-probs, or the loss at once


def logprobs_of(hidden, weight, targets) -> Tensor:
    logits = (hidden @ weight.T).float() / TEMPERATURE  # (N, V)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def eager(p: Problem) -> Tensor:
    return logprobs_of(p.hidden, p.weight, p.targets)


def compiled(p: Problem) -> Tensor:
    return torch.compile(logprobs_of, dynamic=False)(p.hidden, p.weight, p.targets)  # torch keeps it per shape


def trl(p: Problem) -> Tensor:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # optional, like the next two

    logits = p.hidden @ p.weight.T / TEMPERATURE  # (N, V) bf16
    with torch.no_grad():
        entropy_from_logits(logits)  # GRPOTrainer computes it in every training pass
    return selective_log_softmax(logits, p.targets)


def cut_cross_entropy(p: Problem) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(p.hidden / TEMPERATURE, p.weight, p.targets, reduction="none")


def liger_loss(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=SETTINGS["kl_coef"], epsilon_low=SETTINGS["clip_ratio_low"],
                                    epsilon_high=SETTINGS["clip_ratio_high"], delta=SETTINGS["clip_ratio_c"],
                                    loss_type="bnpo", temperature=TEMPERATURE, compiled=p.hidden.is_cuda)
    hidden, targets, old, ref = (x.unflatten(0, (-1, p.length)) for x in (p.hidden, p.targets, p.old, p.ref))
    mask = torch.ones_like(targets)  # (B, T)
    return loss(hidden, p.weight, targets, mask, p.advantages[:: p.length], ref_per_token_logps=ref,
                old_per_token_logps=old)[0]


def ours(p: Problem) -> Tensor:
    return linear_logprob(p.hidden, p.weight, p.targets, TEMPERATURE)[0]


def loss_of(p: Problem, logprobs: Tensor, rows=slice(None)) -> Tensor:
    """The loss of these rows of the problem, a share of the mean over its N tokens."""
    weights = torch.full_like(logprobs, 1 / len(p.targets)).detach()
    return p.grpo_loss(logprobs, p.old[rows], p.ref[rows], p.advantages[rows], weights, *SETTINGS.values())[0]


def with_loss(logprobs: Callable, p: Problem) -> Tensor:
    return loss_of(p, logprobs(p))


def ours_loss(p: Problem) -> Tensor:
    def loss_fn(logprobs, entropies, rows):
        return loss_of(p, logprobs, rows)

    return linear_logprob_loss(p.hidden, p.weight, p.targets, loss_fn, TEMPERATURE)[0]


# Name, package it needs, log-probs or the loss at once; ordered so that a run cut short has what matters. On a CPU
# "ours" is the plain-torch reference, as everywhere in this project.
PROVIDERS = [("ours, gradient in forward", None, None, ours_loss), ("ours", None, ours, None),
             ("liger", "liger_kernel.chunked_loss", None, liger_loss), ("trl", "trl.trainer.utils", trl, None),
             ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy, None),
             ("torch.compile", None, compiled, None), ("torch", None, eager, None)]


def installed(device) -> tuple[list, dict[str, str]]:
    """Providers that can run here, and why the others cannot."""
    found, missing = [], {}
    for provider in PROVIDERS:
        name, package = provider[:2]
        try:
            if package:
                __import__(package)
            if name in ("torch.compile", "cut-cross-entropy") and device == "cpu":
                raise ImportError("GPU only here")
            found.append(provider)
        except (ImportError, RuntimeError) as error:  # RuntimeError: how transformers wraps a failed import
            missing[name] = str(error).strip().splitlines()[0]
    return found, missing


# ------------------------------------------------------------------------------------------ measuring


def milliseconds(function, device, repeats: int, warmups: int = 3) -> float:
    """Median time of a call; on a GPU by its own clock."""
    times = []
    for _ in range(warmups + repeats):
        if device == "cpu":
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warmups:])


def machine_rates(device, smoke: bool) -> dict[str, float]:
    """This machine's bf16 matrix product, flop/s, and copy, bytes read and written per second."""
    n = 256 if smoke else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(n * n * (1 if smoke else 8), device=device)  # 2 GB, far more than any cache
    target = torch.empty_like(source)
    product = milliseconds(lambda: a @ b, device, 10)
    copy = milliseconds(lambda: target.copy_(source), device, 10)
    return {"flops": 2 * n**3 / product * 1e3, "bytes": 2 * source.nbytes / copy * 1e3}


def peak_bytes(function, device) -> int | None:
    """Memory that one cold call takes beyond what is there before."""
    if device == "cpu":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def gradients(p: Problem, loss_function) -> tuple[Tensor, Tensor, Tensor]:
    loss = loss_function(p)
    return loss.detach(), *torch.autograd.grad(loss, (p.hidden, p.weight))


def exact_loss(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    logits = hidden @ weight.T / TEMPERATURE  # (N, V)
    logprobs = logits.log_softmax(-1).gather(-1, p.targets[:, None])[:, 0]
    weights = torch.full_like(logprobs, 1 / len(p.targets)).detach()
    others = (x.double() for x in (p.old, p.ref, p.advantages))
    loss, _ = train.grpo_loss(logprobs, *others, weights, *SETTINGS.values())
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def errors(found, expected) -> dict[str, float]:
    """Absolute for the loss, |difference| / |expected| for the gradients."""
    relative = [float((f.double() - e).norm() / e.norm()) for f, e in zip(found[1:], expected[1:])]
    return {"loss_error": float(abs(found[0].double() - expected[0])), "hidden_error": relative[0],
            "weight_error": relative[1]}


def measure(provider, p: Problem, small: Problem, expected, rates, device, repeats: int) -> dict:
    """One row of the table; running out of memory is a result."""
    name, _, logprobs, loss = provider
    flops = 2 * len(p.targets) * p.weight.numel()  # of one of the three products
    row = {"provider": name}

    def both(problem):
        return gradients(problem, loss or partial(with_loss, logprobs))

    try:
        if logprobs:
            with torch.no_grad():
                row["forward_ms"] = milliseconds(lambda: logprobs(p), device, repeats)
            row["forward_floors"] = row["forward_ms"] * rates["flops"] / flops / 1e3
        row["peak_bytes"] = peak_bytes(lambda: both(p), device)
        row["both_ms"] = milliseconds(lambda: both(p), device, repeats)
        row["both_floors"] = row["both_ms"] * rates["flops"] / (3 * flops) / 1e3
        row |= errors(both(small), expected)
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    return row


def parts(head: str, device, rates: dict[str, float], chunk: int, repeats: int) -> dict[str, dict[str, float]]:
    """One chunk taken apart: the three products in flop/s and, on a GPU, the two row kernels in bytes/s."""
    p = make_problem(head, chunk, chunk, False, device, 0)
    hidden, weight = p.hidden.detach(), p.weight.detach()
    (H, V), values = HEADS[head], [torch.empty(chunk, device=device) for _ in range(3)]
    logits, total = torch.empty(chunk, V, device=device), torch.zeros(V, H, device=device)
    dlogits = logits.view(torch.bfloat16)[:, :V]  # what a row of bf16 over its float32 logits looks like to a product
    dhidden, slope, rest = torch.empty_like(hidden), torch.ones(chunk, device=device), (p.targets, TEMPERATURE)
    flops, work = 2 * chunk * H * V, {
        "dhidden": lambda: multiply(dlogits, weight, dhidden),
        "dweight": lambda: multiply(dlogits.T, hidden, total, add=True),
        "logits": lambda: multiply(hidden, weight.T, logits)}  # last: it overwrites dlogits
    rows = {}
    if device != "cpu":
        from kernels.logprob import dlogits_in_place, row_statistics

        rows = {"statistics": (4, lambda: row_statistics(logits, *rest, *values)),
                "dlogits": (6, lambda: dlogits_in_place(logits, *rest, values[2], values[1], slope, slope,
                                                        torch.bfloat16))}  # bytes read and written per logit
    out = {}
    dlogits.normal_()  # numbers, not the bits of other numbers
    for name, function in work.items():
        ms = milliseconds(function, device, repeats)
        out[name] = {"ms": ms, "flops": flops / ms * 1e3, "of_machine": flops / ms * 1e3 / rates["flops"]}
    for name, (size, function) in rows.items():
        logits.normal_()
        ms = milliseconds(function, device, repeats)
        rate = size * chunk * V / ms * 1e3
        out[name] = {"ms": ms, "bytes": rate, "of_machine": rate / rates["bytes"]}
    return out


# ------------------------------------------------------------------------------------------- the table


def describe(row: dict) -> str:
    if "failed" in row:
        return f"  {row['provider']:<26} {row['failed']}"
    forward = f"{row['forward_ms']:8.2f} ms {row['forward_floors']:5.2f} x" if "forward_ms" in row else " " * 19
    peak = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:6.2f} GB"
    return (f"  {row['provider']:<26} {forward} {row['both_ms']:9.2f} ms {row['both_floors']:6.2f} x{peak}"
            f"  loss {row['loss_error']:.0e} hidden {row['hidden_error']:.1e} weight {row['weight_error']:.1e}")


def cases(args) -> list[tuple[str, int, bool]]:
    """Head, tokens, whether most targets are nearly certain."""
    return [(head, N, peaked) for head in args.heads for N in args.tokens for peaked in (False, True)]


def run_case(head: str, N: int, peaked: bool, args, device, rates, providers: list, end: float) -> Iterator[dict]:
    """A row for every provider; after `end` only the remark that it was left out."""
    case = {"head": head, "tokens": N, "logits": "peaked" if peaked else "diffuse"}
    print(f"{head}, {N} tokens, {case['logits']} logits", flush=True)
    length, p = min(N, args.length), None
    for provider in providers:
        if time.monotonic() > end:
            row = {"provider": provider[0], "failed": "left out: the time is up"}
        else:
            if p is None:
                torch.compiler.reset()  # it gives up after eight shapes
                p = make_problem(head, N, length, peaked, device, N)
                small = make_problem(head, min(N, ERROR_TOKENS), min(length, ERROR_TOKENS), peaked, device, N + 1)
                expected = exact_loss(small)
            row = measure(provider, p, small, expected, rates, device, args.repeats)
        print(describe(row), flush=True)
        yield case | row


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the figures to this json file")
    parser.add_argument("--heads", nargs="+", default=["7b", "3b"], choices=HEADS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 8192, 4096, 32768, 65536])
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=400, help="start no measurement after this long")
    parser.add_argument("--tf32", action="store_true", help="let float32 products, which Liger makes, use TF32")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test")
    args = parser.parse_args()
    if args.smoke:
        args.heads, args.tokens, args.length, args.repeats = ["tiny"], [48], 8, 1
    return args


def main():
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        sys.exit("error: no CUDA GPU here; --smoke runs a tiny version on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.manual_seed(0)
    machine = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__,
               "ours": backend(device), "tf32": args.tf32} | machine_rates(device, args.smoke)
    print(f"{machine['device']}, {machine['ours']}: {machine['flops'] / 1e12:.1f} Tflop/s in bf16 products, "
          f"{machine['bytes'] / 1e12:.2f} TB/s copied; x: multiples of 2NHV (forward) and 6NHV (both) at this rate")
    providers, missing = installed(device)
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    taken_apart = {head: parts(head, device, machine, 64 if args.smoke else CHUNK, args.repeats)
                   for head in args.heads}
    for head, work in taken_apart.items():
        print(f"{head}, one chunk: " + ", ".join(f"{name} {w['ms']:.2f} ms ({w['of_machine']:.0%} of the machine)"
                                                 for name, w in work.items()))
    results = {"machine": machine, "left_out": missing, "parts": taken_apart, "table": []}
    end = time.monotonic() + args.seconds
    for case in cases(args):
        for row in run_case(*case, args, device, machine, providers, end):
            results["table"].append(row)
            if args.out:  # after every row: a run that is cut off keeps what it has
                with open(args.out, "w") as f:
                    json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
