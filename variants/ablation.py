"""Do two stages beat one? A world in which the question has a fair test, the arms, and a table (docs/ablation.md).

    python demo.py --world busy                                 warm-up and both stages there, about 6 minutes
    python demo.py --ablate --world busy --out runs/ablation    all arms over seeds; goes on where it stopped
    python demo.py --ablate --world busy --out runs/ablation --only both,stage2        these arms alone
    python -m variants.ablation runs/ablation                   table and figure of what is complete

The world has twelve kinds of objects, and the warm-up teacher takes eight of them for another, each half of the time. A
question touches few of the eight, so an answer that is wrong says little about which; key words and CLIP see them all.
Two runs go at a time, one thread each. The world, its base model, the warm-up, the buckets and RL are all of the seed.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import fmean, stdev

import data
import demo
import train
from plumbing.processes import stop_processes
from plumbing.run_folder import write_text

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# --- the busy world -------------------------------------------------------------------------------------------------
SIDE = 3  # cells in a row of the grid
COLOURS = {"red": (220, 40, 40), "orange": (235, 145, 30), "blue": (40, 90, 220), "purple": (140, 40, 170)}
CORNERS = {"circle": 0, "square": 4, "triangle": 3}
FEWEST, MOST = 5, 9  # objects
SLIP = 0.5  # how often the warm-up teacher takes an object for another, where it ever does
MISTAKEN = {  # what it takes for what
    ("purple", "circle"): ("blue", "circle"), ("orange", "square"): ("red", "square"),
    ("red", "triangle"): ("red", "circle"), ("blue", "square"): ("blue", "circle"),
    ("orange", "triangle"): ("red", "triangle"), ("purple", "square"): ("purple", "triangle"),
    ("red", "circle"): ("orange", "circle"), ("blue", "triangle"): ("purple", "triangle")}
KINDS = {"total": 15, "add": 15, "count": 20, "subtract": 20, "count corners of": 30}  # of a hundred questions
DETAIL = ("count", "subtract", "count corners of")  # kinds whose answer depends on what the objects are


@dataclass(frozen=True)
class BusyQuestion(demo.Question):
    """A question about all objects, a colour or a shape."""

    @property
    def text(self) -> str:
        return {"total": "How many objects are there?", "count": f"How many {self.label} are there?",
                "subtract": f"Subtract all {self.label}. How many objects are left?",
                "count corners of": f"How many corners do the {self.label} have?",
                "add": f"Add {self.extra} {self.label}. How many objects are there?"}[self.kind]

    def names(self, pair: tuple[str, str]) -> int:
        """What an object is worth: how much it adds to the running number."""
        if self.kind == "count corners of":
            return CORNERS[pair[1]]
        return int(self.kind in ("total", "add") or super().names(pair))

    def reason(self, pairs: tuple, counts: list[int]) -> tuple[list[str], int]:
        """The steps to the answer, and the answer. Step 1 lists every object whole, with its worth and then the running
        number: "red triangle +0: 0, blue circle +1: 1", since without the worth running numbers are not learned."""
        total, named = len(pairs), sum(counts)
        listed = ", ".join(f"{' '.join(pair)} +{counts[i]}: {sum(counts[: i + 1])}" for i, pair in enumerate(pairs))
        if self.kind == "subtract":
            return [listed, f"{total} - {named} = {total - named}"], total - named
        if self.kind == "add":
            return [listed, f"{total} + {self.extra} = {total + self.extra}"], total + self.extra
        return [listed], named


def solve(question: demo.Question, pairs: tuple) -> tuple[list[str], int]:
    """The right steps and the right answer, if these are the objects."""
    return question.reason(pairs, [question.names(pair) for pair in pairs])


def ask(objects: tuple, rng: random.Random) -> BusyQuestion:
    """Labels are a colour or a shape, four times in five of an object that is there."""
    [kind] = rng.choices(list(KINDS), list(KINDS.values()))
    colour, shape = rng.choice(objects) if rng.random() < 0.8 else (rng.choice(list(COLOURS)), rng.choice(demo.SHAPES))
    colour, shape = rng.choice([(colour, ""), ("", shape)]) if kind in ("add", "count", "subtract") else ("", "")
    return BusyQuestion(kind, colour, shape, rng.randint(1, 4))


def make_items(count: int, seed: int, split: str) -> list[demo.Item]:
    """`count` items from the stream (seed, split); the responses are those of the imperfect warm-up teacher."""
    rng, items = random.Random(f"busy {seed} {split}"), []
    for _ in range(count):
        objects = tuple((rng.choice(list(COLOURS)), rng.choice(demo.SHAPES)) for _ in range(rng.randint(FEWEST, MOST)))
        question = ask(objects, rng)
        seen = tuple(MISTAKEN[pair] if pair in MISTAKEN and rng.random() < SLIP else pair for pair in objects)
        steps, answer = solve(question, objects)
        response = demo.teach(question, seen, 0, 0, rng)
        items.append(demo.Item(objects, demo.draw(objects, rng, COLOURS, SIDE), question, ". ".join(steps) + ".",
                               str(answer), response, demo.describe(objects)))
    return items


BUSY = demo.World(
    make_items, COLOURS,
    demo.CLIP_CONFIG | dict(vision_cfg=demo.CLIP_CONFIG["vision_cfg"] | dict(image_size=SIDE * demo.CELL),
                            text_cfg=demo.CLIP_CONFIG["text_cfg"] | dict(context_length=32)),
    dict(captions=3000, warmup=3000, questions=480, evaluation=500),
    dict(clip=300, base=700, sft=400, stage1=12, stage2=36),
    (*(f" {number}" for number in range(10, 37)), *(f" +{worth}:" for worth in (0, 1, 3, 4))),
    ("--max_response", "112", "--min_pixels", str(SIDE**2 * 28**2), "--max_pixels", str(SIDE**2 * 32**2)))

WORLDS = {"small": demo.World(), "busy": BUSY}

# --- the arms -------------------------------------------------------------------------------------------------------
SEEDS = (6, 7, 8, 9, 10)  # settings were chosen on seed 0; seeds 1 to 3 were those of a first comparison
QUESTIONS, HELD_OUT = 1000, 256  # asked in the end, and of these during training
MAIN = ("both", "stage1", "stage2", "mixed")  # on all seeds, the others on the first three
LAST = ("no_length", "short_first", "long_first", "strong_kl")
# Half of what either stage weighs, all at once, on the questions of both.
ALL_PARTS = ("--clip_weight", 0.2, "--keyword_weight", 0.2, "--format_weight", 0.1, "--length_weight", 0.05,
             "--accuracy_weight", 0.45)
RL = ("--eval_every", 4, "--eval_questions", HELD_OUT)  # of every arm
EVALUATION = ("--group_size", 2)  # answers to each question at temperature 1
MINUTES = dict(warmup=6.5, arm=3)  # of one quiet core
MEASURED = ("--keyword_weight", 1e-12)  # has eval/keyword computed, and vanishes in a float32 sum of rewards


def arms(first: int, second: int) -> dict[str, list[tuple]]:
    """name -> its runs one after the other, each (stage, buckets, steps, flags), with equal steps in all."""
    total, medium = first + second, ("2", "medium", second, MEASURED)
    return {
        "both": [("1", "easy", first, ()), medium],
        "stage1": [("1", "easy", total, ())],
        "stage2": [("2", "medium", total, MEASURED)],
        "mixed": [("2", "easy,medium", total, ALL_PARTS)],
        "swapped": [medium, ("1", "easy", first, ())],
        "no_clip": [("1", "easy", first, ("--clip_weight", 0)), medium],
        "no_keywords": [("1", "easy", first, ("--keyword_weight", 0)), medium],
        "unsorted": [("1", "", first, ()), ("2", "", second, MEASURED)],
        "no_length": [("1", "easy", first, ("--length_weight", 0)), medium],
        "short_first": [("1", "easy", first // 3, ()), ("2", "medium", total - first // 3, MEASURED)],
        "long_first": [("1", "easy", 2 * first, ()), ("2", "medium", total - 2 * first, MEASURED)],
        "strong_kl": [("1", "easy", first, ("--kl_coef", 0.1)), medium]}


def argv_of(folder: str, arm: str, number: int, seed: int, world: demo.World) -> list[str]:
    """The command line of run `number` of an arm, for train.py. folder: of the seed, with warm-up, buckets and CLIP."""
    runs, model = arms(world.steps["stage1"], world.steps["stage2"])[arm], f"{folder}/sft/model"
    stage, buckets, steps, flags = runs[number]
    if number:
        model = f"{folder}/{arm}/{train.FOLDERS[runs[number - 1][0]]}/model"
    files = [f"{folder}/sample/{name}.jsonl" for name in buckets.split(",") if name]
    return [str(word) for word in (
        "--stage", stage, "--out", f"{folder}/{arm}", "--seed", seed, "--max_steps", steps, *demo.TRAINING,
        *demo.REINFORCED, *world.flags, *RL, "--clip", f"{folder}/clip", "--model", model,
        "--data", ",".join(files) or f"{folder}/world/questions.jsonl",
        "--eval_data", f"{folder}/world/evaluation.jsonl", *flags)]


# --- one task: the warm-up of a seed, or an arm ---------------------------------------------------------------------
def measure(folder: str, seed: int, model: str, out: str, world: demo.World, *flags) -> dict[str, float]:
    """Figures of a model over the seed's evaluation questions. "detail": answers to the questions about what objects
    are. "agreement": how often an answer follows from the response's own description, right or wrong."""
    figures = demo.evaluate(folder, model, out, *world.flags, *EVALUATION, *flags)
    rows, detail, agreement = answers(out), [], []
    for i, item in enumerate(world.make_items(len(rows), seed, "evaluation")):
        responses = rows[f"evaluation_{i}"]
        if item.question.kind in DETAIL:
            detail.append(fmean(response["accuracy"] for response in responses))
        agreement.append(fmean(agrees(item.question, response["text"]) for response in responses))
    return {name: mean for name, (mean, _) in figures.items()} | dict(detail=fmean(detail), agreement=fmean(agreement))


