"""Ranks of uneven length wait for each other aloud and not for ever; a rank that ends takes the others with it.

Two ranks run without torchrun, which would end both when one has failed: as on different nodes, nothing but the code
itself does. Two nodes are two agents of torchrun on this machine.
"""
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from torch.distributed import run as torchrun

import eval as evaluation
import rewards
import train
from conftest import picture
from data import InputError
from plumbing import processes as joined
from plumbing.flags import complain
from ranks import free_port, ranks
from speed import rows as even
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
    train.stream = stream
    yield from stream(*args)
stream, train.stream, processes.SIGN_OF_LIFE = train.stream, late, 0.5
for program, argv in json.loads(sys.argv[1]):
    assert sys.modules[program].main(argv) == 0
sys.exit(processes.stop_processes(0))
"""


def node(port, *command):
    """One of two nodes: torchrun's agent, which starts its rank as a program of its own."""
    torchrun.main(["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", os.environ["RANK"],
                   "--master_addr", "127.0.0.1", "--master_port", port, *command])


@pytest.fixture(scope="module")
def nodes(tiny_folder, questions, tmp_path_factory):
    """Four runs on two nodes, which go on beside the tests of ranks that end: (their future, runs, folder)."""
    out = tmp_path_factory.mktemp("nodes")
    four, one = (["--model", tiny_folder, "--data", f"{questions}/{name}.jsonl"] for name in ("four", "one"))
    single = ["--questions_per_rollout", "1", "--questions_per_update", "1"]
    runs = [("train", [*RL, *four], "four"), ("train", [*RL, *one, *single], "one"),
            ("train", ["--stage", "sample", *SMALL, *one], "one"), ("eval", [*SMALL, *one], "eval")]
    there = [(program, [*argv, "--out", str(out / "there" / name)]) for program, argv, name in runs]
    (out / "uneven.py").write_text(UNEVEN)
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(ranks, 2, node, free_port(), str(out / "uneven.py"), json.dumps(there)), runs, out


def hang(argv):
    """Rank 1 never has its rewards."""
    joined.SIGN_OF_LIFE, score = 0.5, rewards.score
    rewards.score = lambda *args: time.sleep(1000 * joined.dist.get_rank()) or score(*args)
    return train.main(argv)


def test_a_rank_that_hangs_is_named_and_given_up(nodes, tiny_folder, questions, tmp_path):
    """patience: 0.08 minutes are 4.8 seconds. The two nodes are begun here, because there is time."""
    argv = [*RL, "--model", tiny_folder, "--data", f"{questions}/four.jsonl", "--out", str(tmp_path)]
    waiting, hanging = ranks(2, hang, [*argv, "--patience", "0.08"], grace=0.2, expect=None)
    assert waiting.code not in (0, 2) and hanging.code == -9
    assert waiting.stderr.count("waiting for ranks [1]\n") >= 4  # every half second
    assert "TimeoutError: gave up after 0.08 minutes of waiting for ranks [1]\n" in waiting.stderr


def test_bad_input_on_one_rank_ends_all_and_names_it(tiny_folder, questions, tmp_path):
    """A torn image is found when it is decoded, in the middle of a step, by the rank that has the question."""
    argv = [*RL, "--model", tiny_folder, "--data", f"{questions}/torn.jsonl", "--out", str(tmp_path)]
    both = ranks(2, train.main, argv, expect=2)
    said = [[line for line in rank.stderr.splitlines() if line.startswith("error: ")] for rank in both]
    finder = 0 if "has ended" not in said[0][0] else 1  # rank 0 always speaks
    assert len(said[finder]) == 1 and "torn.png: cannot be read" in said[finder][0]
    assert said[1 - finder] == ([] if finder == 0 else [said[1][0].replace("error: ", "error: rank 1 has ended: ")])
    assert not any("Traceback" in rank.stderr for rank in both)


def die_in_an_update(dying):
    """One of two dies; the other sees its connection closed."""
    joined.start_processes()
    try:
        with joined.ending_together():
            joined.barrier()
            if joined.dist.get_rank() == dying:
                os._exit(9)
            joined.dist.all_reduce(torch.ones(1))
    except InputError as error:
        return complain(error)


@pytest.mark.parametrize("dying", [1, 0])
def test_a_rank_that_dies_is_one_line_of_the_other(dying):
    """Without torchrun the store is in rank 0, and torch warns when it has gone."""
    both = ranks(2, die_in_an_update, dying, expect=None)
    said = both[1 - dying].stderr
    assert (both[1 - dying].code, both[dying].code) == (2, 9) and "Traceback" not in said, said
    line = said.splitlines()[-1]
    assert line.startswith(f"error: rank {1 - dying} has lost another (") and "from the last checkpoint" in line
    if dying == 1:
        assert said.count("\n") == 1


def start_again():
    """What torchrun does under --max_restarts after a first attempt that has met with bad input."""
    store = joined.dist.HashStore()
    store.set("refused", "")
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    joined.dist.rendezvous = lambda url: iter([(joined.dist.PrefixStore("worker", store), 0, 1)])
    joined.start_processes()


