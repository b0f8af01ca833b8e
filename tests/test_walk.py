"""docs/walk.txt is what `python demo.py --walk` prints: every tensor of one RL step, in its order."""
import os
import re

import pytest

import demo
from ranks import ROOT, ranks

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")


@pytest.fixture(scope="module")
def printed():
    [only] = ranks(1, demo.main, ["--walk"])
    return only.stdout


def test_the_committed_walk_is_what_is_printed_up_to_rounding(printed):
    with open(os.path.join(ROOT, "docs", "walk.txt"), encoding="utf-8") as file:
        committed = file.read()
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", committed)
    numbers = [list(map(float, NUMBER.findall(text))) for text in (printed, committed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.01, abs=0.002)


def test_the_walk_is_in_the_order_of_the_step_and_the_first_update_has_ratio_1(printed):
    names = re.findall(r"^(\w+):", printed, re.MULTILINE)
    order = ["encode_prompt", "score", "group_advantages", "make_micro_batches", "grpo_loss", "update"]
    assert sorted(order, key=names.index) == order and names.count("update") == 2
    first, second = re.findall(r"^    ratio .*\) +(\S.*)$", printed, re.MULTILINE)
    assert set(first.split()) == {"1", ".."} and set(second.split()) != {"1", ".."}


def test_a_symbol_has_one_size_within_a_function_and_a_number_is_its_size(printed):
    sizes = {"Q": 2, "G": 3, "QG": 6}
    for part in printed.split("\n\n"):
        known = dict(sizes)
        for symbols, numbers in re.findall(r"^    [\w.]+ +\(([^)]*)\) = \(([^)]*)\)", part, re.MULTILINE):
            for symbol, number in zip(symbols.split(), numbers.split(), strict=True):
                assert int(symbol if symbol.isdigit() else known.setdefault(symbol, number)) == int(number), part
