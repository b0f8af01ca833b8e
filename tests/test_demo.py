"""The demo at a tiny size: every stage runs through train.py and eval.py, and the summary has the promised shape."""
import json
import os

import pytest

import data
import demo


SIZES = dict(captions=80, warmup=64, questions=12, evaluation=6)
STEPS = dict(clip=2, base=2, sft=2, stage1=1, stage2=1)


def test_the_five_stages_run_and_summarise(tmp_path, monkeypatch, capsys):
    """An untrained model is right about nothing, so the questions go into the buckets in turn."""
    write_buckets = data.write_buckets

    def in_turn(folder, samples, correct, group_size):
        counts = {sample.qid: (group_size, 1, 0)[i % 3] for i, sample in enumerate(samples)}
        return write_buckets(folder, samples, counts, group_size)

    monkeypatch.setattr(data, "write_buckets", in_turn)
    monkeypatch.setattr(demo, "SHARED", [*demo.SHARED, "--max_response=40"])
    monkeypatch.setattr(demo, "TRAINING", [*demo.TRAINING, "--max_response=40"])
    monkeypatch.setattr(demo, "REINFORCED", [*demo.REINFORCED, "--max_response=40", "--questions_per_rollout=8",
                                             "--questions_per_update=2"])
    out = str(tmp_path / "demo")
    summary = demo.run(out, 0, SIZES, STEPS)
    assert json.load(open(f"{out}/summary.json")) == summary
    assert list(summary["phases"]) == ["sft", "stage1", "stage2"]
    for name, figures in summary["phases"].items():
        assert set(figures) == {*demo.FIGURES, "intervals"} and summary["seconds"][name] > 0
        for figure in demo.FIGURES:
            low, high = figures["intervals"][figure]
            assert low <= figures[figure] <= high
        assert os.path.exists(f"{out}/{name}/model/model.safetensors")
    table = capsys.readouterr().out
    assert "after stage 2" in table and "caption_exact" in table and "peak memory" in table


def test_a_stage_that_fails_ends_the_demo_with_its_exit_code(tmp_path):
    with pytest.raises(SystemExit) as stop:
        demo.stage("sft", str(tmp_path), 0, 1, "--model", str(tmp_path / "absent"), "--data", "absent.jsonl")
    assert stop.value.code == 2
