"""Ranks of uneven length wait for each other aloud and not for ever; a rank that ends takes the others with it.

Two ranks are started without torchrun, which would end both when one has failed: as on different nodes, nothing but the
code itself does. Two nodes are two agents of torchrun on this machine.
"""
import json
import sys

import pytest

import eval as evaluation
import train
from conftest import free_port, picture, side_by_side, two_ranks
from plumbing import processes as joined
from test_train import compare_metrics, largest_difference, weights


SMALL = ["--dtype", "float32", "--max_prompt", "200", "--max_response", "12", "--min_pixels", "784", "--max_pixels",
         "12544", "--slots", "8", "--group_size", "4", "--temperature", "1.2"]
RL = [*SMALL, "--stage", "1", "--lr", "1e-3", "--clip_weight", "0", "--keyword_weight", "1", "--keyword_scope",
      "response", "--no_gradient_checkpointing", "--questions_per_rollout", "4", "--questions_per_update", "2"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """four.jsonl: one of four has an image; one.jsonl: a single one without; torn.jsonl: a second image is torn."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [dict(qid=f"q{i}", problem=f"How many {i}?", answer=str(i), key_words=list("aeiou0123")) for i in range(4)]
    picture(56, 84, 0).save(folder / "0.png")
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:3000])  # its header is whole
    rows[0]["images"] = ["0.png"]
    files = {"four": rows, "one": rows[1:2], "torn": [*rows[:3], rows[3] | {"images": ["torn.png"]}]}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(folder)


UNEVEN = """
import json, sys, time
import eval, train
from plumbing import processes
def late(*args):  # rank 1 takes two signs of life longer, once
    time.sleep(1.2 * processes.dist.get_rank())
    train.generate = generate
    return generate(*args)
generate, train.generate, processes.SIGN_OF_LIFE = train.generate, late, 0.5
for program, argv in json.loads(sys.argv[1]):
    assert sys.modules[program].main(argv) == 0
sys.exit(processes.stop_processes(0))
"""


def test_uneven_ranks_on_two_nodes_equal_one_process(tiny_folder, questions, tmp_path):
    """A rank that is late, one without any question, one without an image: in RL, in sampling and in evaluation."""
    four, one = (["--model", tiny_folder, "--data", f"{questions}/{name}.jsonl"] for name in ("four", "one"))
    single = ["--questions_per_rollout", "1", "--questions_per_update", "1"]
    runs = [("train", [*RL, *four], "four"), ("train", [*RL, *one, *single], "one"),
            ("train", ["--stage", "sample", *SMALL, *one], "one"), ("eval", [*SMALL, *one], "eval")]
    here, there = ([(program, [*argv, "--out", str(tmp_path / side / name)]) for program, argv, name in runs]
                   for side in ("here", "there"))
    for program, argv in here:
        assert {"train": train, "eval": evaluation}[program].main(argv) == 0
    (tmp_path / "uneven.py").write_text(UNEVEN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                "--master_addr", "127.0.0.1", "--master_port", free_port()]
    script = [str(tmp_path / "uneven.py"), json.dumps(there)]
    nodes = side_by_side([[*torchrun, "--node_rank", node, *script] for node in "01"], [{}, {}])
    for code, stderr in nodes:
        assert code == 0, stderr[-3000:]
    assert "waiting for rank 1: rollout of step 0 for " in nodes[0][1] and "waiting for" not in nodes[1][1]
    for name in ("four", "one"):
        ours, theirs = (str(tmp_path / side / name / "stage1") for side in ("there", "here"))
        compare_metrics(ours, theirs)
        assert largest_difference(weights(ours), weights(theirs)) < 2e-4
    for path in ("one/sample/rollouts.jsonl", "eval/responses.jsonl"):
        (ours,), (theirs,) = ([json.loads(line) for line in open(tmp_path / side / path)] for side in ("there", "here"))
        assert [r["text"] for r in ours["responses"]] == [r["text"] for r in theirs["responses"]]


def test_a_rank_that_hangs_is_named_and_given_up(tiny_folder, questions, tmp_path):
    """patience: 0.05 minutes are 3 seconds."""
    hang = """
import sys, time
import rewards, train
from plumbing import processes
processes.SIGN_OF_LIFE = 0.5
score = rewards.score
rewards.score = lambda *args: time.sleep(1000 * processes.dist.get_rank()) or score(*args)
sys.exit(processes.stop_processes(train.main(sys.argv[1:])))
"""
    argv = [*RL, "--model", tiny_folder, "--data", f"{questions}/four.jsonl", "--out", str(tmp_path)]
    (code, stderr), (killed, _) = two_ranks(hang, *argv, "--patience", "0.05", grace=1)
    assert code not in (0, 2) and killed == -9
    assert stderr.count("waiting for rank 1: reward of step 0 for ") >= 4  # every half second
    assert "TimeoutError: gave up after 0.05 minutes of waiting for rank 1: reward of step 0 for " in stderr


def test_bad_input_on_one_rank_ends_all_and_names_it(tiny_folder, questions, tmp_path):
    """A torn image is found when it is decoded, in the middle of a step, by the rank that has the question."""
    code = "import sys, train\nfrom plumbing import processes\nsys.exit(processes.stop_processes(train.main(sys.argv[1:])))"
    argv = [*RL, "--model", tiny_folder, "--data", f"{questions}/torn.jsonl", "--out", str(tmp_path)]
    ranks = two_ranks(code, *argv)
    assert [code for code, _ in ranks] == [2, 2]
    said = [[line for line in stderr.splitlines() if line.startswith("error: ")] for _, stderr in ranks]
    finder = 0 if "has ended" not in said[0][0] else 1  # rank 0 always speaks
    assert len(said[finder]) == 1 and "torn.png: cannot be read" in said[finder][0]
    assert said[1 - finder] == ([] if finder == 0 else [said[1][0].replace("error: ", "error: rank 1 has ended: ")])
    assert not any("Traceback" in stderr for _, stderr in ranks)


def test_a_failed_collective_says_where_every_rank_was():
    """Rank 1 dies in the middle of an update; rank 0 sees its connection closed."""
    code = """
import os, torch
from plumbing import processes
processes.start_processes()
with processes.ending_together():
    processes.barrier()
    processes.here("update of step 7")
    if processes.dist.get_rank() == 1:
        os._exit(9)
    processes.dist.all_reduce(torch.ones(1))
"""
    (code, stderr), (died, _) = two_ranks(code)
    assert code not in (0, 2) and died == 9 and "RuntimeError" in stderr
    assert "last seen rank 0: update of step 7 for " in stderr and "; rank 1: update of step 7 for " in stderr


def test_meetings_leave_nothing_behind_in_the_store(processes):
    joined.barrier()
    before = joined.group_store().num_keys()
    for step in range(20):
        joined.here(f"reward of step {step}")
        joined.barrier()
    assert joined.group_store().num_keys() == before
