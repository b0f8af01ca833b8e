"""docs/fork.md is true: each of its diffs is small and applies, and a copy with all of them trains and evaluates."""
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from glob import glob

import pytest
import torch

from conftest import ROOT, picture
from kernels import ops, twins
from plumbing.flags import Flags
from ranks import import_from, ranks
from test_train import SMALL, metrics

if not shutil.which("git"):
    pytest.skip("git, which applies the diffs, is not installed", allow_module_level=True)

with open(os.path.join(ROOT, "docs", "fork.md"), encoding="utf-8") as page:
    PAGE = page.read()
DIFFS = {section.split("\n")[0]: diff for section in PAGE.split("\n## ")[1:]
         for diff in re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)}
ONE = {"image": "0.png", "key_words": list("abcdefghijklmnopqrstuvwxyz")}
ROWS = [ONE | {"query": f"How many {i}?", "label": str(i)} for i in range(4)] + [{"query": "?", "label": "no image"}]
WEIGHTS = {"keyword": 0.4, "format": 0.1, "length": 0.1, "novelty": 0.1}  # of stage 1 without CLIP, after the diff
DIAGRAMS = [{"question": "Which is it?", "options": ["a leaf", "a root"], "answer": str(i)} for i in (0, 1, 1)]


def git_apply(folder, diff, *flags):
    """Apply a diff in a folder, as in one that is no repository."""
    env = os.environ | {"GIT_CEILING_DIRECTORIES": os.path.dirname(folder)}
    done = subprocess.run(["git", "apply", *flags], cwd=folder, env=env, input=diff, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + diff


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The Python files of the repository but the tests, in a folder of their own, with all diffs applied."""
    folder = os.path.realpath(tmp_path_factory.mktemp("copy"))
    for path in glob("*.py", root_dir=ROOT) + glob("*/*.py", root_dir=ROOT):
        if not path.startswith("tests"):
            os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
            shutil.copy(os.path.join(ROOT, path), os.path.join(folder, path))
    for diff in DIFFS.values():
        git_apply(folder, diff)
    return folder


@pytest.fixture(scope="module")
def fork(copy):
    """{"train": .., "rewards": ..}: these two files of the copy as modules. What they import comes from here."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, os.path.join(copy, f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, name, module)  # where a dataclass looks for the types of its fields
            spec.loader.exec_module(module)
        return module

    return {name: load(name) for name in ("train", "rewards")}


def train_and_evaluate(copy, folder, argv):
    """In a process of its own, which has imported this project: train.py and eval.py of the copy in its place."""
    import_from(copy)
    os.chdir(folder)
    train, evaluation, cut = importlib.import_module("train"), importlib.import_module("eval"), argv.index("eval.py")
    assert train.__file__.startswith(copy) and evaluation.__file__.startswith(copy)
    return train.main(argv[:cut]) or evaluation.main(argv[cut + 1:])


@pytest.fixture(scope="module")
def outcome(copy, tiny_folder, tmp_path_factory):
    """Stage 1 in the copy, one step of two updates, then the new benchmark: (folder of both, what was printed)."""
    folder = str(tmp_path_factory.mktemp("fork"))
    picture(56, 56, 0).save(os.path.join(folder, "0.png"))
    responses = [dict(pid=pid, response=f"The answer is {letter}.") for pid, letter in zip("123", "AAB")]
    for name, content in ("rows.json", ROWS), ("diagrams.json", DIAGRAMS), ("responses.json", responses):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(content, file)
    argv = ["--stage", "1", "--out", ".", "--model", tiny_folder, "--data", "rows.json", *SMALL, "--group_size", "4",
            "--questions_per_rollout", "4", "--questions_per_update", "2", "--clip_weight", "0", "--lr", "1e-3",
            "--keyword_scope", "response", "--entropy_coef", "0.01", "--lr_floor", "0.1", "--lr_decay", "cosine",
            "eval.py", "--benchmark", "ai2d", "--data", "diagrams.json", "--score", "responses.json", "--out", "."]
    [only] = ranks(1, train_and_evaluate, copy, folder, argv)
    return folder, only.stdout


@pytest.mark.parametrize("title", DIFFS)
def test_a_diff_changes_at_most_ten_lines_and_applies_alone(title):
    """Empty lines are not counted."""
    changed = re.findall(r"^[+-](?!\+\+ |-- ) *\S", DIFFS[title], re.MULTILINE)
    assert 0 < len(changed) <= 10
    git_apply(ROOT, DIFFS[title], "--check")


def test_every_diff_of_the_page_is_tried():
    assert len(DIFFS) == PAGE.count("```diff") == 8


def test_an_added_reward_is_computed_logged_and_weighted(fork, outcome):
    """a b c a b c has the triples abc bca cab abc: three of four are new."""
    novelty_reward = fork["rewards"].novelty_reward
    assert [novelty_reward(text) for text in ("a b c a b c", "a a a a", "a b", "")] == [0.75, 0.5, 0, 0]
    folder = os.path.join(outcome[0], "stage1")
    with open(os.path.join(folder, "rollouts", "step_000000.jsonl")) as file:
        responses = [response for line in file for response in json.loads(line)["responses"]]
    for response in responses:
        assert response["novelty"] == pytest.approx(novelty_reward(response["text"]))
        assert response["reward"] == pytest.approx(sum(w * response[part] for part, w in WEIGHTS.items()), abs=1e-6)
    assert len(responses) == 16 and any(response["novelty"] for response in responses)
    [logged] = metrics(folder)
    assert logged["reward/novelty"] == pytest.approx(sum(r["novelty"] for r in responses) / 16)


def test_columns_under_other_names_are_read_and_a_filter_filters(outcome):
    with open(os.path.join(outcome[0], "stage1", "rollouts", "step_000000.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    assert {(row["question"], row["answer"]) for row in rows} == {(f"How many {i}?", str(i)) for i in range(4)}
    assert "4 questions x 1 epochs: 1 steps" in outcome[1]  # the fifth row has no image


def test_an_added_benchmark_is_found_and_judges(outcome):
    """Right are A for the first option and B for the second; A for the second is wrong."""
    with open(os.path.join(outcome[0], "ai2d-scored", "responses.jsonl")) as file:
        assert [json.loads(line)["strict"] for line in file] == [True, False, True]


def test_dr_grpo_divides_by_no_deviation_and_by_a_constant(fork, processes, prompts):
    """Rewards 1 0 0 0, lengths 2 4 4 2 and the limit 8: at ratio 1 the loss is -(2 x .75 - 10 x .25) / (4 x 8)."""
    train = fork["train"]
    assert train.group_advantages(torch.tensor([[1.0, 1, 1, 0]])).tolist() == [[0.25, 0.25, 0.25, -0.75]]
    advantages, lengths = train.group_advantages(torch.tensor([[1.0, 0, 0, 0]])), (2, 4, 4, 2)
    drawn = [[-1.0] * n for n in lengths]
    [batch] = train.make_micro_batches([(prompts[0], [[5] * n for n in lengths])], 1000, "cpu", advantages, drawn, 8)
    assert batch.weights.tolist() == [1 / 32] * 12
    assert -(batch.weights * batch.advantages).sum().item() == 0.03125


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient(fork):
    """Weights .5, log-probs -1 and -2, ratios 6 (at most 5 counts) and .5: loss .5 x 5 x 1 + .5 x .5 x 2 = 3."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    old = logprobs.detach() - torch.tensor([6.0, 0.5]).log()
    loss, _ = fork["train"].grpo_loss(logprobs, old, logprobs.detach(), torch.ones(2), torch.full((2,), 0.5),
                                      0.2, 0.3, 3.0, 0.0)
    loss.backward()
    assert loss.item() == pytest.approx(3) and logprobs.grad.tolist() == pytest.approx([-2.5, -0.25])


def test_an_edited_loss_runs_itself_on_a_gpu_and_the_page_has_the_line(fork, monkeypatch):
    """The kernel is interpreted on the CPU; the choice is that of a GPU."""
    pytest.importorskip("triton")
    from kernels import grpo
    from triton_interpreter import interpreted

    compare, lines, edited = twins.grpo_difference, [], fork["train"].grpo_loss
    monkeypatch.setattr(twins, "grpo_difference", lambda reference, twin, _: compare(reference, twin, "cpu"))
    with interpreted(grpo):
        assert ops.choose_grpo_loss(edited, "auto", "cuda", log=lines.append) is edited
    quoted = re.search(r"^```\n(train\.py's grpo_loss .*?)```", PAGE, re.MULTILINE | re.DOTALL)[1]
    numbers = re.compile(r"-?\d+\.\d+")  # their last digits are the machine's
    assert [numbers.sub("#", line) for line in lines] == [numbers.sub("#", " ".join(quoted.split()))]


def test_the_entropy_bonus_alone_raises_the_entropy(fork, policy, processes, prompts):
    """With a loss of 0 beside it, the reported loss is -coefficient x entropy."""
    train, rate = fork["train"], 0.01
    optimizer = torch.optim.SGD(policy.parameters(), rate)
    batches = train.make_micro_batches([(prompts[0], [[5, 6, 7], [8, 9]])], 1000, "cpu")
    first, second = (train.update(policy, optimizer, batches, lambda logprobs, *_: (0 * logprobs.sum(), {}), rate, 1.0,
                                  1.0, "cpu", 0.5) for _ in range(2))
    assert first["loss"] == pytest.approx(-0.5 * first["entropy"]) and second["entropy"] > first["entropy"]


def test_an_added_setting_is_a_flag_with_its_comment_as_help(fork, outcome, monkeypatch):
    """At the end of the cosine, .1 of the rate is left."""
    monkeypatch.setitem(sys.modules, "train", fork["train"])  # where inspect looks for the comments
    words = Flags(fork["train"].Config, fork["train"].__doc__).format_help().split()
    assert "--lr_floor float share of lr at which the cosine ends (default: 0.0)" in " ".join(words)
    config = fork["train"].Config(lr=2.0, lr_decay="cosine", lr_floor=0.1)
    assert fork["train"].learning_rate(config, 11, 11) == pytest.approx(0.2)
    with open(os.path.join(outcome[0], "stage1", "config.json")) as file:
        assert json.load(file)["lr_floor"] == 0.1
