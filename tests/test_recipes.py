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

import eval as evaluation
import train
from benchmarks.registry import BENCHMARKS

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


def row(image: str) -> dict:
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "### The final answer is: 2"}]
    return {"id": 1, "messages": turns, "images": [image]}


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


def test_the_warm_up_list_is_both_sets_with_whole_paths_and_no_ids(complete):
    folder = complete[0]
    rows = json.loads((folder / "data/warmup.json").read_text())
    expected = [row(str(folder / "data" / path)) for path in ("mulberry/a.png", "pebr/sft/b.png")]
    assert rows == [{name: value for name, value in each.items() if name != "id"} for each in expected]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_that_is_not_found_ends_the_recipe_before_anything_is_trained(recipe, tmp_path):
    done = run_recipe(recipe, tmp_path, {"mulberry/mulberry_sft.json": [row("a.png")]})
    assert done.returncode == 2 and "set SOLUTIONS=FILE" in done.stderr
    assert "torchrun" not in (tmp_path / "calls").read_text()
