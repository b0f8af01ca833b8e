"""The busy world by hand, what each arm asks of train.py, and the comparison over seeds."""
import json
import os
import random
import xml.etree.ElementTree as ElementTree

import pytest

import data
import demo
import train
from plumbing.flags import Flags
from variants import ablation
from variants.ablation import BUSY, BusyQuestion, MISTAKEN, solve

pytestmark = pytest.mark.fast

OBJECTS = (("red", "triangle"), ("blue", "circle"), ("red", "square"), ("purple", "square"), ("orange", "circle"))
FIRST = ablation.SEEDS[:3]
LISTED = "red triangle +{}, blue circle +{}, red square +{}, purple square +{}, orange circle +{}"


@pytest.fixture(scope="module")
def items():
    return ablation.make_items(200, 0, "warmup")


@pytest.mark.parametrize("kind, colour, shape, worths, others, answer", [
    ("total", "", "", ("1: 1", "1: 2", "1: 3", "1: 4", "1: 5"), [], 5),
    ("add", "red", "", ("1: 1", "1: 2", "1: 3", "1: 4", "1: 5"), ["5 + 3 = 8"], 8),
    ("count", "", "square", ("0: 0", "0: 0", "1: 1", "1: 2", "0: 2"), [], 2),
    ("subtract", "red", "", ("1: 1", "0: 1", "1: 2", "0: 2", "0: 2"), ["5 - 2 = 3"], 3),
    ("count corners of", "", "", ("3: 3", "0: 3", "4: 7", "4: 11", "0: 11"), [], 11)])
def test_a_step_lists_every_object_with_its_worth_and_the_running_number(kind, colour, shape, worths, others, answer):
    question = BusyQuestion(kind, colour, shape, 3)
    assert solve(question, OBJECTS) == ([LISTED.format(*worths), *others], answer)


def test_the_world_has_five_to_nine_objects_and_labels_of_one_word(items):
    assert {len(item.objects) for item in items} == set(range(5, 10))
    assert {item.question.kind for item in items} == set(ablation.KINDS)
    assert not any(item.question.colour and item.question.shape for item in items)
    assert {item.image.size for item in items} == {(84, 84)}


def test_the_teacher_takes_eight_kinds_of_objects_for_another_half_of_the_time_and_counts_what_it_sees(items):
    assert len(MISTAKEN) == 8 and all(MISTAKEN[pair] != pair for pair in MISTAKEN)
    slips = []
    for item in items:
        sections = data.parse(item.response)
        seen = [tuple(words.split()) for words in sections.description.rstrip(".").split(", ")]
        assert all(told in (pair, MISTAKEN.get(pair)) for pair, told in zip(item.objects, seen, strict=True))
        assert sections.answer == str(solve(item.question, tuple(seen))[1]) and ablation.agrees(
            item.question, item.response)
        slips += [told != pair for pair, told in zip(item.objects, seen) if pair in MISTAKEN]
    assert abs(sum(slips) / len(slips) - 0.5) < 3 * (0.25 / len(slips)) ** 0.5


@pytest.mark.parametrize("description, answer, agreed", [
    ("red square, red circle.", "2", True), ("red square, blue circle.", "2", False),
    ("red square, blue circle.", "1", True), ("red, circle.", "1", False), ("", "0", False)])
def test_an_answer_agrees_with_its_own_description_right_or_wrong(description, answer, agreed):
    text = demo.teach(BusyQuestion("count", "red", "", 1), OBJECTS, 0, 0, random.Random(0))
    told = data.parse(text).description
    text = text.replace(told, description).replace("answer is: 2", f"answer is: {answer}")
    assert ablation.agrees(BusyQuestion("count", "red", "", 1), text) is agreed


@pytest.mark.parametrize("arm", ablation.arms(1, 1))
def test_every_arm_has_as_many_steps_and_rollouts(arm):
    """12 + 36 steps, and no flag of an arm changes how many responses a step has."""
    configs = configs_of(arm)
    assert sum(config.max_steps for config in configs) == 48
    assert {(config.questions_per_rollout, config.questions_per_update, config.group_size, config.seed)
            for config in configs} == {(configs_of("both")[0].questions_per_rollout,
                                        configs_of("both")[0].questions_per_update, 8, 7)}


