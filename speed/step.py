"""A whole GRPO step against TRL's, its parts against Hugging Face's, and how it scales: ratios of medians in one run.

    python speed/step.py --micro_batches 4 8 16 --out speed/results/step_cpu.json   CPU, tiny model: 12 minutes
    python speed/step.py --out step_gpu.json        CUDA: drawn weights in the shape of Qwen2.5-VL-3B
    python speed/step.py --smoke                    tiny sizes, for a test

    step      rollout, reward, old and reference log-probs, update: train.rl_step against trl.GRPOTrainer
    rollout   G responses to each prompt: the slot sampler against generate(num_return_sequences=G), two of its caches
    train     log-probs of a group, forward and backward: packed behind a shared prompt against G padded rows
    scaling   our step as G or the prompt grows
    stage1    on a GPU: one GPU's share of stage 1's step on eight, memory against the plan; switches on and off

TRL is optional: `pip install trl` (1.16.0 was measured) leaves the pinned packages as they are. Equal on both sides of
`step`: model folder, prompts token by token, images, G, length limit, share of end tokens, forbidden tokens, reward
function, loss (clip 0.2 and 0.3, KL 0.01 to a reference model, token mean), optimiser steps per rollout, AdamW fused,
float32 master weights, precision, gradient checkpointing (on, the default of both), threads. TRL generates once per
rollout, with all prompts in one batch, and gets its images decoded, where we read files. Its micro-batch is the fastest
of --micro_batches; left at its defaults are attention (sdpa) and cache (dynamic). Not equal: random numbers, so that
lengths agree on average only where responses end by chance; our dual clip, which costs nothing; and that TRL skips the
old log-probs where there is one optimiser step per rollout. vLLM would be a different comparison and is left out.

Model flops are what the mathematics needs (speed/flops.py), so utilisation counts no recomputation. On a CPU both sides
run in turn; on a GPU, where they do not fit side by side, one after the other.
"""
import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import transformers
from transformers import AutoModelForImageTextToText

import data
from flops import forward_flops, peak_flops
from engine.policy import Policy, pack
from engine.weights import load_processor
from engine.sampler import generate
from data import seed_of
from shapes import make_model_folder
from sides import SETTINGS, Case, end_tokens, make_samples

HERE = os.path.dirname(os.path.abspath(__file__))
GPU_SHAPE = os.path.join(HERE, "configs", "qwen2.5-vl-3b.json")
PHASES = {"rollout": 1, "logprobs": 2, "update": 3}  # how many forward passes' flops each needs


def whole_cases(size: str) -> list[Case]:
    """The steps that both sides take."""
    if size == "gpu":
        return [Case("long tail, 4 updates", 8, 256, stop=0.004, prompt=400, updates=4, dtype="bfloat16")]
    if size == "smoke":
        return [Case("equal lengths, 2 updates", 2, 6, group_size=2, prompt=40, side=56, updates=2, micro_batch=2)]
    return [Case("equal lengths, 1 update", 4, 128), Case("equal lengths, 4 updates", 4, 128, updates=4),
            Case("long tail, 4 updates", 8, 256, stop=0.02, updates=4, slots=32)]


SWITCHES = {"fused_loss": ("off", "on"), "cuda_graphs": (False, True)}


def stage_cases(size: str) -> tuple[Case, Case]:
    """A small step, and what one of eight GPUs does in a step of stage 1: 560 questions, 5 updates; prompts as short
    as Geometry3K's, whose figures others publish."""
    if size == "smoke":
        small = Case("small", 2, 6, group_size=2, prompt=40, side=56, updates=2)
        return small, dataclasses.replace(small, name="stage 1", tokens=8)
    return (Case("small", 8, 128, prompt=400, updates=4, dtype="bfloat16"),
            Case("stage 1", 70, 1024, stop=0.0025, prompt=400, updates=5, slots=256, dtype="bfloat16"))


def switched(case: Case, name: str, value) -> Case:
    return dataclasses.replace(case, name=f"{name} {value}", options={name: value})


