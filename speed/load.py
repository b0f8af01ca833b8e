r"""Loading and exporting at size: peak host memory of a rank and seconds, against from_pretrained followed by sharding.

    python speed/load.py --export --out speed/results/load_cpu.json              a scaled shape, 0.9 GB in float32
    python speed/load.py --config speed/configs/qwen2.5-vl-3b.json --processes 2 --ways ours --dtype bfloat16 \
        --file_bytes 1073741824 --export --out speed/results/load_cpu.json       and the same in float32: 15 GB

It makes its own checkpoint of random bf16 weights in the naming of the hub, several files, and loads it

    ours    Policy.load: an empty model on the meta device, each rank copies its own rows out of the mapped files
    naive   from_pretrained in the dtype of the master weights on every rank, then shard

Memory is anonymous memory (RssAnon: what cannot be dropped, unlike mapped files) above what the process had before. The
least that loading can need is the rank's own shard; here that lies on the CPU too, with a GPU it would not count.
"""
import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data  # noqa: F401  has to come before transformers' model code, and says why
import torch
import transformers
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import demo
from engine.weights import export, hub_name
from engine.policy import Policy, shard
from plumbing.processes import start_processes, stop_processes

GB = 1e9
SCALED = dict(  # Qwen2.5-VL-3B with its vocabulary, a third of its width and fewer layers; flat, as on the hub
    architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", tie_word_embeddings=True,
    vocab_size=151936, hidden_size=768, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=6,
    num_key_value_heads=2, eos_token_id=151645, image_token_id=151655, video_token_id=151656,
    vision_start_token_id=151652, vision_end_token_id=151653, rope_theta=1000000.0, torch_dtype="bfloat16",
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    vision_config=dict(depth=4, hidden_size=640, intermediate_size=1712, num_heads=8, in_chans=3, out_hidden_size=768,
                       patch_size=14, spatial_merge_size=2, window_size=112, fullatt_block_indexes=[3]))


# ------------------------------------------------------------------------------------ the checkpoint


def make_checkpoint(folder: str, config_path: str | None, file_bytes: int) -> int:
    """Write random bf16 weights file by file, with an index, under the hub's names; returns how many parameters."""
    os.makedirs(folder)
    if config_path:
        shutil.copy(config_path, os.path.join(folder, "config.json"))
    else:
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(SCALED, f)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    shapes = {hub_name(model.config, name): parameter.shape for name, parameter in model.named_parameters()}
    parts, size = [[]], 0
    for name, shape in shapes.items():
        if parts[-1] and size + 2 * shape.numel() > file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += 2 * shape.numel()
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        weights = {name: torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)
                   for name in names}
        save_file(weights, os.path.join(folder, file), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    count = sum(shape.numel() for shape in shapes.values())
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": 2 * count}, "weight_map": weight_map}, f)
    return count


# ----------------------------------------------------------------------- one rank: load and measure


def status_bytes(path: str, name: str) -> int:
    """A line of a /proc file that is given in kB."""
    with open(path) as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name + ":")) * 1024


class Peak:
    """Largest anonymous memory above that at the start, sampled every 2 ms, and seconds: `with Peak() as peak: ..`."""

    def __enter__(self):
        self.start, self.bytes, self.done = status_bytes("/proc/self/status", "RssAnon"), 0, threading.Event()
        self.began, self.thread = time.perf_counter(), threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.002):
            self.bytes = max(self.bytes, status_bytes("/proc/self/status", "RssAnon") - self.start)

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began
        self.done.set()
        self.thread.join()


