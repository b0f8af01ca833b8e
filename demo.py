"""The whole method on a laptop: a drawn world, a tiny Qwen2.5-VL, and the five stages through train.py and eval.py.

    python demo.py                 warm-up, sampling, stage 1, stage 2, and evaluations: about 4 minutes on 2 cores
    python demo.py --ablate        afterwards either stage alone with as many RL steps, over three seeds

Nothing here is special to the demo but world.py, which makes the data and the models, and the small sizes below. The
settings of RL are the method's (G 8, temperature 1.2, top-p 0.99, 4 updates a step, its clips, KL and reward weights);
the learning rate is higher, because the model is 10,000 times smaller.
"""
import argparse
import json
import os
import resource
import statistics
import sys
import time

from transformers.utils.logging import disable_progress_bar

import eval as evaluation
import train
from benchmarks.report import interval
from data import parse
from plumbing.processes import stop_processes
from plumbing.run_folder import write_text
from world import CELL, make_clip, make_world

# A waiting OpenMP thread spins for long by default: beside one other busy program two threads are 40 times slower so.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is loaded, so before the imports below


SIZES = dict(captions=3000, warmup=3000, questions=480, evaluation=500)
STEPS = dict(clip=300, base=320, sft=240, stage1=20, stage2=36)
PHASES = {"sft": "warm-up", "stage1": "after stage 1", "stage2": "after stage 2"}
FIGURES = ("accuracy", "caption_exact", "clip", "keyword", "format", "length")
PIXELS = str(4 * CELL * CELL)  # no image is resized
SHARED = ["--dtype", "float32", "--max_prompt", "64", "--max_response", "96", "--min_pixels", PIXELS,
          "--max_pixels", PIXELS, "--slots", "256"]
TRAINING = [*SHARED, "--restart", "--no_gradient_checkpointing", "--save_every", "0", "--token_budget", "2048"]
SUPERVISED = [*TRAINING, "--questions_per_rollout", "64", "--questions_per_update", "64", "--epochs", "20",
              "--lr", "3e-3", "--keep_prompts"]
REINFORCED = [*TRAINING, "--questions_per_rollout", "32", "--questions_per_update", "8", "--epochs", "100",
              "--lr", "1e-4"]


def call(program, *argv):
    """Run train.py or eval.py as the command line would; a failure ends the demo with its exit code."""
    argv = [str(word) for word in argv]
    print(f"\n$ python {os.path.basename(program.__file__)} {' '.join(argv)}", flush=True)
    code = program.main(argv)
    if code:
        sys.exit(code)


def supervise(out: str, model: str, rows: str, steps: int, seed: int, *flags):
    call(train, "--stage", "sft", "--out", out, "--model", model, "--data", rows, "--max_steps", steps, "--seed", seed,
         *SUPERVISED, *flags)


def reinforce(stage: str, out: str, steps: int, seed: int, clip: str, *inputs):
    call(train, "--stage", stage, "--out", out, "--max_steps", steps, "--seed", seed, "--clip", clip, *REINFORCED,
         *inputs)


def evaluate(world: str, clip: str, model: str, out: str) -> dict[str, tuple[float, float]]:
    """eval.py with four samples a question at temperature 1, and how often a caption is right in every word.

    Returns (mean, half width of the 95 % interval) of each figure.
    """
    call(evaluation, "--model", model, "--data", f"{world}/evaluation.jsonl", "--out", out, "--clip", clip, *SHARED,
         "--group_size", 4, "--temperature", "1.0")
    with open(f"{out}/report.json") as file:
        figures = {name: (f["mean"], f["half_width"]) for name, f in json.load(file)["figures"].items()}
    with open(f"{world}/evaluation.jsonl") as file:
        captions = {row["qid"]: row["caption"] for row in map(json.loads, file)}
    with open(f"{out}/responses.jsonl") as file:
        rows = [json.loads(line) for line in file]
    exact = [statistics.fmean(parse(response["text"]).description == captions[row["qid"]]
                              for response in row["responses"]) for row in rows]
    figures["caption_exact"] = interval(exact)
    return {name: figures[name] for name in FIGURES}


