"""Compile every kernel as shipped for GPUs that are not there; print what the machine code needs, as json.

    python tests/compile_kernels.py        needs no GPU: ptxas and cuobjdump are in Triton's wheel

One row per kernel, dtype and architecture: registers, spills (loads and stores of local memory, bytes of stack), global
loads and stores and how many of them are of 128 bits, shuffles and barriers.
"""
import json
import os
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import grpo, logprob

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
SCALARS = {"scale": "fp32", "stride": "i32", "dstride": "i32", "N": "i32", "clip_low": "fp32", "clip_high": "fp32",
           "clip_dual": "fp32", "kl_coef": "fp32", "targets": "*i64"}  # everything else points to float32
TILE = {"LANES": logprob.LANES, "WIDTH": logprob.WIDTH}
BLOCK = logprob.LANES * logprob.WIDTH
CASES = [  # name, kernel, its constants, dtype of dlogits, warps; V is the head of Qwen2.5-VL-7B
    ("statistics", logprob._statistics_kernel, {"V": 152064, **TILE}, "fp32", logprob.WARPS),
    ("dlogits bf16", logprob._dlogits_kernel, {"V": 152064, "BLOCK": BLOCK}, "bf16", logprob.WARPS),
    ("dlogits fp32", logprob._dlogits_kernel, {"V": 152064, "BLOCK": BLOCK}, "fp32", logprob.WARPS),
    ("grpo loss", grpo._grpo_kernel, {"BLOCK": grpo.BLOCK}, "fp32", 4),
]


def compile_kernel(kernel, constants: dict, dtype: str, warps: int, arch: int):
    """What a launch with pointers and strides divisible by 16 would compile: only those get 128-bit accesses."""
    names = kernel.arg_names
    types = {name: SCALARS.get(name, "*" + (dtype if name == "dlogits" else "fp32")) for name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if signature[name][0] == "*" or name in ("stride", "dstride")]
    source = ASTSource(fn=kernel, signature=signature,
                       constexprs={(names.index(name),): value for name, value in constants.items()},
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def inspect_cubin(cubin: bytes) -> dict[str, int]:
    """Registers and stack from the resource table, the rest counted in the disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        table, code = (subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
                       for option in ("-res-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", table).groups()
    patterns = {"spills": r"\b(?:LDL|STL)\b", "wide_loads": r"\bLDG\.E\.128", "wide_stores": r"\bSTG\.E\.128",
                "loads": r"\bLDG\.", "stores": r"\bSTG\.", "shuffles": r"\bSHFL\.", "barriers": r"\bBAR\.SYNC"}
    counts = {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}
    return {"registers": int(registers), "stack": int(stack), **counts}


def main():
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # compile anew, leave nothing behind
        for arch in (80, 90):
            for name, kernel, constants, dtype, warps in CASES:
                compiled = compile_kernel(kernel, constants, dtype, warps, arch)
                rows.append({"kernel": name, "arch": arch, **inspect_cubin(compiled.asm["cubin"])})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