def test_bad_input_is_said_once_although_torchrun_starts_it_again():
    [only] = ranks(1, start_again, expect=2)
    assert only.stdout == only.stderr == ""


def told(grace, again):
    joined.start_processes()
    with joined.ending_together():
        joined.TOLD.grace = grace
        for _ in range(1 + again):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.1)
        time.sleep(100)


@pytest.mark.parametrize("grace, again", [(0, False), (0.3, False), (100, True)])
def test_a_signal_ends_a_run_at_once_after_the_grace_or_another(grace, again):
    [only] = ranks(1, told, grace, again, expect=143)
    assert only.stderr == "SIGTERM: ended at once; the same command goes on from what is saved\n"


def test_questions_are_dealt_longest_first_to_the_rank_with_the_least():
    """9 to the first, 7 to the second, 6 beside the 7 (13), 5 beside the 9 (14), 4 beside 7 and 6 (17), 3 to 9 and 5
    (17). In eight ranks of three questions five have nothing."""
    assert joined.deal([7, 4, 9, 3, 6, 5], 2) == [[2, 5, 3], [0, 4, 1]]
    assert joined.deal([5, 5, 6], 8) == [[2], [0], [1], [], [], [], [], []]


def shares_of_two():
    joined.start_processes()
    rank = joined.dist.get_rank()
    assert joined.fair_shares([7, 4, 9, 3, 6, 5, 1, 8], 4) == [[[2, 3], [7, 6]], [[0, 1], [4, 5]]][rank]
    everything = [[rank]] * 2
    assert joined.gather(everything) == [[0], [1], [0], [1]]


def test_each_block_is_dealt_out_by_itself_and_gathered_rows_keep_their_order():
    """Blocks of four: 9 and 3 against 7 and 4; then 8 against 6 and 5, and 1 to the 8."""
    ranks(2, shares_of_two)


def test_even_rows_are_worth_an_eighth_of_the_update():
    """Two ranks, questions of 40, 20, 40, 20 tokens: 80 and 40 as they were sampled, 120 of 160; dealt anew 60 each.
    Then one drawn step of stage 1 on eight ranks."""
    prompts, responses = [10] * 4, [[30], [10], [30], [10]]
    assert [even.efficiency(prompts, responses, dealt, 2, 4, 100) for dealt in (False, True)] == [0.75, 1.0]
    step = even.draw(numpy.random.default_rng(0), even.QUESTIONS)
    before, after = (even.efficiency(*step, dealt) for dealt in (False, True))
    assert before < 0.83 and after >= 0.93


def test_decode_steps_are_those_of_the_sampler():
    """The bursts of test_rollout.py's queue: 7 for each chunk of three, 9 for all six."""
    six = [[1 + 8 * n] for n in (1, 1, 6, 1, 1, 6)]
    assert [even.decode_steps(part, 2) for part in (six[:3], six[3:], six)] == [56, 56, 72]


def test_ahead_keeps_the_order_and_its_bound_and_an_error_comes_with_its_item():
    """At most 3 results of items not yet asked for; item 6 fails, and 0 to 5 are there before."""
    begun, taken = [], []

    def work(item):
        begun.append(item)
        time.sleep(0.001 * (item % 3))  # later ones are done earlier
        if item == 6:
            raise InputError("item 6")
        return 10 * item

    with pytest.raises(InputError, match="item 6"):
        for result in joined.ahead(work, iter(range(99)), 3):
            taken.append(result)
            assert len(begun) <= len(taken) + 3
    assert taken == [0, 10, 20, 30, 40, 50] and len(begun) <= 10
    assert list(joined.ahead(str, [1, 2], 5)) == ["1", "2"] and list(joined.ahead(str, [], 5)) == []


def test_meetings_leave_nothing_behind_in_the_store(processes):
    joined.barrier()
    before = joined.group_store().num_keys()
    for _ in range(20):
        joined.barrier()
    assert joined.group_store().num_keys() == before


def test_uneven_ranks_on_two_nodes_equal_one_process(nodes):
    """A rank that is late, one without any question, one without an image: in RL, in sampling and in evaluation."""
    begun, runs, out = nodes
    for program, argv, name in runs:
        assert {"train": train, "eval": evaluation}[program].main([*argv, "--out", str(out / "here" / name)]) == 0
    first, second = begun.result()
    assert "waiting for ranks [1]\n" in first.stderr
    for name in ("four", "one"):
        ours, theirs = (str(out / side / name / "stage1") for side in ("there", "here"))
        compare_metrics(ours, theirs)
        assert largest_difference(weights(ours), weights(theirs)) < 2e-4
    for path in ("one/sample/rollouts.jsonl", "eval/responses.jsonl"):
        (ours,), (theirs,) = ([json.loads(line) for line in open(out / side / path)] for side in ("there", "here"))
        assert [r["text"] for r in ours["responses"]] == [r["text"] for r in theirs["responses"]]
