"""Trackers mirror what the files of a run say; each is tested with the real package, offline, where it is installed."""
import json
import sys
from glob import glob
from importlib.util import find_spec

import pytest

import train
from test_train import questions, stage_1

__all__ = ["questions"]  # a fixture: rows of stage 1


def needs(package):
    return pytest.mark.skipif(not find_spec(package), reason=f"{package} is not installed")


def run_with(tracker, tiny_folder, questions, tmp_path):
    """Two steps of stage 1 with this tracker; returns the lines of metrics.jsonl."""
    flags = ["--tracker", tracker, "--max_steps", "2", "--epochs", "3", "--eval_every", "0", "--eval_data", ""]
    assert train.main(stage_1(tiny_folder, questions, tmp_path / "run", *flags)) == 0
    return [json.loads(line) for line in open(tmp_path / "run" / "stage1" / "metrics.jsonl")]


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_loaded(tiny_folder, questions, tmp_path, capsys,
                                                                               monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("plumbing.flags.find_spec", lambda name: None)
    assert train.main(stage_1(tiny_folder, questions, tmp_path / "run", "--tracker", "trackio")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "pip install trackio" in line and not (tmp_path / "run").exists()


@needs("tensorboard")
def test_tensorboard_has_every_metric(tiny_folder, questions, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = run_with("tensorboard", tiny_folder, questions, tmp_path)
    events = EventAccumulator(str(tmp_path / "run" / "stage1" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(lines[0]) - {"step"}
    assert [point.value for point in events.Scalars("reward/total")] == pytest.approx(
        [line["reward/total"] for line in lines])


@needs("trackio")
def test_trackio_has_every_metric_and_the_responses_to_one_question(tiny_folder, questions, tmp_path, monkeypatch):
    from trackio.sqlite_storage import SQLiteStorage

    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        for name, folder in (("TRACKIO_DIR", "trackio"), ("MEDIA_DIR", "trackio/media")):  # read from it at import
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / folder)
    lines = run_with("trackio", tiny_folder, questions, tmp_path)
    [run] = SQLiteStorage.get_runs("pebr")
    logs = SQLiteStorage.get_logs("pebr", run)
    assert [log["reward/total"] for log in logs] == pytest.approx([line["reward/total"] for line in lines])
    assert "sample" in logs[0] and "sample" not in logs[1]


@needs("wandb")
def test_wandb_has_every_metric_and_the_responses_to_one_question(tiny_folder, questions, tmp_path, monkeypatch):
    for name, value in (("MODE", "offline"), ("DATA_DIR", str(tmp_path)), ("CACHE_DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    lines = run_with("wandb", tiny_folder, questions, tmp_path)
    [folder] = glob(str(tmp_path / "run" / "stage1" / "wandb" / "offline-run-*"))
    [table] = glob(folder + "/files/media/table/*.json")
    with open(glob(folder + "/*.wandb")[0], "rb") as file, open(table) as table:
        sent = file.read()
        assert all(name.encode() in sent for name in set(lines[0]) - {"step"})
        assert json.load(table)["columns"][:2] == ["text", "extracted"]
