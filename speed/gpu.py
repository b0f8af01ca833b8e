"""All that only a GPU can tell, in one command that ends within 9 minutes.

    python speed/gpu.py --out FOLDER
    python speed/gpu.py --out FOLDER --smoke               on a CPU: that everything runs; GPU tests skip

    tests     pytest -m gpu: every kernel test, compiled instead of interpreted
    decode    speed/decode.py: tokens per second at 256, 176 and 64 slots, 3B and 7B, against the bandwidth's bound
    step      speed/step.py: a whole step of stage 1 in the 3B's shape, phases, memory against the plan, switches on and
              off; then TRL's step beside ours, where TRL is installed
    table     speed/logprob.py: the head's kernels, each time also as a multiple of its floor
    chunks    time and memory of the loss and both gradients for chunks of 1,024 to 4,608 tokens

Each part is a process with a time limit and writes FOLDER/PART.json as it goes; FOLDER/gpu.json says how each ended.
One that fails or is cut off leaves the others alone and keeps the figures that it has. The exit code is the tests'.
"""
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import triton

from kernels import logprob as op
from kernels.ops import linear_logprob_loss_ref
from logprob import TEMPERATURE, loss_of, make_problem, milliseconds, peak_bytes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = {"tests": 115, "decode": 60, "step": 250, "table": 75, "chunks": 25}  # 525 of the 540 that 9 minutes have


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
    """A command's exit code (None when it ran out of time), seconds and last lines, which are printed as well.

    It ends together with the processes that it has started: what those hold of the GPU, the next part needs.
    """
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        text, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, code = process.communicate()[0], None
    print(text, flush=True)
    return {"code": code, "seconds": time.monotonic() - start, "output": text[-4000:]}


def commands(folder: str, smoke: bool) -> dict[str, list[str]]:
    """The command of each part, in the order of importance."""
    def script(name: str, part: str, tiny: list[str], full: list[str]) -> list[str]:
        return [f"speed/{name}.py", "--out", os.path.join(folder, f"{part}.json"), *(tiny if smoke else full)]

    tests = ["--noconftest", "tests/test_decode.py"] if smoke else []
    return {
        "tests": ["-m", "pytest", "-q", "-m", "gpu", "-rs", *tests],
        "decode": script("decode", "decode", ["--smoke"], []),
        "step": script("step", "step", ["--smoke", "--repeats", "1", "--only", "rollout"],
                       ["--repeats", "1", "--seconds", str(SECONDS["step"] - 90), "--only", "stage1", "step"]),
        "table": script("logprob", "table", ["--smoke"],
                        ["--tokens", "16384", "8192", "4096", "--seconds", str(SECONDS["table"] - 40)]),
        "chunks": script("gpu", "chunks", ["--smoke", "--chunks"], ["--chunks"])}


def sweep_chunks(path: str, device, smoke: bool):
    """The gradient-in-forward loss at each chunk size, written to `path` after every row."""
    function, rows = op.linear_logprob_loss if device == "cuda" else linear_logprob_loss_ref, []
    heads, N, chunks = (["tiny"], 48, (16, 64)) if smoke else (["7b", "3b"], 16384, range(1024, 4609, 512))
    for head in heads:
        p = make_problem(head, N, N, False, device, 0)

        def loss_fn(logprobs, entropies, part):
            return loss_of(p, logprobs, part)

        for chunk in chunks:
            def both():
                loss, *_ = function(p.hidden, p.weight, p.targets, loss_fn, TEMPERATURE, chunk)
                return torch.autograd.grad(loss, (p.hidden, p.weight))

            rows.append({"head": head, "tokens": N, "chunk": chunk, "peak_bytes": peak_bytes(both, device),
                         "ms": milliseconds(both, device, 1 if smoke else 3, 1)})
            print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            write(path, {"rows": rows})


def write(path: str, figures: dict):
    with open(path, "w") as f:
        json.dump(figures, f, indent=1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the json files")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test")
    parser.add_argument("--chunks", action="store_true", help="that part alone, here; --out is then its file")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        print("error: no CUDA GPU here; --smoke runs a tiny version on the CPU", file=sys.stderr)
        return 2
    if args.chunks:
        sweep_chunks(args.out, device, args.smoke)
        return 0
    folder, end = os.path.abspath(args.out), time.monotonic() + sum(SECONDS.values())
    os.makedirs(folder, exist_ok=True)
    results = {"machine": describe_machine(device)}
    print(" ".join(f"{name}={value}" for name, value in results["machine"].items()), flush=True)
    for part, command in commands(folder, args.smoke).items():
        print(f"---- {part}", flush=True)
        results[part] = run(command, min(SECONDS[part], max(1, end - time.monotonic())))
        write(os.path.join(folder, "gpu.json"), results)
    for part in SECONDS:
        print(f"{part:<8} exit code {results[part]['code']} after {results[part]['seconds']:.0f} s", flush=True)
    return results["tests"]["code"] or int(results["tests"]["code"] is None)


if __name__ == "__main__":
    sys.exit(main())
