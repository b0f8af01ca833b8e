"""The doctor: each symptom is named once, with its number, and a healthy run hears nothing."""
import types

import pytest

from plumbing.doctor import WINDOW, Doctor
from plumbing.log import Log
from plumbing.processes import progress

CONFIG = dict(stage="1", lr=1e-6, kl_coef=0.01, clip_weight=0.4, keyword_weight=0.4, format_weight=0.1,
              length_weight=0.1, accuracy_weight=0.0)
# Of a run that goes well: reward parts differ within groups, little is clipped, nothing is cut off.
HEALTHY = {"adv/zero_std_groups": 0.1, "reward/total": 0.7, "reward/clip": 0.6, "reward/clip_std": 0.2,
           "reward/keyword": 0.7, "reward/keyword_std": 0.2, "reward/format": 1.0, "reward/format_std": 0.0,
           "reward/length": 1.0, "reward/length_std": 0.0, "reward/accuracy": 0.5, "reward/accuracy_std": 0.4,
           "response/truncated": 0.0, "policy/kl": 0.02, "policy/sampler_gap": 0.001, "policy/entropy": 0.1,
           "opt/loss": 0.001}
STAGE_2 = dict(stage="2", clip_weight=0.0, keyword_weight=0.0, length_weight=0.0, accuracy_weight=0.9)


def doctor_after(changes: dict, settings: dict, steps: int = 3 * WINDOW) -> tuple[Doctor, list[str]]:
    """The doctor of a run whose metrics turn from HEALTHY to these changes after five steps, and what it has said."""
    doctor, said = Doctor(types.SimpleNamespace(**CONFIG | settings)), []
    for step in range(steps):
        said += doctor.look(HEALTHY | (changes if step >= WINDOW // 2 else {}))
    return doctor, said


@pytest.mark.parametrize("changes, settings, word, number", [
    ({"adv/zero_std_groups": 0.9}, {}, "medium.jsonl", "90%"),
    ({"reward/clip_std": 0.0, "reward/clip": 1.0}, {}, "--clip_target", "1.000"),
    ({"reward/keyword_std": 0.0, "reward/keyword": 0.0}, {}, "key_words", "0.000"),
    ({"reward/accuracy_std": 0.0, "reward/accuracy": 0.0}, STAGE_2, "answers", "0.000"),
    ({"response/truncated": 0.4}, {}, "--max_response", "40%"),
    ({"policy/kl": 2.0}, {}, "--kl_coef", "2"),
    ({"policy/sampler_gap": 0.2}, {}, "precision", "0.2"),
    ({"policy/entropy": 0.0}, {}, "repeats itself", "0.1 to 0"),
    ({"policy/kl": 0.0}, {}, "--lr", "policy/kl 0"),
])
def test_a_symptom_is_named_once_with_its_number_and_what_to_try(changes, settings, word, number):
    doctor, said = doctor_after(changes, settings)
    [symptom] = [name for name, shows, line in doctor.symptoms() if shows and word in line and number in line]
    assert word in doctor.said[symptom] and said == list(doctor.said.values())
    assert all("\n" not in line for line in said)


def test_a_reward_that_rises_while_held_out_accuracy_falls_is_named():
    doctor = Doctor(types.SimpleNamespace(**CONFIG))
    said = []
    for step in range(20):
        held_out = {"eval/accuracy": 0.6 - 0.01 * step} if step % 5 == 0 else {}
        said += doctor.look(HEALTHY | {"reward/total": 0.5 + 0.01 * step} | held_out)
    assert len(said) == 1 and "0.60 to 0.55" in said[0]  # once ten steps are there: steps 0 and 5 had one


def test_a_stage_says_what_the_doctor_says_once_and_at_its_end_again_also_of_steps_before_a_resume(tmp_path, capsys):
    config = types.SimpleNamespace(**CONFIG, tracker="none")
    for first in (0, WINDOW):  # the second run finds the first one's metrics
        (tmp_path / "metrics.jsonl").touch()
        log = Log(config, str(tmp_path), progress(range(first, first + WINDOW), "stage 1", 2 * WINDOW, first))
        for step in range(first, first + WINDOW):
            log.step(step, HEALTHY | {"response/truncated": 0.4, "policy/kl": float("nan")}, [])
        log.end()
        lines = [line for line in capsys.readouterr().out.splitlines() if "response/truncated" in line]
        assert len(lines) == (2 if first == 0 else 1) and lines[-1].startswith("doctor: ")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 * WINDOW


@pytest.mark.parametrize("settings", [{}, STAGE_2])
def test_a_healthy_run_hears_nothing(settings):
    assert doctor_after({}, settings)[1] == []


def test_a_warm_up_that_becomes_sure_of_itself_hears_nothing():
    doctor = Doctor(types.SimpleNamespace(**CONFIG | dict(stage="sft")))
    assert not any(doctor.look({"opt/loss": 6 / step, "policy/entropy": 6 / step**2}) for step in range(1, 99))


def test_a_young_run_hears_nothing():
    assert doctor_after({"policy/kl": 2.0}, {}, steps=WINDOW - 1)[1] == []