def configs_of(arm: str) -> list[train.Config]:
    """What train.py makes of an arm's command lines; the folders need not be there."""
    world = BUSY._replace(steps=BUSY.steps | dict(stage1=12, stage2=36))
    argvs = [ablation.argv_of("made", arm, number, 7, world) for number in range(len(ablation.arms(12, 36)[arm]))]
    return [Flags(train.Config, "").read(argv, train.STAGES[argv[argv.index("--stage") + 1]]) for argv in argvs]


@pytest.mark.parametrize("arm, steps, kl_coefs", [
    ("both", (12, 36), (0.01, 0.01)), ("short_first", (4, 44), (0.01, 0.01)), ("long_first", (24, 24), (0.01, 0.01)),
    ("strong_kl", (12, 36), (0.1, 0.01))])
def test_the_arms_of_the_drift_change_how_far_stage_1_may_go(arm, steps, kl_coefs):
    configs = configs_of(arm)
    assert tuple(config.max_steps for config in configs) == steps
    assert tuple(config.kl_coef for config in configs) == kl_coefs


STAGE_1 = dict(clip=0.4, keyword=0.4, format=0.1, length=0.1, accuracy=0.0)
STAGE_2 = dict(clip=0.0, keyword=1e-12, format=0.1, length=0.0, accuracy=0.9)


@pytest.mark.parametrize("arm, stages", [
    ("both", [("sft", "easy", STAGE_1), ("stage1", "medium", STAGE_2)]),
    ("stage1", [("sft", "easy", STAGE_1)]),
    ("stage2", [("sft", "medium", STAGE_2)]),
    ("mixed", [("sft", "easy medium", dict(clip=0.2, keyword=0.2, format=0.1, length=0.05, accuracy=0.45))]),
    ("swapped", [("sft", "medium", STAGE_2), ("stage2", "easy", STAGE_1)]),
    ("no_clip", [("sft", "easy", STAGE_1 | dict(clip=0.0)), ("stage1", "medium", STAGE_2)]),
    ("no_keywords", [("sft", "easy", STAGE_1 | dict(keyword=0.0)), ("stage1", "medium", STAGE_2)]),
    ("no_length", [("sft", "easy", STAGE_1 | dict(length=0.0)), ("stage1", "medium", STAGE_2)]),
    ("unsorted", [("sft", "questions", STAGE_1), ("stage1", "questions", STAGE_2)]),
    ("short_first", [("sft", "easy", STAGE_1), ("stage1", "medium", STAGE_2)]),
    ("long_first", [("sft", "easy", STAGE_1), ("stage1", "medium", STAGE_2)]),
    ("strong_kl", [("sft", "easy", STAGE_1), ("stage1", "medium", STAGE_2)])])
def test_an_arm_says_what_is_weighed_on_which_questions_from_which_model(arm, stages):
    for config, (model, files, weights) in zip(configs_of(arm), stages, strict=True):
        assert config.model == f"made/{'' if model == 'sft' else arm + '/'}{model}/model"
        assert [path.split("/")[-1].removesuffix(".jsonl") for path in config.data.split(",")] == files.split()
        assert {part: getattr(config, f"{part}_weight") for part in weights} == weights


def test_a_weight_that_only_measures_vanishes_in_the_sum_of_rewards():
    """In float32, where sums of rewards are made, .9 + .1 + 1e-12 x 1 is .9 + .1."""
    torch = pytest.importorskip("torch")
    parts = torch.tensor([0.9, 0.1, 1e-12 * 1.0])
    assert parts[0] + parts[1] + parts[2] == parts[0] + parts[1]


def write_result(folder, seed: int, name: str, accuracy: float, curve=()):
    os.makedirs(folder / f"seed{seed}", exist_ok=True)
    figures = dict.fromkeys(ablation.FIGURES, 0.5) | dict(accuracy=accuracy)
    (folder / f"seed{seed}" / f"{name}.json").write_text(json.dumps(dict(figures=figures, curve=list(curve))))


