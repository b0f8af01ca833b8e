"""The recipes say what train.py and eval.py understand: each runs in a copy, with programs that note their call."""
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from glob import glob

import datasets
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


def run_recipe(recipe: str, folder, downloads: dict[str, list], **env: str) -> subprocess.CompletedProcess:
    """Run a copy of a recipe in a folder where the downloads bring these json files; its calls are in folder/calls."""
    for place in (".venv/bin", "downloads"):
        os.makedirs(folder / place, exist_ok=True)
    shutil.copytree(os.path.join(ROOT, "recipes"), folder / "recipes", dirs_exist_ok=True)
    for name in ("hf", "python", "torchrun"):
        (folder / ".venv/bin" / name).write_text(STUB)
        (folder / ".venv/bin" / name).chmod(0o755)
    for path, rows in downloads.items():
        os.makedirs(os.path.dirname(folder / "downloads" / path), exist_ok=True)
        if path.endswith(".parquet"):
            datasets.Dataset.from_list(rows, GEOMETRY).to_parquet(str(folder / "downloads" / path))
        else:
            (folder / "downloads" / path).write_text(json.dumps(rows))
    return subprocess.run(["bash", folder / recipe], capture_output=True, text=True, cwd=folder, timeout=60,
                          env=os.environ | env)


def calls_in(folder) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


# hiyouga/geometry3k as its page describes it: pictures inside the rows, <image> in the problem.
GEOMETRY = datasets.Features(images=datasets.Sequence(datasets.Image()), problem=datasets.Value("string"),
                             answer=datasets.Value("string"))
TEXT = "<image>Find x. Round to the nearest tenth if necessary."
SETS = {"mulberry/mulberry_sft.json": [row("a.png")], "pebr/sft/pebr_sft.json": [row("b.png")],
        "pebr/grpo/pebr_grpo_dataset.json": [],
        "geometry3k/data/test-00000-of-00001.parquet": [dict(images=[picture(84, 56, 9)], problem=TEXT, answer="17")],
        "geometry3k/data/train-00000-of-00001.parquet": [
            dict(images=[picture(56 + 28 * (i % 2), 84, i)], problem=TEXT, answer=answer)
            for i, answer in enumerate(["3", "\\sqrt { 3 }", "7.5", "2 \\sqrt { 221 }"])]}


@pytest.fixture(params=RECIPES)
def complete(request, tmp_path):
    """A folder in which a recipe has run to its end. Returns the recipe and the calls, each a list of words."""
    done = run_recipe(request.param, tmp_path, SETS)
    assert done.returncode == 0, done.stderr
    return request.param, calls_in(tmp_path)


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
            assert "--benchmark" not in argv or argv[argv.index("--benchmark") + 1] in BENCHMARKS
    expected = ["sample", "2"] if "geometry3k" in complete[0] else list(train.STAGES)
    assert [stage for stage in stages if stage != "eval"] == expected
    assert stages[-1] == "eval"


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "geometry3k" not in recipe])
def test_the_warm_up_runs_as_written_on_two_repositories_with_images_of_their_own(tmp_path, tiny_folder, monkeypatch,
                                                                                  recipe):
    """As the release has them: both count from 1, one names its images from its file, the other from its repository."""
    downloads = {"mulberry/mulberry_sft.json": [row(f"images/{i}.png", i) for i in range(1, 5)],
                 "pebr/sft/pebr_sft.json": [row(f"sft_images/{i}.png", i) for i in range(1, 4)],
                 "pebr/grpo/pebr_grpo_dataset.json": []}
    for path, rows in list(downloads.items())[:2]:
        repository = os.path.dirname(path).split("/")[0]
        for each in rows:
            os.makedirs(os.path.dirname(tmp_path / "downloads" / repository / each["images"][0]), exist_ok=True)
            picture(56, 56, each["id"]).save(tmp_path / "downloads" / repository / each["images"][0])
    assert run_recipe(recipe, tmp_path, downloads).returncode == 0
    calls = calls_in(tmp_path)
    argv = next(words[words.index("--stage"):] for words in calls if "sft" in words and "torchrun" in words)
    assert argv[argv.index("--image_root") + 1] == "data/mulberry,data/pebr"
    monkeypatch.chdir(tmp_path)
    assert train.main([*argv, *SMALL, "--model", tiny_folder, "--questions_per_rollout", "7", "--questions_per_update",
                       "7", "--out", str(tmp_path / "out"), "--epochs", "1"]) == 0
    samples = data.load_samples(argv[argv.index("--data") + 1], argv[argv.index("--image_root") + 1])
    assert [sample.qid for sample in samples] == ["1/1", "1/2", "1/3", "1/4", "2/1", "2/2", "2/3"]
    assert os.path.exists(tmp_path / "out" / "sft" / "model" / "model.safetensors")


@pytest.mark.parametrize("flags", ["", "--recipe small --lr 1e-5"])
def test_geometry3k_runs_as_written_on_rows_in_their_real_format(tmp_path, tiny_folder, monkeypatch, flags):
    """Sampling and stage 2 with held-out accuracy. An untrained model is never right, so stage 2 takes hard.jsonl."""
    run_recipe("recipes/geometry3k_3b.sh", tmp_path, SETS, FLAGS=flags, GPUS="1")
    monkeypatch.chdir(tmp_path)
    samples = data.load_samples("data/geometry3k/data/train-00000-of-00001.parquet")
    assert [(s.question, s.answer, len(s.images)) for s in samples[:2]] == [(TEXT, "3", 1), (TEXT, "\\sqrt { 3 }", 1)]
    sample, second = (words[words.index("--stage"):] for words in calls_in(tmp_path)
                      if "torchrun" in words and "--stage" in words)
    small = [*SMALL, "--model", tiny_folder, "--group_size", "2", *(["--lora_rank", "4"] if flags else [])]
    assert train.main([*sample, *small]) == 0
    assert train.main([*second, *small, "--data", "runs/geometry3k/sample/hard.jsonl", "--questions_per_rollout", "4",
                       "--questions_per_update", "2", "--epochs", "1", "--eval_every", "1"]) == 0
    assert "eval/accuracy" in json.loads(open("runs/geometry3k/stage2/metrics.jsonl").readline())
    assert os.path.exists("runs/geometry3k/stage2/adapter") == bool(flags)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "geometry3k" not in recipe])
def test_a_file_that_is_not_found_ends_the_recipe_before_anything_is_trained(recipe, tmp_path):
    done = run_recipe(recipe, tmp_path, {"mulberry/mulberry_sft.json": [row("a.png")]})
    assert done.returncode == 2 and "set SOLUTIONS=FILE" in done.stderr
    assert "torchrun" not in (tmp_path / "calls").read_text()