def scaling_cases(size: str) -> dict[str, list[Case]]:
    """Series in which one thing grows, with the same number of response tokens in all."""
    n, tokens, dtype = {"gpu": (4, 256, "bfloat16"), "cpu": (4, 128, "float32"), "smoke": (2, 4, "float32")}[size]
    sizes, prompts = ((2, 4), (40, 60)) if size == "smoke" else ((4, 8, 16), (100, 300, 600))

    def case(G, Q, length, P) -> Case:
        name = f"G {G}, {Q} prompts of {P} tokens, responses of {length}"
        return Case(name, Q, length, G, prompt=P, side=56, dtype=dtype)  # 4 image tokens

    G, P = sizes[1], prompts[1]
    return {"scaling with G, fewer questions": [case(g, n * G // g, tokens, P) for g in sizes],
            "scaling with G, shorter responses": [case(g, n, tokens * G // g, P) for g in sizes],
            "scaling with the prompt": [case(G, n, tokens, p) for p in prompts]}


# ------------------------------------------------------------------------------------------------ whole steps


class SideFailed(RuntimeError):
    """A side has ended; says with what."""


class Side:
    """A process of speed/sides.py."""

    def __init__(self, which: str, folder: str, cases: list[Case], threads: int):
        self.which, self.cases, self.complaints = which, cases, tempfile.TemporaryFile("w+")
        command = [sys.executable, os.path.join(HERE, "sides.py"), which, folder,
                   json.dumps([dataclasses.asdict(case) for case in cases]), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=self.complaints)

    def step(self, case: int) -> dict:
        """One GRPO step; SideFailed if the process has ended instead."""
        try:
            print(case, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.complaints.seek(0)
            last = (self.complaints.read().strip().splitlines() or ["no message"])[-1]
            raise SideFailed(f"{self.which}: {last[-300:]}") from None

    def close(self):
        with contextlib.suppress(BrokenPipeError):  # it has ended before
            self.process.stdin.close()
        self.process.wait()


def take_turns(sides: list[Callable[[], Side]], rounds: int, end: float, together: bool) -> list[list[dict]]:
    """`rounds` measured steps of every case of every side, after one unmeasured; fewer, but one, when the time is up.

    Side by side the sides alternate, so that whatever else a machine does meets all of them. Returns, for each case of
    each side, its steps, or one {"failed": why}.
    """
    found, groups = [], [sides] if together else [[side] for side in sides]
    for group in groups:
        running = [make() for make in group]
        steps = {(i, case): [] for i, side in enumerate(running) for case in range(len(side.cases))}
        for round_ in range(rounds + 1):
            if round_ > 1 and time.monotonic() > end:
                break
            for (i, case), taken in steps.items():
                if taken and "failed" in taken[-1]:
                    continue
                try:
                    taken.append(running[i].step(case))
                except SideFailed as error:
                    taken[:] = [{}, dict(failed=str(error))]
        for side in running:
            side.close()
        found += [taken[1:] for taken in steps.values()]
    return found


def figures(steps: list[dict], case: Case, shape, peak: float) -> dict:
    """Medians of what a side's steps say; utilisation and phases where the side knows its phases."""
    if "failed" in steps[0]:
        return steps[0]
    patches = case.side // shape.vision_config.patch_size
    rows = []
    for step in steps:
        tokens = sum(map(sum, step["lengths"]))
        F = forward_flops(shape, case.prompt, (1, patches, patches), step["lengths"])
        whole = tokens + case.prompt * sum(map(len, step["lengths"]))  # as EasyR1 counts: a prompt for each response
        row = dict(seconds=step["seconds"], update_s=step["update"], before_update_s=step["seconds"] - step["update"],
                   response_tokens=tokens, tokens_per_s=tokens / step["seconds"],
                   prompt_and_response_tokens_per_s=whole / step["seconds"], peak_memory_gb=step["peak_memory_gb"],
                   utilisation=sum(PHASES.values()) * F / step["seconds"] / peak)
        row |= {f"planned_{phase}_gb": peak_gb for phase, peak_gb in step.get("planned_gb", {}).items()}
        for phase, times in PHASES.items() if "phases" in step else ():
            seconds = step["phases"][phase]
            row |= {f"{phase}_s": seconds, f"{phase}_tokens_per_s": tokens / seconds,
                    f"{phase}_utilisation": times * F / seconds / peak}
        rows.append(row | dict(forward_flops=F))
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | dict(steps=len(rows))


def bench_steps(case: Case, folder: str, shape, peak: float, args, end: float, together: bool) -> dict:
    """Our step, TRL's with each micro-batch, and the ratio to its fastest."""
    makers = [lambda: Side("ours", folder, [case], args.threads)]
    most = case.questions * case.group_size // case.updates
    sizes = sorted({min(size, most) for size in args.micro_batches or [case.micro_batch]})
    assert not any(most % size for size in sizes), f"micro-batches of {sizes} rows would leave some of {most} out"
    missing = None if importlib.util.find_spec("trl") else "TRL is not installed: pip install trl"
    for size in [] if missing else sizes:
        other = dataclasses.replace(case, micro_batch=size)
        makers.append(lambda other=other: Side("trl", folder, [other], args.threads))
    mine, *theirs = [figures(steps, case, shape, peak) for steps in take_turns(makers, args.repeats, end, together)]
    row = dict(case=dataclasses.asdict(case), ours=mine, trl=missing or dict(zip(map(str, sizes), theirs)))
    times = {size: other["seconds"] for size, other in zip(sizes, theirs) if "seconds" in other}
    if times and "seconds" in mine:
        tokens = {figures["response_tokens"] for figures in (mine, *theirs) if "seconds" in figures}
        assert case.stop or len(tokens) == 1, f"response tokens {tokens} differ, where no response may stop early"
        fastest = min(times, key=times.get)
        row |= dict(trl_micro_batch=fastest, **versus(mine["seconds"], times[fastest]))
        row["ratio_update"] = row["trl"][str(fastest)]["update_s"] / mine["update_s"]
        row["ratio_before_update"] = row["trl"][str(fastest)]["before_update_s"] / mine["before_update_s"]
    return row


def bench_stage(folder: str, shape, peak: float, size: str, args, end: float) -> dict:
    """Our whole step of stage 1, then a small one with each switch at both of its values; in one process."""
    small, big = stage_cases(size)
    pairs = {name: values for name, values in SWITCHES.items() if name != "fused_loss" or args.device == "cuda"}
    cases = [small, big, *(switched(small, name, value) for name, values in pairs.items() for value in values)]
    side, found = Side("ours", folder, cases, args.threads), {}
    try:
        side.step(0)  # compiles the kernels
        found["ours"] = figures([side.step(1)], big, shape, peak)
        for i, case in enumerate(cases[2:], 2):
            if time.monotonic() > end - args.seconds / 4:  # which what comes next needs
                found["left_out"] = f"the time is up before {case.name}"
                break
            side.step(i)
            found.setdefault("switches", {})[case.name] = figures([side.step(i)], case, shape, peak)
    except SideFailed as error:
        found["failed"] = str(error)
    side.close()
    return found


def bench_scaling(series: dict[str, list[Case]], folder: str, shape, peak: float, args, end: float) -> dict:
    """Our steps of all series, in turn, and how much longer than of the first the training of the last takes."""
    cases = list(dict.fromkeys(case for members in series.values() for case in members))  # some are in several
    steps = take_turns([lambda: Side("ours", folder, cases, args.threads)], args.repeats, end, True)
    found = {case: figures(taken, case, shape, peak) for case, taken in zip(cases, steps)}
    rows = {}
    for name, members in series.items():
        mine = {case.name: found[case] for case in members}
        train = [row["logprobs_s"] + row["update_s"] for row in mine.values() if "seconds" in row]
        complete = len(train) == len(members)
        rows[name] = dict(cases=mine, train_last_to_first=train[-1] / train[0] if complete else None)
    return dict(series=rows)


# ------------------------------------------------------------------------------------------------------ parts


def versus(ours_s: float, theirs_s: float) -> dict[str, float]:
    return dict(ours_s=ours_s, theirs_s=theirs_s, ratio=theirs_s / ours_s)


def medians(functions: dict[str, Callable], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of functions run in turn, after one unmeasured run each."""
    seconds = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def padded_batch(prompts: list[data.Prompt], copies: int, image_token: int, device: str) -> dict:
    """Prompts of one length, each `copies` times, as transformers' forward and generate take them."""
    ids = torch.tensor([prompt.input_ids for prompt in prompts for _ in range(copies)], device=device)
    images = [prompt for prompt in prompts for _ in range(copies)]
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == image_token).int(),
                pixel_values=torch.cat([prompt.pixel_values for prompt in images]).to(device),
                image_grid_thw=torch.cat([prompt.grid_thw for prompt in images]).to(device))


def bench_train(policy, theirs, processor, case: Case, repeats: int, device: str) -> dict:
    """Forward and backward of one group: a prompt and G responses of around `case.tokens` tokens."""
    G, P = case.group_size, case.prompt
    prompt = data.encode_prompt(make_samples(processor, case)[0], processor)
    lengths = [case.tokens - 2 * (G - 1 - i) for i in range(G)]
    responses = [[(7 * i + j) % 200 for j in range(n)] for i, n in enumerate(lengths)]
    packed = pack([(prompt, responses)], device)
    batch = padded_batch([prompt], G, theirs.config.image_token_id, device)
    tail = torch.tensor([response + [0] * (case.tokens - len(response)) for response in responses], device=device)
    real = torch.arange(case.tokens, device=device) < torch.tensor(lengths, device=device)[:, None]  # (G, tokens)
    batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(tail).int()], 1)
    batch["input_ids"] = torch.cat([batch["input_ids"], tail], 1)  # (G, P + tokens)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], real.long()], 1)

    def ours():
        logprobs, _ = policy(packed)
        logprobs.sum().backward()
        return logprobs.detach()

    def padded():
        logits = theirs(**batch, logits_to_keep=case.tokens + 1).logits[:, :-1].float()  # (G, tokens, V)
        logprobs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, P:, None])[..., 0]
        (logprobs * real).sum().backward()
        return logprobs.detach()[real]

    difference = float((ours() - padded()).abs().mean())
    limit = 1e-4 if case.dtype == "float32" else 0.05
    assert difference < limit, f"the two do not compute the same: log-probs differ by {difference} in the mean"
    seconds = medians(dict(ours=ours, padded=padded), repeats, device)
    return dict(prompt=P, responses=lengths, mean_logprob_difference=difference,
                **versus(seconds["ours"], seconds["padded"]))


