"""One page of a run: its curves, what the model wrote about which image, what each response earned, and what was wrong.

    python view.py runs/demo                      writes runs/demo/view.html; also while the run goes on, or cut off
    python view.py runs/eval/mathvista            an evaluation alone

It reads the files that a run leaves (metrics.jsonl, rollouts/, report.json, responses.jsonl) and needs neither model
nor network. The page holds everything it shows, so it can be sent to somebody. Torn lines and missing images are left
out, and a note on the page says so. plumbing/page.html is the page: it draws curves and cards from the JSON that is
written here.
"""
import argparse
import base64
import glob
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

from PIL import Image, ImageOps

from plumbing.doctor import Doctor

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "plumbing", "page.html")
SIDE = 256  # pixels of an embedded picture, at most
ORDER = {"sft": 0, "sample": 1, "1": 2, "2": 3}  # of the stages


@dataclass
class Page:
    """What the page will hold, and what could not be read for it."""
    images_left: int  # how many more pictures may be embedded
    pictures: dict[str, str] = field(default_factory=dict)  # path -> data URI
    notes: list[str] = field(default_factory=list)

    def note(self, text: str):
        if text not in self.notes:
            self.notes.append(text)

    def picture(self, path: str) -> str | None:
        """The path, once its picture is embedded; None where it is gone, broken, or one too many."""
        if path in self.pictures:
            return path
        if not self.images_left:
            self.note("not all images are embedded: --images takes more")
            return None
        try:
            with Image.open(path) as opened:
                small = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            self.note("some images are gone or cannot be read")
            return None
        small.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=80)
        self.pictures[path] = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        self.images_left -= 1
        return path


# ------------------------------------------------------------------------------------ files of a run

def read_object(path: str) -> dict:
    with open(path, encoding="utf-8", errors="replace") as file:
        return json.load(file)


def read_lines(path: str, page: Page) -> Iterator[dict]:
    """The rows of a jsonl file; a torn line is left out, with a note."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                page.note(f"{path} line {number} is torn")


def find(run: str, name: str) -> list[str]:
    """Folders in a run that hold a file `name`, up to three below it."""
    patterns = (os.path.join(glob.escape(run), *["*"] * depth, name) for depth in range(4))
    return sorted(os.path.dirname(path) for pattern in patterns for path in glob.glob(pattern))


def training_stages(run: str, page: Page) -> list[dict]:
    """[{name, folder, stage, config, steps, metrics: {name: values}}], in the order in which a run takes them."""
    stages = []
    for folder in find(run, "metrics.jsonl"):
        by_step = {row["step"]: row for row in read_lines(os.path.join(folder, "metrics.jsonl"), page)
                   if isinstance(row.get("step"), int)}  # of a step that was taken twice, the later one
        rows = [by_step[step] for step in sorted(by_step)]
        names = {name: None for row in rows for name, value in row.items()
                 if isinstance(value, (int, float)) and "/" in name}
        config = read_object(os.path.join(folder, "config.json"))
        doctor = Doctor(SimpleNamespace(**config)) if {"stage", "lr", "kl_coef"} <= set(config) else None
        lines = [line for row in rows for line in doctor.look(row)] if doctor else []
        stages.append(dict(name=os.path.relpath(folder, run), folder=folder, stage=str(config.get("stage")),
                           config=config, steps=sorted(by_step), doctor=lines,
                           metrics={name: [row.get(name) for row in rows] for name in names}))
    return sorted(stages, key=lambda stage: (ORDER.get(stage["stage"], 4), stage["name"]))


def buckets(run: str, page: Page) -> dict[str, int]:
    """How many questions stage sample found easy, medium and hard."""
    sizes = {}
    for folder in find(run, "easy.jsonl")[:1]:
        for name in ("easy", "medium", "hard"):
            path = os.path.join(folder, f"{name}.jsonl")
            sizes[name] = sum(1 for _ in read_lines(path, page)) if os.path.exists(path) else 0
    return sizes


def group_of(row: dict, page: Page, **place) -> dict:
    """A row of a rollout, or of an evaluation's responses, as the page shows it."""
    pictures = [page.picture(path) for path in row.get("images", []) if isinstance(path, str)]
    return place | dict(qid=str(row.get("qid")), question=str(row.get("question")), answer=row.get("answer"),
                        key_words=row.get("key_words", []), images=[path for path in pictures if path],
                        responses=row.get("responses", []))


