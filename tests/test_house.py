"""The house rules: which file imports which, what importing does, how long things are, what a step walks through."""
import ast
import dataclasses
import json
import os
import subprocess
import sys
from glob import glob
from graphlib import CycleError, TopologicalSorter

import pytest

import demo
import eval as evaluation
import train
from plumbing.flags import comments_of
from ranks import ROOT
from test_train import questions, stage_1

__all__ = ["questions"]  # a fixture: rows of stage 1
pytestmark = pytest.mark.fast

BELOW = {"data", "kernels"}
METHOD = BELOW | {"plumbing", "engine", "grading", "rewards"}
MAY_IMPORT = {  # a room or a root file: what it may import of ours, beside files of its own room
    # check.py has an entry of its own: data.py's last lines call this program, which does what a stage would at start.
    # So do those of rewards.py with the playground, and demo.py with the walk and with the ablation.
    "data": {"plumbing"}, "plumbing/check.py": METHOD | {"train"}, "kernels": set(),
    "plumbing/playground.py": METHOD | {"train"}, "plumbing/walk.py": METHOD | {"train", "demo"},
    "plumbing": BELOW, "grading": BELOW, "engine": BELOW | {"plumbing"},
    "benchmarks": {"data", "grading"}, "rewards": {"data", "engine", "grading", "plumbing"}, "train": METHOD,
    "eval": METHOD | {"benchmarks", "train"}, "demo": METHOD | {"benchmarks", "train", "eval", "view", "variants"},
    "view": {"plumbing"}, "variants": set(), "variants/ablation.py": METHOD | {"train", "demo"},
    "speed": METHOD | {"benchmarks", "train", "eval", "demo"}}
# Two files that need each other: the second imports the first inside a function, when it is called.
PAIRS = {("plumbing/check.py", "data.py"), ("plumbing/playground.py", "rewards.py"),
         ("plumbing/walk.py", "demo.py"), ("variants/ablation.py", "demo.py"),
         ("grading/algebra.py", "grading/equal.py"), ("kernels/logprob.py", "kernels/ops.py")}
LONG_FILES = {"train.py": 560}
LONG_FUNCTIONS = {("train.py", "train")}
GROUPS = {"LoRA", "model", "data", "sampling", "rewards", "GRPO", "optimiser", "memory", "run"}

FILES = sorted(path for path in glob("*.py", root_dir=ROOT) + glob("*/*.py", root_dir=ROOT)
               if not path.startswith("tests"))


def tree_of(path: str) -> ast.Module:
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return ast.parse(file.read())


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def file_of(module: str) -> str | None:
    """The file of this repository that a module's name stands for, if there is one."""
    path = module.replace(".", "/") + ".py"
    return path if path in FILES else None


def imports_of(path: str) -> set[str]:
    """The files of ours that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {file_of(name) for name in names if file_of(name)}


@pytest.mark.parametrize("path", FILES)
def test_imports_run_one_way(path):
    room = room_of(path)
    allowed = MAY_IMPORT.get(path, MAY_IMPORT[room])
    assert {room_of(other) for other in imports_of(path)} <= allowed | ({room} if "/" in path else set())


def test_data_takes_nothing_of_ours_but_the_reading_of_files():
    """And the file that reads them takes nothing."""
    assert imports_of("data.py") == {"plumbing/files.py", "plumbing/check.py"}
    assert not imports_of("plumbing/files.py")


def test_no_files_import_each_other_in_a_circle():
    graph = {path: {other for other in imports_of(path) if (other, path) not in PAIRS} for path in FILES}
    assert all(first in imports_of(second) and second in imports_of(first) for first, second in PAIRS)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_root_shows_the_method_in_five_files_and_the_page_of_a_run():
    assert {path for path in FILES if "/" not in path} == {"train.py", "rewards.py", "data.py", "eval.py", "demo.py",
                                                           "view.py"}


def test_no_packages_init_has_code():
    """A docstring is no code."""
    for path in FILES:
        if path.endswith("__init__.py"):
            assert all(isinstance(node, ast.Expr) for node in tree_of(path).body), path


LIGHT = """
import json, sys
import torch, transformers
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
others = set(sys.modules)
import data, rewards, train, eval
found = {"group": torch.distributed.is_initialized(), "cuda": torch.cuda.is_initialized()}
for argv in (["--stage", "1", "--tempratur", "1"], ["--help"]):
    try:
        found[argv[-1]] = train.main(argv)
    except SystemExit as end:
        found[argv[-1]] = end.code
print(json.dumps(found | {"modules": sorted(set(sys.modules) - others)}))
"""


def test_importing_has_no_effect_and_help_needs_no_model_code():
    """What is slow or not everywhere is imported where it is used, so a mistyped flag is answered at once."""
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["group"], found["cuda"], found["1"], found["--help"]) == (False, False, 2, 0)
    assert "did you mean --temperature" in done.stderr and "usage:" in done.stdout
    heavy = ("open_clip", "datasets", "torchvision", "triton", "transformers.modeling_utils", "sympy", "math_verify")
    assert not [name for name in found["modules"] if name in heavy]


@pytest.mark.parametrize("kind, groups", [(train.Config, GROUPS), (evaluation.EvalConfig, GROUPS | {"evaluation"})])
def test_every_flag_has_a_help_text_and_a_group(kind, groups):
    comments = comments_of(kind)
    assert {field.name for field in dataclasses.fields(kind)} == set(comments)
    for name, (group, text) in comments.items():
        assert group in groups and text, name


def functions_of(node: ast.AST, depth: int = 1):
    """(name, its number of lines, how deep it is nested) of each function below a node."""
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef)
        if inside:
            yield child.name, child.end_lineno - child.lineno + 1, depth
        yield from functions_of(child, depth + inside)


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) not in ("kernels", "speed")])
def test_files_and_functions_are_short(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        assert len(file.readlines()) <= LONG_FILES.get(path, 500)
    long = {(path, name) for name, lines, _ in functions_of(tree_of(path)) if lines > 45}
    assert long <= LONG_FUNCTIONS


def test_train_is_flat_and_leans_on_little():
    tree = tree_of("train.py")
    assert max(depth for _, _, depth in functions_of(tree)) <= 2
    ours = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
            and file_of(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)]
    assert sum(node.end_lineno - node.lineno + 1 for node in ours) <= 25


def test_a_step_of_rl_enters_at_most_nine_files(tiny_folder, questions, tmp_path, monkeypatch):
    """With a CLIP, which a folder of the demo holds."""
    entered, rl_step = set(), train.rl_step

    def traced(*args):
        sys.setprofile(lambda frame, event, _: entered.add(frame.f_code.co_filename) if event == "call" else None)
        try:
            return rl_step(*args)
        finally:
            sys.setprofile(None)

    clip = demo.train_clip(demo.make_items(2, 0, "captions"), 0, 1, demo.World(), batch=2)
    demo.save_clip(clip, str(tmp_path / "clip"), demo.World())
    monkeypatch.setattr(train, "rl_step", traced)
    flags = ["--clip", str(tmp_path / "clip"), "--clip_weight", "0.5", "--eval_every", "0", "--eval_data", "",
             "--allow_text", "True"]
    assert train.main(stage_1(tiny_folder, questions, tmp_path, *flags)) == 0
    ours = {os.path.relpath(path, ROOT) for path in entered if path.startswith(ROOT)} & set(FILES)
    assert {"train.py", "rewards.py", "data.py", "engine/clip.py"} <= ours and len(ours) <= 9, sorted(ours)