def bench_rollout(replica, theirs, processor, case: Case, repeats: int, device: str) -> dict:
    """G responses to each question: ours against generate() with each of its caches."""
    prompts = [data.encode_prompt(sample, processor) for sample in make_samples(processor, case)]
    inputs = padded_batch(prompts, 1, replica.config.image_token_id, device)
    ends = end_tokens(processor, case) or [len(processor.tokenizer)]  # the latter is never drawn
    replica.generation_config.eos_token_id = theirs.generation_config.eos_token_id = ends
    theirs.generation_config.pad_token_id = 0
    slots = case.slots or case.questions * case.group_size

    def ours():
        seeds = [seed_of(i) for i in range(case.questions)]
        return generate(replica, prompts, seeds, case.group_size, case.tokens, 1.0, 1.0, slots,
                        len(processor.tokenizer))

    def hugging_face(cache):
        torch.manual_seed(0)
        return theirs.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                               num_return_sequences=case.group_size, max_new_tokens=case.tokens,
                               cache_implementation=cache)

    functions = {"ours": ours} | {cache: lambda cache=cache: hugging_face(cache) for cache in ("dynamic", "static")}
    seconds = medians(functions, repeats, device)
    lengths = [len(response.ids) for reply in ours() for response in reply]
    rows = {cache: versus(seconds["ours"], seconds[cache]) for cache in ("dynamic", "static")}
    return dict(case=dataclasses.asdict(case), mean_length=statistics.fmean(lengths),
                tokens_per_s=sum(lengths) / seconds["ours"], **rows)