def answers(out: str) -> dict[str, list[dict]]:
    """qid -> the graded responses that eval.py has written."""
    return {row["qid"]: row["responses"] for row in data.read_json(f"{out}/responses.jsonl").values()}


def agrees(question: demo.Question, text: str) -> bool:
    """Whether a response's answer is the right one for the objects that it describes."""
    sections = data.parse(text)
    pairs = [tuple(part.split()) for part in (sections.description or "").strip(" .").split(", ")]
    if any(len(pair) != 2 or pair[1] not in demo.SHAPES for pair in pairs):
        return False
    return sections.answer == str(solve(question, tuple(pairs))[1])


def greedy(folder: str, runs: list[str], first: list[float]) -> list[list[float]]:
    """[step, answers right, key words] of the held-out questions during training, from `first` at step 0 on."""
    points, done = [[0, *first]], 0
    for run in runs:
        rows = list(data.read_json(f"{folder}/{run}/metrics.jsonl").values())
        points += [[done + i, row["eval/accuracy"], row.get("eval/keyword")] for i, row in enumerate(rows, 1)
                   if "eval/accuracy" in row]
        done += len(rows)
    return points


def warm_up(folder: str, seed: int, world: demo.World) -> dict:
    """The seed's world, base model, CLIP, warm-up and buckets; what is there from an earlier try is kept."""
    made = {"world and clip": "clip/open_clip_model.safetensors", "base/sft": "base/sft/model", "sft": "sft/model",
            "sample": "sample/easy.jsonl"}
    world = world._replace(sizes=world.sizes | dict(evaluation=QUESTIONS))
    phases = demo.phases(folder, seed, world, "qwen2_5_vl")
    for name, path in made.items():
        if not os.path.exists(f"{folder}/{path}"):
            phases[name]()
    sizes = {name: len(data.read_json(f"{folder}/sample/{name}.jsonl")) for name in ("easy", "medium", "hard")}
    figures = measure(folder, seed, f"{folder}/sft/model", f"{folder}/eval/warmup", world)
    measure(folder, seed, f"{folder}/sft/model", f"{folder}/eval/greedy", world, "--temperature", 0, "--group_size", 1)
    rows = answers(f"{folder}/eval/greedy")
    asked = sorted(rows, key=lambda qid: data.seed_of("held out", qid))[:HELD_OUT]  # those that training asks
    start = [fmean(rows[qid][0][part] for qid in asked) for part in ("accuracy", "keyword")]
    return dict(figures=figures, start=start, buckets=sizes)