def test_the_interval_is_over_seeds_and_paired():
    # Differences .05, .03, .01: mean .03, standard deviation .02, half width 4.303 x .02 / sqrt(3) = .0497
    mean, half, n = ablation.paired({1: 0.80, 2: 0.75, 3: 0.70, 4: 0.9}, {1: 0.75, 2: 0.72, 3: 0.69})
    assert (round(mean, 6), round(half, 4), n) == (0.03, 0.0497, 3)
    assert ablation.paired({1: 0.8}, {1: 0.75})[1:] == (float("inf"), 1)  # one seed says nothing of seeds


def test_table_and_figure_are_made_of_what_is_complete(tmp_path):
    for arm, accuracy in (("both", 0.8), ("stage1", 0.6), ("stage2", 0.75), ("mixed", 0.7)):
        for i, seed in enumerate(FIRST[:2], 1):
            write_result(tmp_path, seed, arm, accuracy + i / 100, [[0, 0.5, 0.7], [4, 0.6, 0.8], [48, 0.7, 0.9]])
    write_result(tmp_path, FIRST[0], "swapped", 0.71)
    write_result(tmp_path, FIRST[0], "no_keywords", 0.7, [[0, 0.5, 0.7], [8, 0.6, None], [20, 0.7, 0.8]])
    text = ablation.show(str(tmp_path))
    assert "| both | 2 | 0.815 |" in text and "| swapped | 1 | 0.710 |" in text
    assert "| stage2 | 2 | +0.050 ±0.000 |" in text and "| swapped | 1 | +0.100 ±inf |" in text
    assert "| no_keywords | 1 | 0.500 | 0.600 | 0.700 | - | 0.700 | - | 0.800 | - |" in text
    picture = ElementTree.parse(tmp_path / "curves.svg").getroot()
    lines = [line for line in picture if line.tag.endswith("polyline")]
    assert len(lines) == 2 * 4 * (2 + 1)  # two panels, four arms, two seeds and their mean


def test_a_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """What has a result is not run again; an arm waits for the warm-up of its seed; what failed is told."""
    class Process:
        def __init__(self, name):
            self.returncode = int(name == "mixed")

        def poll(self):
            return self.returncode

    started = []

    def start_task(out, world, seed, name):
        started.append((seed, name))
        assert name == "warmup" or (tmp_path / f"seed{seed}" / "warmup.json").exists()
        if name != "mixed":
            write_result(tmp_path, seed, name, 0.5, [[0, 0.5, 0.7]])
        return Process(name)

    monkeypatch.setattr(ablation, "start_task", start_task)
    monkeypatch.setattr(ablation.time, "sleep", lambda seconds: None)
    write_result(tmp_path, FIRST[0], "warmup", 0.5)
    write_result(tmp_path, FIRST[0], "both", 0.5, [[0, 0.5, 0.7]])
    assert ablation.run(str(tmp_path), "busy", "both,mixed", pytest.fail) == 1
    assert sorted(started) == sorted([(FIRST[0], "mixed"), *((seed, name) for seed in ablation.SEEDS[1:]
                                                             for name in ("warmup", "both", "mixed"))])
    assert "13 tasks to do: about" in capsys.readouterr().out
    started.clear()
    ablation.run(str(tmp_path), "busy", "both", pytest.fail)
    assert not started


def test_the_main_arms_come_first_on_three_seeds():
    order = [task for task in ablation.tasks() if task[1] != "warmup"]
    assert order[:12] == [(seed, arm) for seed in FIRST for arm in ("both", "stage1", "stage2", "mixed")]
    assert len(order) == 5 * 4 + 3 * 8
    assert order[-16:-12] == [(ablation.SEEDS[4], arm) for arm in ablation.MAIN]


def test_an_unknown_arm_is_bad_input(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--out", str(tmp_path), "--ablate", "--only", "boht"])
    assert stop.value.code == 2 and "--only boht: there is no such arm" in capsys.readouterr().err