def part_cases(size: str) -> dict[str, Case]:
    if size == "gpu":
        return {"train": Case("train", 1, 512, prompt=400, dtype="bfloat16"),
                "rollout, equal lengths": Case("equal", 8, 256, prompt=400, dtype="bfloat16"),
                "rollout, long tail": Case("tail", 16, 512, prompt=400, stop=0.01, slots=64, dtype="bfloat16")}
    if size == "smoke":
        return {"train": Case("train", 1, 6, 2, prompt=40, side=56),
                "rollout, equal lengths": Case("equal", 2, 4, 2, prompt=40, side=56),
                "rollout, long tail": Case("tail", 2, 8, 2, prompt=40, side=56, stop=0.1, slots=2)}
    return {"train": Case("train", 1, 128), "rollout, equal lengths": Case("equal", 24, 64, prompt=80, side=112),
            "rollout, long tail": Case("tail", 16, 256, prompt=80, side=112, stop=0.02, slots=64)}


def bench_part(name: str, case: Case, folder: str, args, device: str) -> dict:
    processor = load_processor(folder, SETTINGS["min_pixels"], SETTINGS["max_pixels"])
    dtype = getattr(torch, case.dtype)
    ours = Policy.load(folder, device, dtype)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
    bench = bench_train if name == "train" else bench_rollout
    return bench(ours, theirs, processor, case, args.repeats, device)


# ------------------------------------------------------------------------------------------------------- main