def rollouts(stage: dict, count: int, page: Page) -> list[dict]:
    """About `count` groups of a stage: the same questions at every step that asks them, to be compared."""
    rows = [(step, row) for path in sorted(glob.glob(os.path.join(glob.escape(stage["folder"]), "rollouts", "*.jsonl")))
            for step in [int("".join(filter(str.isdigit, os.path.basename(path))) or 0)]
            for row in read_lines(path, page)]
    if len(rows) > count:  # whole questions, always the same ones: all that was said to them, from step to step
        rows.sort(key=lambda pair: hashlib.sha1(str(pair[1].get("qid")).encode()).digest())
        rows = sorted(rows[:count], key=lambda pair: pair[0])
        page.note(f"{stage['name']}: {count} of its groups are shown; --groups takes more")
    return [group_of(row, page, stage=stage["name"], step=step) for step, row in rows]


def evaluations(run: str, count: int, page: Page) -> list[dict]:
    """[{name, report, items}] of every evaluation: of a file of questions or of a benchmark, wrong answers first."""
    found = []
    for folder in find(run, "report.json"):
        report, path = read_object(os.path.join(folder, "report.json")), os.path.join(folder, "responses.jsonl")
        items = []
        for row in read_lines(path, page) if os.path.exists(path) else []:
            if "pid" in row:  # of a benchmark: one response, and what was made of it
                shown = {name: row.get(name) for name in ("tokens", "finished", "rule", "prediction")}
                shown |= dict(text=row["response"], extracted=row["extraction"], accuracy=float(row["strict"]))
                row |= dict(qid=row["pid"], answer=row["gold"], responses=[shown])
            items.append(row)
        items.sort(key=lambda row: sum(response.get("accuracy") or 0 for response in row.get("responses", [])))
        name = os.path.relpath(folder, os.path.dirname(os.path.abspath(run)) if folder == run else run)
        if len(items) > count:
            page.note(f"{name}: {count} of {len(items)} questions are shown, wrong answers first; --items takes more")
        found.append(dict(name=name, figures=report.get("figures", {}), questions=report.get("questions"),
                          items=[group_of(row, page, stage=name, step=0) for row in items[:count]]))
    return found


# --------------------------------------------------------------------------------------------- page


def build(run: str, images: int, groups: int, items: int) -> dict:
    """All that the page shows, as one object. FileNotFoundError: nothing in this folder is of a run."""
    if not os.path.isdir(run):
        raise FileNotFoundError(f"{run} is no folder: give the --out of a run, or of an evaluation")
    page = Page(images)
    stages, sizes = training_stages(run, page), buckets(run, page)
    share = groups // max(1, sum(stage["stage"] in ("1", "2") for stage in stages))
    shown = [group for stage in stages for group in rollouts(stage, share, page)]
    found = evaluations(run, items, page)
    if not (stages or found or sizes):
        raise FileNotFoundError(f"{run} holds no metrics.jsonl, report.json or easy.jsonl: give the --out of a run")
    about = [{name: value for name, value in stage.items() if name != "folder"} for stage in stages]
    return dict(run=run, stages=about, buckets=sizes, rollouts=shown, evaluations=found, notes=page.notes,
                pictures=page.pictures)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --out of train.py, demo.py or eval.py")
    parser.add_argument("--out", default="", help="the page (default: view.html in the run's folder)")
    parser.add_argument("--images", type=int, default=200, help="embed at most so many pictures (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=250, help="rollout groups on the page (default: %(default)s)")
    parser.add_argument("--items", type=int, default=1000, help="questions of an evaluation (default: %(default)s)")
    args = parser.parse_args(argv)
    path = args.out or os.path.join(args.run, "view.html")
    try:
        content = build(args.run, args.images, args.groups, args.items)
        with open(PAGE, encoding="utf-8") as file:
            page = file.read()
        # In JSON < can stand as an escape, so no text can end the script that holds it.
        text = json.dumps(content, ensure_ascii=True).replace("<", "\\u003c")
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(page.replace("{{content}}", text))
        print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB; open it in a browser")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
