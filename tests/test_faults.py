"""Nothing is lost: runs on two processes that are killed at random points, full and forbidden disks, what no file calls.

Each interrupted command is given again until it is done, and what it then leaves is compared, bit for bit, with what an
undisturbed run leaves. Five interruptions by default; `pytest tests/test_faults.py --faults 50 -s` makes fifty, and
prints a table of them.
"""
import ast
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

import data
import eval as evaluation
import train
from plumbing import processes, run_folder
from ranks import ROOT, needs_fork_server, ranks
from test_eval import tiny_mathvista
from test_house import FILES, tree_of
from test_train import contents, questions, stage_1, weights

__all__ = ["questions", "tiny_mathvista"]  # fixtures
MAIN = {"train": train.main, "restart": train.main, "sample": train.main, "file": evaluation.main,
        "benchmark": evaluation.main}
SHORT = ["--max_response", "8", "--eval_data", "", "--eval_every", "0", "--questions_per_rollout", "4",
         "--questions_per_update", "2"]
# Whatever changes a file, and the work between: an interruption falls before or after one such call.
PLACES = {os: "rename replace fsync remove unlink rmdir mkdir", train: "update collect export save_checkpoint",
          data: "write_buckets", run_folder: "write_text kept", evaluation: "write_report"}


def interrupted(program: str, argv: list[str], folder: str, rank: int, moment: int, kind: str):
    """Run a program; at its `moment`-th place a rank is killed, or all are (kind: one, all), or told to end (term)."""
    mine, count = int(os.environ["RANK"]), 0
    with open(f"{folder}/pid-{mine}", "w") as file:
        file.write(str(os.getpid()))

    def passed(name):
        nonlocal count
        count += 1
        with open(f"{folder}/count-{mine}", "w") as file:
            file.write(f"{count} {name} {time.time()}")
        if (mine, count) == (rank, moment):
            others = [int(open(f"{folder}/{path}").read()) for path in os.listdir(folder) if path.startswith("pid-")]
            for pid in ([os.getpid()] if kind == "one" else sorted(others, key=lambda pid: pid == os.getpid())):
                os.kill(pid, signal.SIGTERM if kind == "term" else signal.SIGKILL)

    def watch(module, name):
        real = getattr(module, name)

        def watched(*args, **kwargs):
            passed(f"before {name}")
            result = real(*args, **kwargs)
            passed(f"after {name}")
            return result
        setattr(module, name, watched)

    for module, names in PLACES.items():
        for name in names.split():
            if hasattr(module, name):
                watch(module, name)
    return MAIN[program](argv)


def left(out: str) -> dict:
    """What a run leaves, by name, without its times: files of folders that are no longer needed are part of it."""
    found = {}
    for path, content in contents(out).items():
        name = os.path.relpath(path, out)
        if name.endswith("metrics.jsonl"):
            content = [{key: value for key, value in json.loads(line).items() if not key.startswith(("time/", "perf/"))}
                       for line in content.splitlines()]
        elif name.endswith("report.json"):
            content = {key: value for key, value in json.loads(content).items() if key not in ("date", "config")}
        elif name.endswith("/config.json") and "/model" not in name:
            content = {key: value for key, value in json.loads(content).items() if key != "out"}
        if "checkpoints" not in name and not name.endswith((".lock", ".md")) and "responses-" not in name:
            found[name] = content
    return found