def load_naively(folder: str, mesh, dtype):
    """What most scripts do: the whole model on every rank, then shards of it."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    shard(model, mesh, torch.bfloat16)
    return model


def measure(args):
    """On each rank: load, sum up what was loaded, export if asked; rank-R.json beside the checkpoint."""
    device, mesh = start_processes()
    processor = demo.make_processor(["How many?"])
    dtype, rank, world_size = getattr(torch, args.dtype), mesh.get_rank(), mesh.size()
    with Peak() as loading:
        if args.worker == "ours":
            policy = Policy.load(args.folder, device, dtype, mesh)
        else:
            policy = load_naively(args.folder, mesh, dtype)
    local = [p.to_local() if isinstance(p, DTensor) else p for p in policy.parameters()]
    rows = max(-(-p.shape[0] // world_size) * p.shape[1:].numel() for p in policy.parameters())
    result = dict(shard=sum(p.nbytes for p in local), slice=2 * rows, peak=loading.bytes, seconds=loading.seconds,
                  checksum=sum(p.detach().sum(dtype=torch.float64).item() for p in local))
    if args.export:
        with Peak() as exporting:
            export(os.path.join(args.folder, "export"), policy, processor, file_bytes=args.file_bytes)
        result |= dict(export_peak=exporting.bytes, export_seconds=exporting.seconds)
    with open(os.path.join(args.folder, f"rank-{rank}.json"), "w") as f:
        json.dump(result, f)
    del policy, local
    return stop_processes(0)


# -------------------------------------------------------------------------------------- the compare


def run(args, folder: str, way: str, processes: int) -> dict:
    """Start the ranks of one measurement; returns the worst rank's figures."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               os.path.abspath(__file__), "--worker", way, "--folder", folder, "--dtype", args.dtype,
               "--file_bytes", str(args.file_bytes), *(["--export"] if args.export and way == "ours" else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = []
    for rank in range(processes):
        with open(os.path.join(folder, f"rank-{rank}.json")) as f:
            ranks.append(json.load(f))
    shutil.rmtree(os.path.join(folder, "export"), ignore_errors=True)
    result = {name: max(rank[name] for rank in ranks) for name in ranks[0] if name != "checksum"}
    return dict(way=way, processes=processes, checksums=[rank["checksum"] for rank in ranks], **result)


def check(results: list[dict]):
    """Both ways have the same numbers on each rank, and all numbers of processes the same sum, but for rounding."""
    for a in results:
        for b in results:
            if a["processes"] == b["processes"]:
                assert a["checksums"] == b["checksums"], f"{a} and {b} did not load the same"
            assert abs(sum(a["checksums"]) - sum(b["checksums"])) < 1e-3, f"{a} and {b} did not load the same"


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="config.json of the shape; default: the scaled one")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", default=["ours", "naive"], choices=["ours", "naive"])
    parser.add_argument("--dtype", default="float32", help="of the loaded weights: float32, or bfloat16 as a reference")
    parser.add_argument("--file_bytes", type=int, default=256 << 20, help="of a weight file, read or exported")
    parser.add_argument("--export", action="store_true", help="also measure the export")
    parser.add_argument("--out", help="also add the figures to this json file, under the name of the shape")
    parser.add_argument("--worker", choices=["ours", "naive"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out and not os.path.isdir(os.path.dirname(args.out) or "."):
        parser.error(f"--out {args.out}: there is no such folder")
    return args


def compare(args) -> tuple[int, list[dict]]:
    """All measurements of one shape: its number of parameters and a result for each way and number of processes."""
    with tempfile.TemporaryDirectory() as base:
        folder = os.path.join(base, "model")
        count = make_checkpoint(folder, args.config, args.file_bytes)
        whole = count * getattr(torch, args.dtype).itemsize
        needed = whole * (max(args.processes) + 1 if "naive" in args.ways else 1) + 3 * GB
        available = status_bytes("/proc/meminfo", "MemAvailable")
        assert needed < available, f"{needed / GB:.1f} GB of memory needed, {available / GB:.1f} GB available"
        results = [run(args, folder, way, n) for n in args.processes for way in args.ways]
    check(results)
    for result in results:
        result["ratio"] = result["peak"] / (result["shard"] + result["slice"])
    return count, results


def show(results: list[dict], file_bytes: int):
    print("processes  way    shard GB  slice GB  peak GB  peak / (shard + slice)  seconds")
    for r in results:
        print(f"{r['processes']:>9}  {r['way']:<5} {r['shard'] / GB:>9.2f} {r['slice'] / GB:>9.2f} "
              f"{r['peak'] / GB:>8.2f} {r['ratio']:>23.2f} {r['seconds']:>8.1f}")
        if "export_peak" in r:
            print(f"{'':>11}export in files of {file_bytes / GB:.2f} GB: {r['export_peak'] / GB:.2f} GB more, "
                  f"{r['export_seconds']:.1f} s")


def main():
    args = flags()
    if args.worker:
        return measure(args)
    count, results = compare(args)
    shape = os.path.splitext(os.path.basename(args.config))[0] if args.config else "scaled"
    print(f"{shape}: {count / 1e9:.3f} B parameters in {args.dtype}")
    show(results, args.file_bytes)
    if args.out:
        machine = dict(cpu=platform.processor() or platform.machine(), cores=os.cpu_count(), torch=torch.__version__,
                       transformers=transformers.__version__)
        saved = {}
        if os.path.exists(args.out):
            with open(args.out) as f:
                saved = json.load(f)
        saved[f"{shape}, {args.dtype}"] = dict(machine=machine, parameters=count, file_bytes=args.file_bytes,
                                               results=results)
        with open(args.out, "w") as f:
            json.dump(saved, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
