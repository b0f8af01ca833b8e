"""One page of a run: its curves, what the model wrote about which image, what each response earned, and what was wrong.

    python view.py runs/demo                      writes runs/demo/view.html; also while training goes on, or cut off
    python view.py runs/eval/mathvista            an evaluation alone

It reads the files that a run leaves and needs neither model nor network. The page holds everything it shows, so it can
be sent to somebody. plumbing/page.html is the page: it draws curves and cards from the JSON that is written here.
"""
import argparse
import base64
import glob
import hashlib
import io
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from PIL import Image, ImageOps

from plumbing.doctor import Doctor
from plumbing.files import read_json

PAGE = Path(__file__).parent / "plumbing" / "page.html"
SIDE = 256  # pixels of an embedded picture, at most
ITEMS = 1000  # questions of an evaluation that are shown, at most


@dataclass
class Page:
    """What the page will hold, and what could not be read for it."""
    most: int  # pictures may be embedded
    pictures: dict[str, str] = field(default_factory=dict)  # path -> data URI
    notes: set[str] = field(default_factory=set)

    def picture(self, path: str) -> str | None:
        """The path, once its picture is embedded; None where it is gone, broken, or one too many."""
        if path in self.pictures:
            return path
        if len(self.pictures) >= self.most:
            self.notes.add("not all images are embedded: --images takes more")
            return None
        try:
            with Image.open(path) as opened:
                small = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            self.notes.add("some images are gone or cannot be read")
            return None
        small.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=80)
        self.pictures[path] = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        return path


# ------------------------------------------------------------------------------------ files of a run

def read_lines(path: str) -> list[dict]:
    """The rows of a jsonl file. A last line without an end is just being written, or was cut off."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def find(run: str, name: str) -> list[str]:
    """The folders in a run that hold a file of this name."""
    found = glob.glob(os.path.join(glob.escape(run), "**", name), recursive=True)
    return sorted(folder for folder in map(os.path.dirname, found) if not folder.endswith(".writing"))


def training_stages(run: str) -> list[dict]:
    """[{name, folder, stage, config, steps, doctor, metrics: {name: values}}], in the order of the stages."""
    stages = []
    for folder in find(run, "metrics.jsonl"):
        config = read_json(os.path.join(folder, "config.json"))
        rows = read_lines(os.path.join(folder, "metrics.jsonl"))
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        doctor = Doctor(SimpleNamespace(**config))
        for row in rows:
            doctor.look(row)
        stages.append(dict(name=os.path.relpath(folder, run), folder=folder, stage=config["stage"], config=config,
                           steps=[row["step"] for row in rows], doctor=list(doctor.said.values()),
                           metrics={name: [row.get(name) for row in rows] for name in names}))
    return sorted(stages, key=lambda stage: (stage["stage"] != "sft", stage["stage"], stage["name"]))


def group_of(row: dict, page: Page, stage: str, step: int) -> dict:
    """A row of a rollout, or of an evaluation's responses, as the page shows it."""
    return row | dict(stage=stage, step=step, images=list(filter(None, map(page.picture, row["images"] or []))))


def rollouts(stage: dict, count: int, page: Page) -> list[dict]:
    """About `count` groups of a stage: the same questions at every step that asks them, to be compared."""
    paths = sorted(glob.glob(os.path.join(glob.escape(stage["folder"]), "rollouts", "step_*.jsonl")))
    rows = [(int(path.rpartition("_")[2].removesuffix(".jsonl")), row) for path in paths for row in read_lines(path)]
    if len(rows) > count:  # whole questions, always the same ones: all that was said to them, from step to step
        rows.sort(key=lambda pair: hashlib.sha1(pair[1]["qid"].encode()).digest())
        rows = sorted(rows[:count], key=lambda pair: pair[0])
        page.notes.add(f"{stage['name']}: {count} of its groups are shown; --groups takes more")
    return [group_of(row, page, stage["name"], step) for step, row in rows]


def evaluations(run: str, page: Page) -> list[dict]:
    """[{name, figures, questions, items}] of every evaluation of a file of questions or of a benchmark: wrong answers
    first."""
    found = []
    for folder in find(run, "report.json"):
        report, items = read_json(os.path.join(folder, "report.json")), []
        for row in read_lines(os.path.join(folder, "responses.jsonl")):
            if "pid" in row:  # of a benchmark: one response, and what was made of it
                shown = {name: row.get(name) for name in ("tokens", "finished", "rule", "prediction")}
                shown |= dict(text=row["response"], extracted=row["extraction"], accuracy=float(row["strict"]))
                row = dict(qid=row["pid"], question=row["question"], answer=row["gold"], images=row.get("images", []),
                           responses=[shown])
            items.append(row)
        items.sort(key=lambda row: sum(response["accuracy"] for response in row["responses"]))
        name = os.path.relpath(folder, os.path.dirname(os.path.abspath(run)) if folder == run else run)
        if len(items) > ITEMS:
            page.notes.add(f"{name}: {ITEMS} of {len(items)} questions are shown, wrong answers first")
        found.append(dict(name=name, figures=report["figures"], questions=report["questions"],
                          items=[group_of(row, page, name, 0) for row in items[:ITEMS]]))
    return found


# --------------------------------------------------------------------------------------------- page


def build(run: str, images: int, groups: int) -> dict:
    """All that the page shows, as one object. FileNotFoundError: nothing in this folder is of a run."""
    if not os.path.isdir(run):
        raise FileNotFoundError(f"{run} is no folder: give the --out of a run, or of an evaluation")
    page = Page(images)
    stages = training_stages(run)
    shown = [group for stage in stages for group in rollouts(stage, groups, page)]
    found = evaluations(run, page)
    sizes = {name: len(read_lines(os.path.join(folder, f"{name}.jsonl")))
             for folder in find(run, "easy.jsonl")[:1] for name in ("easy", "medium", "hard")}
    if not (stages or found or sizes):
        raise FileNotFoundError(f"{run} holds no metrics.jsonl, report.json or easy.jsonl: give the --out of a run")
    return dict(run=run, stages=stages, buckets=sizes, rollouts=shown, evaluations=found, notes=sorted(page.notes),
                pictures=page.pictures)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --out of train.py, demo.py or eval.py")
    parser.add_argument("--out", default="", help="the page (default: view.html in the run's folder)")
    parser.add_argument("--images", type=int, default=200, help="embed at most so many pictures (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=125, help="rollout groups of each stage (default: %(default)s)")
    args = parser.parse_args(argv)
    path = args.out or os.path.join(args.run, "view.html")
    try:
        content = build(args.run, args.images, args.groups)
        # In JSON < can stand as an escape, so no text can end the script that holds it.
        text = json.dumps(content, ensure_ascii=True).replace("<", "\\u003c")
        Path(path).write_text(PAGE.read_text(encoding="utf-8").replace("{{content}}", text), encoding="utf-8")
        print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB; open it in a browser")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        other = isinstance(error, (KeyError, AttributeError, TypeError))
        reason = f"{args.run} is of another version, or not of a run ({error!r})" if other else error
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
