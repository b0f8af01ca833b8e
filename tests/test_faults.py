"""Nothing is lost: runs of two processes, killed at random points; full and forbidden disks; what no file calls.

Each interrupted command is given again until it is done, and what it then leaves is compared, bit for bit, with what an
undisturbed run leaves. Five interruptions by default; `pytest tests/test_faults.py --faults 50 -s` makes fifty, and
prints a table of them.
"""
import ast
import fcntl
import functools
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
from plumbing import run_folder
from ranks import ranks
from test_eval import tiny_mathvista
from test_house import FILES, tree_of
from test_train import contents, questions, stage_1, warmup, weights

__all__ = ["questions", "tiny_mathvista", "warmup"]  # fixtures
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
    counted = open(f"{folder}/count-{mine}", "w")  # never cut to nothing, for the other rank may be killed at any time
    with open(f"{folder}/pid-{mine}", "w") as file:
        file.write(str(os.getpid()))

    def passed(name):
        nonlocal count
        count += 1
        counted.seek(0)
        counted.write(f"{count} {name} {time.time()}".ljust(80))
        counted.flush()
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
    """What a run leaves, by name, without its times: files of folders that are no longer needed are part of it. What a
    restart has set aside is not: when the same command comes again, that is the run that was killed."""
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
        others = ("checkpoints", ".before-restart", "responses-")
        if not any(other in name for other in others) and not name.endswith((".lock", ".md")):
            found[name] = content
    return found


@pytest.fixture(scope="module")
def commands(tiny_folder, questions, tiny_mathvista, tmp_path_factory):
    """program -> its command line, without --out."""
    few = str(tmp_path_factory.mktemp("few") / "few.jsonl")
    with open(few, "w") as file, open(questions) as rows:
        for row in map(json.loads, list(rows)[:6]):
            row["images"] = [os.path.join(os.path.dirname(questions), image) for image in row.get("images", [])]
            file.write(json.dumps(row) + "\n")
    learn = [*stage_1(tiny_folder, few, "."), *SHORT, "--epochs", "2", "--save_every", "1"]
    ask = ["--model", tiny_folder, "--dtype", "float32", "--max_response", "8", "--max_prompt", "600"]
    return {
        "train": learn, "restart": [*learn, "--restart"], "file": [*ask, "--data", few],
        "sample": ["--stage", "sample", *ask, "--data", few, "--group_size", "2"],
        "benchmark": [*ask, "--benchmark", "mathvista", "--data", tiny_mathvista]}


@pytest.fixture(scope="module")
def begin(commands, tmp_path_factory):
    """begin(program, out) puts into a folder what lies there before a run: if it restarts, a run with another seed."""
    @functools.cache
    def earlier():
        out = tmp_path_factory.mktemp("earlier") / "out"
        ranks(2, train.main, [*commands["train"], "--out", str(out), "--seed", "5"])
        return out

    return lambda program, out: shutil.copytree(earlier(), out) if program == "restart" else None


@pytest.fixture(scope="module")
def undisturbed(commands, begin, tmp_path_factory):
    """undisturbed(program): what it leaves, and the number of its places on each rank."""
    @functools.cache
    def run(program):
        folder = tmp_path_factory.mktemp(program)
        begin(program, folder / "out")
        ranks(2, interrupted, program, [*commands[program], "--out", str(folder / "out")], str(folder), 0, 0, "none")
        return left(folder / "out"), [int(open(folder / f"count-{rank}").read().split()[0]) for rank in (0, 1)]

    return run


def saved_steps(folder) -> tuple[int, int]:
    """How many steps the newest checkpoint has, and how many are logged."""
    names = run_folder.checkpoints(os.path.join(folder, "stage1", "checkpoints"))
    path = os.path.join(folder, "stage1", "metrics.jsonl")
    return int(names[-1][5:]) if names else 0, len(open(path).readlines()) if os.path.exists(path) else 0


KINDS = [("train", "term"), ("restart", "all"), ("sample", "one"), ("file", "term"), ("train", "one"),
         ("benchmark", "all"), ("restart", "one"), ("sample", "term"), ("train", "all"), ("file", "all"),
         ("benchmark", "term"), ("restart", "term"), ("sample", "all")]


