"""All that only a GPU can tell, in one command that ends within 8 minutes.

    python speed/gpu.py --out speed/results/gpu.json
    python speed/gpu.py --smoke                            on a CPU: that everything runs; GPU tests skip

    machine   the device and the versions
    tests     pytest -m gpu: every kernel test, compiled instead of interpreted
    table     speed/logprob.py
    chunks    time and memory of the loss and both gradients for chunks of 1,024 to 4,608 tokens
    step      speed/step.py: a whole step and its rollout, as far as they get

Each part has its own time limit, and one that fails or runs out of time leaves the others alone. The exit code is that
of the tests.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import triton

from kernels import logprob as op
from kernels.ops import linear_logprob_loss_ref
from logprob import TEMPERATURE, loss_of, make_problem, milliseconds, peak_bytes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = {"tests": 120, "table": 150, "chunks": 50, "step": 130}  # 450 together, of the 480 that 8 minutes have


def describe_machine(device) -> dict:
    """What a figure means nothing without."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
               "cuda": torch.version.cuda, "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"device": properties.name, "multiprocessors": properties.multi_processor_count,
                    "capability": [properties.major, properties.minor], "memory": properties.total_memory}
    return machine


def run(command: list[str], seconds: float) -> dict:
    """A command's exit code (None when it ran out of time), seconds and last lines, which are printed as well."""
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=seconds, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, text = None, (error.stdout or b"").decode(errors="replace")
    print(text, flush=True)
    return {"code": code, "seconds": time.monotonic() - start, "output": text[-4000:]}


def run_script(name: str, options: list[str], seconds: float) -> dict:
    """A script of this folder in its own process, so that what it leaves on the GPU is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "figures.json")
        done = run([f"speed/{name}.py", "--out", path, *options], seconds)
        if os.path.exists(path):
            with open(path) as f:
                done |= json.load(f)
    return done


def sweep_chunks(head: str, N: int, chunks, device, end: float, repeats: int) -> list[dict]:
    """The gradient-in-forward loss at each chunk size, until the time is up."""
    function, rows = op.linear_logprob_loss if device == "cuda" else linear_logprob_loss_ref, []
    p = make_problem(head, N, N, False, device, 0)

    def loss_fn(logprobs, entropies, part):
        return loss_of(p, logprobs, part)

    for chunk in chunks:
        if time.monotonic() > end:
            print(f"{head}: chunks of {chunk} tokens and more are left out, the time is up")
            break

        def both():
            loss, *_ = function(p.hidden, p.weight, p.targets, loss_fn, TEMPERATURE, chunk)
            return torch.autograd.grad(loss, (p.hidden, p.weight))

        row = {"head": head, "tokens": N, "chunk": chunk, "peak_bytes": peak_bytes(both, device),
               "ms": milliseconds(both, device, repeats, 1)}
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write everything to this json file, or to gpu.json in this folder")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        print("error: no CUDA GPU here; --smoke runs a tiny version on the CPU", file=sys.stderr)
        return 2
    path = args.out
    if path and not path.endswith(".json"):
        os.makedirs(path, exist_ok=True)
        path = os.path.join(path, "gpu.json")
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        parser.error(f"--out {path}: there is no such folder")
    results = {"machine": describe_machine(device)}
    print(" ".join(f"{name}={value}" for name, value in results["machine"].items()), flush=True)
    tests = ["--noconftest", "tests/test_decode.py"] if args.smoke else []
    results["tests"] = run(["-m", "pytest", "-q", "-m", "gpu", "-rs", *tests], SECONDS["tests"])
    table = ["--tokens", "16384", "8192", "4096", "--seconds", str(SECONDS["table"] - 60)]
    results["table"] = run_script("logprob", ["--smoke"] if args.smoke else table, SECONDS["table"])
    end, heads = time.monotonic() + SECONDS["chunks"], ["tiny"] if args.smoke else ["7b", "3b"]
    N, chunks, repeats = (48, (16, 64), 1) if args.smoke else (16384, range(1024, 4609, 256), 3)
    results["chunks"] = [row for head in heads for row in sweep_chunks(head, N, chunks, device, end, repeats)]
    torch.cuda.empty_cache()  # the next part has processes of its own
    step = ["--repeats", "1", "--seconds", str(SECONDS["step"] - 30), "--only", "rollout"]
    results["step"] = run_script("step", [*step, "--smoke" if args.smoke else "step"], SECONDS["step"])
    if path:
        with open(path, "w") as f:
            json.dump(results, f, indent=1)
    return results["tests"]["code"] or int(results["tests"]["code"] is None)


if __name__ == "__main__":
    sys.exit(main())
