"""The recipes say what train.py and eval.py understand: each runs in a copy, with programs that note their call."""
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from glob import glob

import pytest

import data
import eval as evaluation
import train
from benchmarks.registry import BENCHMARKS
from conftest import picture
from test_train import SMALL

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECIPES = sorted(glob("recipes/*.sh", root_dir=ROOT))
pytestmark = pytest.mark.fast

# Every program notes its call. `hf` also makes what a download would; `python -` runs the recipe's own lines.
STUB = f"""#!/usr/bin/env bash
set -e
name=$(basename "$0")
if [ "$name" = python ] && [ "$1" = - ]; then exec {shlex.quote(sys.executable)} "$@"; fi
printf '%q ' "$name" "$@" >> calls; echo >> calls
if [ "$name" = hf ]; then mkdir -p "${{@: -1}}"; cp -r downloads/. data/ 2>/dev/null || true; fi
"""


def row(image: str, number: int = 1) -> dict:
    turns = [{"role": "user", "content": f"<image>How many {number}?"},
             {"role": "assistant", "content": "### The final answer is: 2"}]
    return {"id": number, "messages": turns, "images": [image]}


def run_recipe(recipe: str, folder, downloads: dict[str, list]) -> subprocess.CompletedProcess:
    """Run a copy of a recipe in a folder where the downloads bring these json files; its calls are in folder/calls."""
    for place in ("recipes", ".venv/bin", "downloads"):
        os.makedirs(folder / place, exist_ok=True)
    shutil.copy(os.path.join(ROOT, recipe), folder / "recipes")
    for name in ("hf", "python", "torchrun"):
        (folder / ".venv/bin" / name).write_text(STUB)
        (folder / ".venv/bin" / name).chmod(0o755)
    for path, rows in downloads.items():
        os.makedirs(os.path.dirname(folder / "downloads" / path), exist_ok=True)
        (folder / "downloads" / path).write_text(json.dumps(rows))
    return subprocess.run(["bash", folder / recipe], capture_output=True, text=True, cwd=folder, timeout=60)


@pytest.fixture
def complete(tmp_path):
    """A folder in which every recipe has run to its end. Returns the folder and the calls, each a list of words."""
    downloads = {"mulberry/mulberry_sft.json": [row("a.png")], "pebr/sft/pebr_sft.json": [row("b.png")],
                 "pebr/grpo/pebr_grpo_dataset.json": []}
    for recipe in RECIPES:
        done = run_recipe(recipe, tmp_path, downloads)
        assert done.returncode == 0, done.stderr
    return tmp_path, [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_valid_bash(recipe):
    subprocess.run(["bash", "-n", os.path.join(ROOT, recipe)], check=True)


def test_every_flag_of_a_recipe_exists(complete):
    fields = {"train.py": {field.name for field in dataclasses.fields(train.Config)},
              "eval.py": {field.name for field in dataclasses.fields(evaluation.EvalConfig)}}
    stages = []
    for words in complete[1]:
        program = next((word for word in words if word in fields), None)
        if program:
            argv = words[words.index(program) + 1:]
            assert {word.removeprefix("--") for word in argv if word.startswith("--")} <= fields[program], words
            stages += [argv[argv.index("--stage") + 1]] if program == "train.py" and "--plan" not in argv else ["eval"]
            assert program == "train.py" or argv[argv.index("--benchmark") + 1] in BENCHMARKS
    assert [stage for stage in stages if stage != "eval"] == list(train.STAGES)
    assert stages[-1] == "eval"


def test_the_warm_up_runs_as_written_on_two_repositories_with_images_of_their_own(tmp_path, tiny_folder, monkeypatch):
    """As the release has them: both count from 1, one names its images from its file, the other from its repository."""
    downloads = {"mulberry/mulberry_sft.json": [row(f"images/{i}.png", i) for i in range(1, 5)],
                 "pebr/sft/pebr_sft.json": [row(f"sft_images/{i}.png", i) for i in range(1, 4)],
                 "pebr/grpo/pebr_grpo_dataset.json": []}
    for path, rows in list(downloads.items())[:2]:
        repository = os.path.dirname(path).split("/")[0]
        for each in rows:
            os.makedirs(os.path.dirname(tmp_path / "downloads" / repository / each["images"][0]), exist_ok=True)
            picture(56, 56, each["id"]).save(tmp_path / "downloads" / repository / each["images"][0])
    assert run_recipe(RECIPES[0], tmp_path, downloads).returncode == 0
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    argv = next(words[words.index("--stage"):] for words in calls if "sft" in words and "torchrun" in words)
    assert argv[argv.index("--image_root") + 1] == "data/mulberry,data/pebr"
    monkeypatch.chdir(tmp_path)
    assert train.main([*argv, *SMALL, "--model", tiny_folder, "--questions_per_rollout", "7", "--questions_per_update",
                       "7", "--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
    samples = data.load_samples(argv[argv.index("--data") + 1], argv[argv.index("--image_root") + 1], log=str)
    assert [sample.qid for sample in samples] == ["1/1", "1/2", "1/3", "1/4", "2/1", "2/2", "2/3"]
    assert os.path.exists(tmp_path / "out" / "sft" / "model" / "model.safetensors")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_that_is_not_found_ends_the_recipe_before_anything_is_trained(recipe, tmp_path):
    done = run_recipe(recipe, tmp_path, {"mulberry/mulberry_sft.json": [row("a.png")]})
    assert done.returncode == 2 and "set SOLUTIONS=FILE" in done.stderr
    assert "torchrun" not in (tmp_path / "calls").read_text()