@pytest.fixture(scope="module")
def commands(tiny_folder, questions, tiny_mathvista, tmp_path_factory):
    """program -> its command line, without --out, and what it leaves undisturbed with its places on each rank."""
    few = str(tmp_path_factory.mktemp("few") / "few.jsonl")
    with open(few, "w") as file, open(questions) as rows:
        for row in map(json.loads, list(rows)[:6]):
            row["images"] = [os.path.join(os.path.dirname(questions), image) for image in row.get("images", [])]
            file.write(json.dumps(row) + "\n")
    learn = [*stage_1(tiny_folder, few, "."), *SHORT, "--epochs", "2", "--save_every", "1"]
    ask = ["--model", tiny_folder, "--dtype", "float32", "--max_response", "8", "--max_prompt", "600"]
    argvs = {
        "train": learn, "restart": [*learn, "--restart"], "file": [*ask, "--data", few],
        "sample": ["--stage", "sample", *ask, "--data", few, "--group_size", "2"],
        "benchmark": [*ask, "--benchmark", "mathvista", "--data", tiny_mathvista]}
    known = {}

    def command(program):
        if program not in known:
            known[program] = argvs[program], *undisturbed(program, argvs[program], tmp_path_factory.mktemp(program))
        return known[program]

    return command


def begin(program: str, argv: list[str], out):
    """What lies in the folder of a run before it begins: of one that is restarted, a whole run with another seed."""
    if program == "restart":
        assert ranks(2, train.main, [*argv, "--out", str(out), "--seed", "5"])


def undisturbed(program, argv, folder):
    begin(program, argv, folder / "out")
    ranks(2, interrupted, program, [*argv, "--out", str(folder / "out")], str(folder), 0, 0, "none")
    return left(folder / "out"), [int(open(folder / f"count-{rank}").read().split()[0]) for rank in (0, 1)]


def saved_steps(folder) -> tuple[int, int]:
    """How many steps the newest checkpoint has, and how many are logged."""
    names = run_folder.checkpoints(os.path.join(folder, "stage1", "checkpoints"))
    path = os.path.join(folder, "stage1", "metrics.jsonl")
    return int(names[-1][5:]) if names else 0, len(open(path).readlines()) if os.path.exists(path) else 0


KINDS = [("train", "term"), ("restart", "all"), ("sample", "one"), ("file", "term"), ("train", "one"),
         ("benchmark", "all"), ("restart", "one"), ("sample", "term"), ("train", "all"), ("file", "all"),
         ("benchmark", "term"), ("restart", "term"), ("sample", "all")]


@needs_fork_server
def test_a_killed_run_ends_as_if_nothing_had_happened(commands, tmp_path_factory, request):
    """Places are drawn with a seed. One that is told to end says one line and saves its last step."""
    draw, most, table = random.Random(0), request.config.getoption("--faults"), []
    for n in range(most):
        program, kind = KINDS[n % len(KINDS)]
        argv, reference, places = commands(program)
        folder = tmp_path_factory.mktemp("run")
        argv = [*argv, "--out", str(folder / "out")]
        begin(program, argv, folder / "out")
        rank = draw.randrange(2)
        moment = draw.randint(1, places[rank])
        both = ranks(2, interrupted, program, argv, str(folder), rank, moment, kind, grace=0.3 if kind == "one" else 20,
                     expect=None)
        place, when = open(folder / f"count-{rank}").read().rsplit(" ", 1)
        seconds, lines = time.time() - float(when), sum(len(one.stderr.splitlines()) for one in both)
        codes = [one.code for one in both]
        if kind == "term" and codes != [0, 0]:
            assert codes == [143, 143], (program, place, both)
            assert lines == 1 and "SIGTERM: ended" in both[0].stderr, both
            if "after step" in both[0].stderr:
                assert len(set(saved_steps(folder / "out"))) == 1, both[0].stderr
        if codes != [0, 0]:
            ranks(2, MAIN[program], argv)
        found = left(folder / "out")
        assert found.keys() == reference.keys(), (program, kind, place, found.keys() ^ reference.keys())
        assert not [name for name in found if found[name] != reference[name]], (program, kind, place)
        table.append(f"{program:<10}{kind:<6}rank {rank}, place {place:<28}{codes!s:<12}{seconds:5.1f} s{lines:5} lines")
        shutil.rmtree(folder)
    print("\n" + "\n".join(table))