def describe(name: str, row) -> str:
    """A row of results on one line or a few."""
    if name == "stage1":
        switches = [f"\n    {case:<20} {mine['seconds']:8.3f} s" for case, mine in row.get("switches", {}).items()]
        return f"{name:<44} {json.dumps(row.get('ours', row))}" + "".join(switches)
    if "ratio" in row:
        return f"{name:<44} ours {row['ours_s']:8.3f} s  theirs {row['theirs_s']:8.3f} s  ratio {row['ratio']:.2f}"
    if "seconds" in row.get("ours", {}):
        return f"{name:<44} ours {row['ours']['seconds']:8.3f} s  theirs: {row['trl']}"
    if "dynamic" in row:
        return "\n".join(describe(f"{name}, {cache} cache", row[cache]) for cache in ("dynamic", "static"))
    if "series" in row:
        lines = []
        for series, found in row["series"].items():
            lines.append(f"{series}: training of the last / of the first: {found['train_last_to_first']}")
            for case, mine in found["cases"].items():
                seconds = ", ".join(f"{phase} {mine[f'{phase}_s']:.3f}" for phase in PHASES if "seconds" in mine)
                lines.append(f"    {case:<56} seconds: {seconds or mine}")
        return "\n".join(lines)
    return f"{name:<44} {json.dumps(row)}"


def utilisation(row: dict) -> str:
    """What our side of a whole step says about the machine."""
    mine = row["ours"]
    phases = ", ".join(f"{phase} {mine[f'{phase}_s']:.3f} s, {mine[f'{phase}_tokens_per_s']:.0f} tokens/s, "
                       f"{mine[f'{phase}_utilisation']:.1%} of peak" for phase in PHASES)
    return f"    {phases}; peak memory {mine['peak_memory_gb']:.2f} GB"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the figures to this json file")
    parser.add_argument("--only", nargs="+", default=["step", "rollout", "train", "scaling"],
                        choices=["stage1", "step", "rollout", "train", "scaling"])
    parser.add_argument("--shape", help="config.json of the model; default: the demo's tiny one, on CUDA the 3B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro_batches", nargs="+", type=int, help="of TRL, the fastest counts; default: 8 rows")
    parser.add_argument("--peak_tflops", type=float, help="what this machine can do; default: data sheet, or measured")
    parser.add_argument("--seconds", type=float, default=3600, help="start no measurement after this long")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test")
    args = parser.parse_args()
    if args.out and not os.path.isdir(os.path.dirname(args.out) or "."):
        parser.error(f"--out {args.out}: there is no such folder")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give 1 or more")
    return args


def measurements(folder: str, shape, peak: float, args, end: float):
    """(name, function that measures it) in the order of importance."""
    size = "smoke" if args.smoke else "gpu" if args.device == "cuda" else "cpu"
    parts = part_cases(size)
    if "stage1" in args.only:
        yield "stage1", lambda: bench_stage(folder, shape, peak, size, args, end)
    if "step" in args.only:
        for case in whole_cases(size):
            yield f"step, {case.name}", lambda: bench_steps(case, folder, shape, peak, args, end, args.device == "cpu")
    for name in (name for name in parts if name.split(",")[0] in args.only):
        yield name, lambda: bench_part(name, parts[name], folder, args, args.device)
    if "scaling" in args.only:
        yield "scaling", lambda: bench_scaling(scaling_cases(size), folder, shape, peak, args, end)


def main():
    args = arguments()
    end = time.monotonic() + args.seconds
    torch.set_num_threads(args.threads)
    peak, source = peak_flops(args.device, args.peak_tflops)
    machine = dict(device=torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
                   cores=os.cpu_count(), threads=args.threads, torch=torch.__version__,
                   transformers=transformers.__version__,
                   trl=importlib.metadata.version("trl") if importlib.util.find_spec("trl") else None,
                   peak_flops=peak, peak_flops_source=source)
    print(" ".join(f"{name}={value}" for name, value in machine.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shape_file = args.shape or (GPU_SHAPE if args.device == "cuda" else None)
        shape = make_model_folder(folder, shape_file, args.device)
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the sides need it all
        machine["shape"] = os.path.basename(shape_file or "the demo's tiny model")
        machine["layers"] = shape.text_config.num_hidden_layers
        results = {}
        for name, measure in measurements(folder, shape, peak, args, end):
            results[name] = measure() if time.monotonic() < end else dict(left_out="the time is up")
            print(describe(name, results[name]), flush=True)
            if name.startswith("st") and "seconds" in results[name].get("ours", {}):
                print(utilisation(results[name]), flush=True)
            if args.out:  # after every row: a run that is cut off keeps what it has
                with open(args.out, "w") as f:
                    json.dump(dict(machine=machine, results=results), f, indent=1)


if __name__ == "__main__":
    main()