def train_arm(folder: str, seed: int, world: demo.World, arm: str) -> dict:
    """Train and evaluate an arm; a run that is complete is not run again."""
    runs = arms(world.steps["stage1"], world.steps["stage2"])[arm]
    folders = [f"{arm}/{train.FOLDERS[run[0]]}" for run in runs]
    for number, name in enumerate(folders):
        if not os.path.exists(f"{folder}/{name}/model"):
            demo.call(train, *argv_of(folder, arm, number, seed, world))
    figures = measure(folder, seed, f"{folder}/{folders[-1]}/model", f"{folder}/eval/{arm}", world)
    start = data.read_json(f"{folder}/warmup.json")["start"]
    return dict(figures=figures, curve=greedy(folder, folders, start))


def do(out: str, world_name: str, seed: int, name: str) -> int:
    """Do one task and write out/seedS/NAME.json."""
    world, folder, began = WORLDS[world_name], f"{out}/seed{seed}", time.process_time()
    demo.start_processes()
    os.makedirs(folder, exist_ok=True)
    result = warm_up(folder, seed, world) if name == "warmup" else train_arm(folder, seed, world, name)
    write_text(f"{folder}/{name}.json", json.dumps(result | dict(cpu_seconds=time.process_time() - began), indent=1))
    return 0


