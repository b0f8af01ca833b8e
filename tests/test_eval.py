"""Evaluation: intervals and pass@n by hand, the same grading as training, bad input."""
import json
import os

import pytest

import eval as evaluation
from eval import interval, report


def reply(accuracy, **changes):
    return dict(accuracy=accuracy, format=1.0, finished=True, extracted="1", tokens=10) | changes


def test_the_interval_is_1_96_standard_errors_over_questions():
    """0 0 1 1: mean .5, sample std sqrt(1/3) = .577, error .289, half width .566."""
    assert interval([0.0, 0.0, 1.0, 1.0]) == pytest.approx((0.5, 0.5658), abs=1e-4)
    assert interval([0.3] * 5) == (0.3, 0.0)


def test_responses_of_one_question_are_one_draw():
    """Copying each response four times must not make the interval narrower."""
    rows = [dict(responses=[reply(float(i % 2))]) for i in range(10)]
    copied = [dict(responses=row["responses"] * 4) for row in rows]
    assert report(rows, ["accuracy"])["accuracy"] == report(copied, ["accuracy"])["accuracy"]


def test_pass_at_n_asks_for_one_right_response():
    rows = [dict(responses=[reply(0.0), reply(1.0)]), dict(responses=[reply(0.0), reply(0.0)])]
    figures = report(rows, ["accuracy"])
    assert figures["pass@2"][0] == 0.5 and figures["accuracy"][0] == 0.25


def test_truncation_and_missing_answers_are_reported():
    rows = [dict(responses=[reply(0.0, finished=False, extracted=None), reply(1.0)]), dict(responses=[reply(1.0)] * 2)]
    figures = report(rows, ["accuracy"])
    assert (figures["truncated"][0], figures["no answer"][0], figures["tokens"][0]) == (0.25, 0.25, 10)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(dict(qid=str(i), problem=f"{i}?", answer=str(i))) + "\n" for i in range(5)))
    return str(path)


SMALL = ["--dtype", "float32", "--max_response", "8", "--max_prompt", "200", "--slots", "4"]


def test_every_question_is_asked_and_stored(tiny_folder, questions, tmp_path, capsys):
    out = str(tmp_path / "out")
    argv = ["--model", tiny_folder, "--data", questions, "--out", out, "--group_size", "2", "--temperature", "1",
            *SMALL]
    assert evaluation.main(argv) == 0
    rows = [json.loads(line) for line in open(os.path.join(out, "responses.jsonl"))]
    assert [row["qid"] for row in rows] == list("01234") and all(len(row["responses"]) == 2 for row in rows)
    saved = json.load(open(os.path.join(out, "report.json")))
    assert saved["questions"] == 5 and saved["figures"]["pass@2"]["mean"] == 0 and saved["config"]["temperature"] == 1
    assert "pass@2" in capsys.readouterr().out
    assert evaluation.main(argv) == 0  # again: the same seeds, the same responses
    assert rows == [json.loads(line) for line in open(os.path.join(out, "responses.jsonl"))]


def test_other_pixel_limits_than_in_training_are_noted(tiny_folder, questions, tmp_path, capsys):
    """The tiny folder's processor says 784 to 802,816."""
    argv = ["--model", tiny_folder, "--data", questions, "--out", str(tmp_path / "out"), *SMALL]
    assert evaluation.main([*argv, "--min_pixels", "784"]) == 0
    assert "note:" not in capsys.readouterr().out
    assert evaluation.main([*argv, "--min_pixels", "784", "--max_pixels", "1000"]) == 0
    assert "images of 784 to 802816 pixels, here they have 784 to 1000" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (["--model", ""], "--model is missing"),
    (["--data", ""], "--data is missing"),
    (["--data", "absent.jsonl"], "absent.jsonl"),
    (["--lr", "1"], "unknown flag --lr"),
    (["--group_size", "0"], "--group_size 0"),
    (["--temperature", "-1"], "--temperature -1.0"),
])
def test_bad_input_is_one_line_and_exit_code_2(tiny_folder, questions, tmp_path, capsys, change, message):
    out = str(tmp_path / "out")
    assert evaluation.main(["--model", tiny_folder, "--data", questions, "--out", out, *SMALL, *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not os.path.exists(out)