def test_a_killed_run_ends_as_if_nothing_had_happened(commands, begin, undisturbed, tmp_path_factory, request):
    """Places are drawn with a seed. One that is told to end says one line and saves its last step."""
    draw, most, table = random.Random(0), request.config.getoption("--faults"), []
    for n in range(most):
        program, kind = KINDS[n % len(KINDS)]
        reference, places = undisturbed(program)
        folder = tmp_path_factory.mktemp("run")
        argv = [*commands[program], "--out", str(folder / "out")]
        begin(program, folder / "out")
        rank = draw.randrange(2)
        moment = draw.randint(1, places[rank])
        both = ranks(2, interrupted, program, argv, str(folder), rank, moment, kind, grace=0.3 if kind == "one" else 20,
                     expect=None)
        place, when = open(folder / f"count-{rank}").read().rstrip().rsplit(" ", 1)
        seconds, lines = time.time() - float(when), sum(len(one.stderr.splitlines()) for one in both)
        codes = [one.code for one in both]
        # In a program's first and last moments, with nothing to save, a rank may end at once and leave the other alone.
        if kind == "term" and codes == [143, 143]:
            assert lines == 1 and "SIGTERM: ended" in both[0].stderr, both
            if "after step" in both[0].stderr:
                assert len(set(saved_steps(folder / "out"))) == 1, both[0].stderr
        if codes != [0, 0]:
            ranks(2, MAIN[program], argv)
        found = left(folder / "out")
        assert found.keys() == reference.keys(), (program, kind, place, found.keys() ^ reference.keys())
        assert not [name for name in found if found[name] != reference[name]], (program, kind, place)
        table.append(f"{program:<10}{kind:<5}rank {rank} at {place:<22}{codes!s:<12}{seconds:4.1f} s{lines:4} lines")
        shutil.rmtree(folder)
    print("\n" + "\n".join(table))


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MB."""
    if os.name == "nt" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a small disk can be mounted by root only")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine mounts no small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def learn(tiny_folder, warmup, out):
    return ["--stage", "sft", "--model", tiny_folder, "--data", warmup, "--questions_per_rollout", "4",
            "--questions_per_update", "4", "--lr", "1e-2", *FAST, "--out", str(out)]


FAST = ["--dtype", "float32", "--max_prompt", "200", "--max_response", "60", "--min_pixels", "784", "--max_pixels",
        "12544", "--no_gradient_checkpointing", "--save_every", "2", "--epochs", "1"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tiny_folder, warmup, tmp_path, small_disk,
                                                                       capsys):
    """Room for nothing, for the settings alone, for half a checkpoint, and for a checkpoint without the model."""
    assert train.main(learn(tiny_folder, warmup, tmp_path)) == 0
    size = sum(len(content) for content in contents(tmp_path / "sft" / "checkpoints" / "step-000002").values())
    reference, filler = weights(tmp_path / "sft"), small_disk / "filler"
    for room in (0, 30_000, size // 2, size + 60_000):
        argv = learn(tiny_folder, warmup, small_disk / str(room))
        os.makedirs(small_disk / str(room))
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(free - room))
        capsys.readouterr()
        assert train.main(argv) == 2, room
        said, error = capsys.readouterr()
        assert error.startswith("error: cannot write (") and error.count("\n") == 1 and "is safe" in error
        assert room == 0 or f"warning: --out {small_disk / str(room)} has " in said
        assert "is the disk full?" in error and "same command" in error, error  # torch.save does not say why
        filler.unlink()
        assert train.main(argv) == 0
        found = weights(small_disk / str(room) / "sft")
        assert found.keys() == reference.keys() and all(torch.equal(found[name], reference[name]) for name in found)
        shutil.rmtree(small_disk / str(room))


@pytest.mark.parametrize("out", ["a file", "below a file", "read-only", "a NUL byte"])
def test_a_folder_that_cannot_be_written_is_one_line(tiny_folder, warmup, questions, tmp_path, small_disk, capsys, out):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (tmp_path / "file").write_text("")
    place = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "out", "read-only": small_disk / "out",
             "a NUL byte": "out\0"}[out]
    ask = ["--model", tiny_folder, "--data", questions, "--dtype", "float32", "--out", str(place)]
    for main, argv in ((train.main, learn(tiny_folder, warmup, place)), (evaluation.main, ask)):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "no folder can be made or written there" in error, error


# ---------------------------------------------------------------- folders


def test_one_program_at_a_time_works_in_a_folder(tiny_folder, warmup, tmp_path, capsys):
    """A lock is the system's, so that of a process that is no more is none."""
    (tmp_path / "sft.lock").write_text("process 7 on elsewhere since long ago")
    with open(tmp_path / "sft.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert train.main(learn(tiny_folder, warmup, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "process 7 on elsewhere since long ago" in error and error.count("\n") == 1
    assert not os.path.exists(tmp_path / "sft")
    assert train.main(learn(tiny_folder, warmup, tmp_path)) == 0
    assert f"process {os.getpid()} on " in (tmp_path / "sft.lock").read_text()


def test_a_folder_that_holds_nothing_of_value_is_taken_over(tiny_folder, warmup, tmp_path):
    """As a kill leaves it that falls between the making of a folder and its config.json."""
    os.makedirs(tmp_path / "sft" / "rollouts")
    (tmp_path / "sft" / "config.json.writing").write_text("{")
    assert train.main(learn(tiny_folder, warmup, tmp_path)) == 0


def test_a_folders_name_is_no_pattern(tiny_folder, questions, tmp_path, monkeypatch):
    """What was answered before an interruption is found in x[1]."""
    collect, out = train.collect, tmp_path / "x[1]"
    argv = ["--model", tiny_folder, "--data", questions, "--dtype", "float32", "--max_response", "4", "--out", str(out)]
    monkeypatch.setattr(train, "CHUNK", 5)

    def cut_off(*args):
        yield next(parts := collect(*args))
        parts.close()
        raise data.InputError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(train, "collect", cut_off)
        assert evaluation.main(argv) == 2
    asked = []
    monkeypatch.setattr(train, "collect", lambda *args: asked.append(len(args[3])) or collect(*args))
    assert evaluation.main(argv) == 0 and asked == [12 - 5]
    assert [json.loads(line)["qid"] for line in open(out / "responses.jsonl")] == [f"q{i}" for i in range(12)]


# ---------------------------------------------------------------- numbers


def with_bad_steps(monkeypatch, bad: set[int]):
    """Steps with these numbers have a gradient that is not finite."""
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def sometimes(*args):
        norms.append(clip(*args))
        return norms[-1] * (float("nan") if len(norms) - 1 in bad else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", sometimes)


def test_five_skipped_steps_are_one_line_with_the_rows_of_the_last(tiny_folder, warmup, tmp_path, monkeypatch, capsys):
    with_bad_steps(monkeypatch, set(range(9)))
    assert train.main([*learn(tiny_folder, warmup, tmp_path), "--epochs", "5", "--save_every", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "5 steps in a row, the last is step 4" in error
    assert error.rpartition("qid ")[2].count(",") == 3


@pytest.mark.parametrize("phase", ["reward", "rollout"])
def test_what_is_not_finite_is_named_with_its_qid(tiny_folder, questions, tmp_path, monkeypatch, capsys, phase):
    score, judge = train.rewards.score, train.rewards.judge

    def spoilt_score(samples, responses, *args):
        total, parts = score(samples, responses, *args)
        for k, sample in enumerate(samples):
            total[4 * k + 1] *= float("nan") if sample.qid == "q3" and phase == "reward" else 1
        return total, parts

    def spoilt(samples, finished, *args):
        for q, group in finished:
            if samples[q].qid == "q3" and phase == "rollout":
                group[0].logprobs[0] = float("-inf")
        return judge(samples, finished, *args)

    monkeypatch.setattr(train.rewards, "judge", spoilt)
    monkeypatch.setattr(train.rewards, "score", spoilt_score)
    argv = stage_1(tiny_folder, questions, tmp_path, *SHORT, "--questions_per_rollout", "12")
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: qid q3: a reward or log-prob is not finite" in error, error


# ---------------------------------------------------------------- what no file calls


def calls_of(path: str):
    """(line, the name that is called, its keywords) of each call in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


# The loaders of the hub.
NETWORK = {"snapshot_download": {"engine/weights.py", "engine/clip.py"}, "load_dataset": {"plumbing/files.py"}}


def test_no_file_evaluates_text_unpickles_runs_a_shell_or_calls_the_network():
    """Weights are safetensors; what torch.load reads is weights only. The page of a run loads nothing."""
    for path in FILES:
        for line, name, words in calls_of(path):
            where, last = f"{path}:{line} {name}", name.split(".")[-1]
            assert name not in ("eval", "exec", "compile", "os.system", "os.popen"), where
            assert not name.startswith(("pickle.", "dill.", "joblib.", "marshal.", "shelve.", "requests.",
                                        "urllib.request", "httpx.", "http.")), where
            assert words.get("shell", "False") == "False" and words.get("trust_remote_code", "False") == "False", where
            assert words.get("weights_only", "True") == "True" and words.get("allow_pickle", "False") == "False", where
            assert name != "torch.load" or words.get("weights_only") == "True", where
            assert last not in NETWORK or path in NETWORK[last], where