# --- all tasks ------------------------------------------------------------------------------------------------------
def tasks(only: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """(seed, name) in the order in which they are done: the main arms on three seeds, the others there, the main arms
    on the rest, then those of LAST. The length part is 1 for every response here, so without it little differs."""
    others = [arm for arm in arms(1, 1) if arm not in (*MAIN, *LAST)]
    listed = [(seed, arm) for seed in SEEDS[:3] for arm in MAIN] + [(seed, arm) for arm in others for seed in SEEDS[:3]]
    listed += [(seed, arm) for seed in SEEDS[3:] for arm in MAIN] + [(seed, arm) for arm in LAST for seed in SEEDS[:3]]
    listed = [task for task in listed if not only or task[1] in only]
    ordered = []
    for seed, arm in listed:
        ordered += [] if (seed, "warmup") in ordered else [(seed, "warmup")]
        ordered.append((seed, arm))
    return ordered


def path_of(out: str, task: tuple[int, str]) -> str:
    return f"{out}/seed{task[0]}/{task[1]}.json"


def next_task(todo: list[tuple[int, str]], out: str) -> tuple[int, str] | None:
    """The first task whose warm-up is complete."""
    ready = (task for task in todo if task[1] == "warmup" or os.path.exists(path_of(out, (task[0], "warmup"))))
    return next(ready, None)


def run(out: str, world: str, only: str, error) -> int:
    """Do what is left, two tasks at a time in processes of one thread each; then write and print the table. Returns 1
    if a task has failed, whose log is beside its result; the others are done all the same."""
    chosen = tuple(filter(None, only.split(",")))
    unknown = sorted(set(chosen) - set(arms(1, 1)))
    if unknown:
        error(f"--only {unknown[0]}: there is no such arm; give some of {', '.join(arms(1, 1))}")
    out = os.path.abspath(out)
    todo = [task for task in tasks(chosen) if not os.path.exists(path_of(out, task))]
    minutes = sum(MINUTES["warmup" if name == "warmup" else "arm"] for _, name in todo)
    print(f"{len(todo)} tasks to do: about {minutes / 2:.0f} minutes on two quiet cores; results: {out}/seed*/*.json",
          flush=True)
    running, failed = {}, []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # by way of `finally`
    try:
        while todo or running:
            while len(running) < 2 and (task := next_task(todo, out)):
                todo.remove(task)
                running[task] = start_task(out, world, *task)
            time.sleep(1)
            for task in [task for task, process in running.items() if process.poll() is not None]:
                good, now = running.pop(task).returncode == 0, time.strftime("%H:%M:%S")
                print(f"{now} seed {task[0]} {task[1]} {'done' if good else 'failed'}", flush=True)
                if not good:
                    failed.append(task)
                    todo = [other for other in todo if task[1] != "warmup" or other[0] != task[0]]
    finally:  # told to stop: what runs ends as well, and is done again next time
        for process in running.values():
            process.terminate()
    print(show(out))
    return 1 if failed else 0


def start_task(out: str, world: str, seed: int, name: str) -> subprocess.Popen:
    """A process of its own, with one thread, whose log is out/seedS/NAME.txt. It is a session of its own as well, since
    Linux divides a busy machine among sessions first."""
    os.makedirs(f"{out}/seed{seed}", exist_ok=True)
    command = [sys.executable, "-m", "variants.ablation", out, "--task", world, str(seed), name]
    with open(f"{out}/seed{seed}/{name}.txt", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
                                start_new_session=True)


# --- table and figure -----------------------------------------------------------------------------------------------
FIGURES = ("accuracy", "detail", "caption_exact", "keyword", "clip", "agreement")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a 95 % interval of so many seeds
AT = (0, 8, 20, 48)  # steps at which the curves are told as numbers
SHOWN = {"both": "#2f6fde", "stage1": "#d9822b", "stage2": "#2b9a66", "mixed": "#b6459d"}


def results(out: str) -> dict[str, dict[int, dict]]:
    """name -> seed -> what its file holds, of all complete tasks."""
    return {name: {seed: data.read_json(path_of(out, (seed, name))) for seed in SEEDS
                   if os.path.exists(path_of(out, (seed, name)))} for name in ("warmup", *arms(1, 1))}


def paired(ones: dict[int, float], others: dict[int, float]) -> tuple[float, float, int]:
    """Mean difference over the seeds that both have, half width of its 95 % interval (t), and how many seeds."""
    differences = [ones[seed] - others[seed] for seed in ones if seed in others]
    n = len(differences)
    half = T_95[n] * stdev(differences) / n**0.5 if n > 1 else float("inf")
    return fmean(differences) if n else float("nan"), half, n


def column(found: dict[int, dict], figure: str) -> dict[int, float]:
    return {seed: result["figures"][figure] for seed, result in found.items()}


def tables(found: dict[str, dict[int, dict]]) -> str:
    """Three tables in markdown: means over seeds, both stages minus each other arm seed by seed, and the curves."""
    lines = [f"| arm | seeds | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 2) + "|"]
    for name, seeds in found.items():
        if seeds:
            means = [fmean(column(seeds, figure).values()) for figure in FIGURES]
            lines.append(f"| {name} | {len(seeds)} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    lines += ["", f"| both minus | seeds | {' | '.join(FIGURES)} |", "|---" * (len(FIGURES) + 2) + "|"]
    for name, seeds in found.items():
        if name not in ("warmup", "both") and set(seeds) & set(found["both"]):
            gaps = [paired(column(found["both"], figure), column(seeds, figure)) for figure in FIGURES]
            lines.append(f"| {name} | {gaps[0][2]} | " + " | ".join(
                f"{mean:+.3f} ±{half:.3f}" for mean, half, _ in gaps) + " |")
    lines += ["", "| arm | seeds | " + " | ".join(f"{what}, step {step}" for what in ("answers", "key words")
                                                  for step in AT) + " |", "|---" * (2 + 2 * len(AT)) + "|"]
    for name, seeds in found.items():
        if name != "warmup" and seeds:
            curves = [{step: values for step, *values in result["curve"]} for result in seeds.values()]
            cells = [[curve.get(step, (None, None))[k] for curve in curves] for k in (0, 1) for step in AT]
            lines.append(f"| {name} | {len(seeds)} | " + " | ".join(  # key words without a weight are not counted
                "-" if None in cell else f"{fmean(cell):.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def picture(found: dict[str, dict[int, dict]]) -> str:
    """An SVG of the curves: greedy answers and key words of the held-out questions, the mean over the seeds that have
    all of the main arms, and each of them faint."""
    seeds = set.intersection(*(set(found[arm]) for arm in SHOWN))
    parts = []
    for k, title in enumerate(("answers right, greedy", "key words in the description, greedy"), 1):
        left, top, width, height = 46 + 320 * (k - 1), 40, 260, 170
        curves = {arm: {seed: [(point[0], point[k]) for point in found[arm][seed]["curve"]] for seed in seeds}
                  for arm in SHOWN}
        values = [y for runs in curves.values() for points in runs.values() for _, y in points]
        low, high = min(values, default=0), max(values, default=1)
        last = max((x for runs in curves.values() for points in runs.values() for x, _ in points), default=1)

        def line(points: list[tuple[int, float]], style: str) -> str:
            places = " ".join(f"{left + width * x / last:.1f},{top + height * (high - y) / (high - low):.1f}"
                              for x, y in points)
            return f'<polyline points="{places}" fill="none" {style}/>'

        parts.append(f'<text x="{left}" y="14" font-weight="bold">{title}</text>'
                     f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>')
        for i, (arm, runs) in enumerate(curves.items()):
            parts += [line(points, f'stroke="{SHOWN[arm]}" opacity=".2"') for points in runs.values()]
            mean = [(at[0][0], fmean(y for _, y in at)) for at in zip(*runs.values())]
            parts.append(line(mean, f'stroke="{SHOWN[arm]}" stroke-width="2"')
                         + f'<text x="{left + 62 * i}" y="30" fill="{SHOWN[arm]}">{arm}</text>')
        parts += [f'<text x="{left - 5}" y="{y}" text-anchor="end">{value:.2f}</text>'
                  for y, value in ((top + 8, high), (top + height, low))]
        parts += [f'<text x="{left + width * x / last:.0f}" y="{top + height + 15}" text-anchor="middle">{x}</text>'
                  for x in (0, 8, 20, last)]
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 235" font-family="sans-serif" font-size="11">'
            f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n')


def show(out: str) -> str:
    """Write OUT/table.md and OUT/curves.svg from what is complete; returns the table."""
    found = results(out)
    write_text(f"{out}/table.md", (text := tables(found)) + "\n")
    write_text(f"{out}/curves.svg", picture(found))
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the folder of all results")
    parser.add_argument("--task", nargs=3, metavar=("WORLD", "SEED", "NAME"), help="do this one")
    args = parser.parse_args(argv)
    if args.task:
        return do(args.out, args.task[0], int(args.task[1]), args.task[2])
    print(show(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
