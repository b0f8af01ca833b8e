"""Compile every kernel as shipped for GPUs that are not there; print what the machine code needs, as json.

    python tests/compile_kernels.py           for all cards of CARDS; needs no GPU: ptxas is in Triton's wheel
    python tests/compile_kernels.py 80 90     for these compute capabilities

One row per kernel, dtype and architecture: registers, bytes of shared memory, spills (loads and stores of local memory,
bytes of stack), global loads and stores and how many of them are of 128 bits, asynchronous copies of 128 bits to shared
memory, shuffles and barriers. The exit code is 1 where a limit is passed; standard error says which.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import decode, grpo, logprob, sample

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TYPES = {"scale": "fp32", "stride": "i32", "dstride": "i32", "N": "i32", "clip_ratio_low": "fp32",
         "clip_ratio_high": "fp32", "clip_ratio_c": "fp32", "kl_coef": "fp32", "targets": "*i64", "lengths": "*i64",
         "heads": "i32", "count": "i32", "forbidden": "*i1", "tokens": "*i64", "top_p": "fp32"}  # the rest: *fp32
TILE = {"LANES": logprob.LANES, "WIDTH": logprob.WIDTH}
BLOCK = logprob.LANES * logprob.WIDTH
V = 152064  # the head of Qwen2.5-VL-7B
BF16 = dict.fromkeys(("dlogits", "query", "keys", "values", "out"), "*bf16")


def decode_constants(heads: int, kv_heads: int, number_bytes: int) -> dict:
    """Of the attention of 128 rows over a cache of 4,096 tokens."""
    block, chunk = decode.tile_sizes(128 * kv_heads, 4096, 128, number_bytes)
    return {"R": heads // kv_heads, "ROWS": decode.ROWS, "D": 128, "CHUNK": chunk, "BLOCK": block}


# Compute capability -> bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical
# specifications per compute capability). 7.5 is a T4; 8.6, 8.9 and 12.0 are cards of 24 GB and the like.
CARDS = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
SHARED = 75_840  # bytes that a kernel here may take at most, so that an H100 runs three programs beside each other
REGISTERS = 65_536  # of a multiprocessor, on all of them
MERGE = {"COUNT": decode.MOST_PARTS, "D": 128, "CHUNK": 512}
SAMPLE = {"V": V, "BLOCK": sample.BLOCK}
CASES = [  # name, kernel, its constants, types that are not as in TYPES, warps
    ("statistics", logprob._statistics_kernel, {"V": V, **TILE}, {}, logprob.WARPS),
    ("dlogits bf16", logprob._dlogits_kernel, {"V": V, "BLOCK": BLOCK}, BF16, logprob.WARPS),
    ("dlogits fp32", logprob._dlogits_kernel, {"V": V, "BLOCK": BLOCK}, {}, logprob.WARPS),
    ("grpo loss", grpo._grpo_kernel, {"BLOCK": grpo.BLOCK}, {}, 4),
    ("decode 3B bf16", decode._part_kernel, decode_constants(16, 2, 2), BF16, decode.WARPS),
    ("decode 7B bf16", decode._part_kernel, decode_constants(28, 4, 2), BF16, decode.WARPS),
    ("decode 7B fp32", decode._part_kernel, decode_constants(28, 4, 4), {}, decode.WARPS),
    ("merge", decode._merge_kernel, MERGE, BF16, decode.WARPS),
    ("sample top_p 1", sample._sample_kernel, {"NUCLEUS": False, **SAMPLE}, {}, sample.WARPS),
    ("sample nucleus", sample._sample_kernel, {"NUCLEUS": True, **SAMPLE}, {}, sample.WARPS),
]


def compile_kernel(kernel, constants: dict, changes: dict, warps: int, arch: int):
    """What a launch with pointers and strides divisible by 16 would compile: only those get 128-bit accesses."""
    names = kernel.arg_names
    types = TYPES | changes
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
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
        code = subprocess.run([CUOBJDUMP, "-res-usage", "-sass", file.name], capture_output=True, text=True,
                              check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", code).groups()
    patterns = {"spills": r"\b(?:LDL|STL)\b", "wide_loads": r"\bLDG\.E\.128", "wide_stores": r"\bSTG\.E\.128",
                "loads": r"\bLDG\.", "stores": r"\bSTG\.", "shuffles": r"\bSHFL\.", "barriers": r"\bBAR\.SYNC",
                "async_loads": r"\bLDGSTS\.\S*\.128"}
    counts = {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}
    return {"registers": int(registers), "stack": int(stack), **counts}


def passed_limits(row: dict, warps: int) -> list[str]:
    """Where a kernel takes more than its card has, or spills; only bf16 attention without tensor cores may spill."""
    wrong = []
    if row["shared"] > min(SHARED, CARDS[row["arch"]]):
        wrong.append(f"{row['shared']} bytes of shared memory")
    if -(-row["registers"] // 8) * 8 * 32 * warps > REGISTERS:  # a warp is given them by the eight
        wrong.append(f"{row['registers']} registers in {32 * warps} threads")
    if (row["spills"] or row["stack"]) and not (row["arch"] == 75 and re.fullmatch("decode .* bf16", row["kernel"])):
        wrong.append(f"{row['spills']} spills")
    return [f"{row['kernel']} for {row['arch']}: {what}" for what in wrong]


def main(*archs: str) -> int:
    rows = []  # of a kernel's name and sizes, and the counts to come
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:  # disassembles what has been compiled
        triton.knobs.cache.dir = folder  # compile anew, leave nothing behind
        for arch in map(int, archs or CARDS):
            for name, kernel, constants, changes, warps in CASES:
                compiled = compile_kernel(kernel, constants, changes, warps, arch)
                rows.append(({"kernel": name, "arch": arch, "shared": compiled.metadata.shared},
                             pool.submit(inspect_cubin, compiled.asm["cubin"])))
    rows = [row | counts.result() for row, counts in rows]
    print(json.dumps(rows))
    warps = {name: warps for name, *_, warps in CASES}
    wrong = [line for row in rows for line in passed_limits(row, warps[row["kernel"]])]
    print("\n".join(wrong), end="", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