def run(out: str, seed: int, sizes: dict[str, int], steps: dict[str, int]) -> dict:
    """The world, its base models, the stages and their evaluation. Returns and writes out/summary.json."""
    world, clip, base = f"{out}/world", f"{out}/clip", f"{out}/base/sft/model"
    phases = {
        "world": lambda: make_world(out, seed, **sizes),
        "clip": lambda: make_clip(out, seed, sizes["captions"], steps["clip"]),
        "base": lambda: supervise(f"{out}/base", f"{out}/untrained", f"{world}/base.jsonl", steps["base"], seed,
                                  "--freeze_vision", "False"),  # what a downloaded model already knows
        "sft": lambda: supervise(out, base, f"{world}/warmup.jsonl", steps["sft"], seed),
        "sample": lambda: call(train, "--stage", "sample", "--out", out, "--data", f"{world}/questions.jsonl",
                               "--seed", seed, *TRAINING),
        "stage1": lambda: reinforce("1", out, steps["stage1"], seed, clip),
        "stage2": lambda: reinforce("2", out, steps["stage2"], seed, clip),
    }
    seconds, results = {}, {}
    for name, phase in phases.items():
        start = time.perf_counter()
        phase()
        seconds[name] = time.perf_counter() - start
        if name in PHASES:
            results[name] = evaluate(world, clip, f"{out}/{name}/model", f"{out}/eval/{name}")
            seconds[f"evaluate {name}"] = time.perf_counter() - start - seconds[name]
    summary = {"phases": {}, "seconds": seconds}
    for name, figures in results.items():
        intervals = {figure: [mean - half, mean + half] for figure, (mean, half) in figures.items()}
        summary["phases"][name] = {figure: mean for figure, (mean, _) in figures.items()} | {"intervals": intervals}
    write_text(f"{out}/summary.json", json.dumps(summary, indent=1))
    print_table({PHASES[name]: figures for name, figures in results.items()})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
          + f"; together {sum(seconds.values()):.0f}; peak memory {peak:.1f} GB")
    print(f"figures   {out}/summary.json\nresponses {out}/eval/*/responses.jsonl, {out}/stage*/rollouts/\n"
          f"models    {out}/sft/model, {out}/stage1/model, {out}/stage2/model")
    return summary


def print_table(rows: dict[str, dict[str, tuple[float, float]]]):
    """Mean and half width of the 95 % interval of each figure."""
    print(f"\n{'':<22}" + "".join(f"{figure:>16}" for figure in FIGURES))
    for name, figures in rows.items():
        print(f"{name:<22}" + "".join(f"{mean:>9.3f} ±{half:.3f}" for mean, half in figures.values()))


def ablate(out: str, seed: int, steps: dict[str, int]):
    """Two stages against either stage alone with as many RL steps; printed whichever way it ends.

    The seeds are of RL: world, warm-up and buckets are those of `run`.
    """
    world, clip, total = f"{out}/world", f"{out}/clip", steps["stage1"] + steps["stage2"]
    warm = ["--model", f"{out}/sft/model"]
    easy, medium = (["--data", f"{out}/sample/{name}.jsonl"] for name in ("easy", "medium"))
    rows = {}
    for s in range(seed + 1, seed + 4):
        folder = f"{out}/ablate/seed{s}"
        reinforce("1", f"{folder}/both", steps["stage1"], s, clip, *warm, *easy)
        reinforce("2", f"{folder}/both", steps["stage2"], s, clip, *medium)
        reinforce("1", f"{folder}/only1", total, s, clip, *warm, *easy)
        reinforce("2", f"{folder}/only2", total, s, clip, *warm, *medium)
        for name, last in (("both stages", "both/stage2"), ("stage 1 alone", "only1/stage1"),
                           ("stage 2 alone", "only2/stage2")):
            rows[f"{name}, seed {s}"] = evaluate(world, clip, f"{folder}/{last}/model", f"{folder}/eval/{last}")
    print_table(dict(sorted(rows.items())))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/demo", help="everything is written here (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of world, models and sampling (default: %(default)s)")
    parser.add_argument("--ablate", action="store_true", help="afterwards compare with either stage alone")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is negative")
    disable_progress_bar()  # of transformers, when it saves the tiny model
    run(args.out, args.seed, SIZES, STEPS)
    if args.ablate:
        ablate(args.out, args.seed, STEPS)
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
