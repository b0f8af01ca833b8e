"""The demo at a tiny size: every stage runs through train.py and eval.py, and the summary has the promised shape."""
import json
import os
import signal
from unittest import mock

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import data
import demo
import train
from ranks import ranks


SIZES = dict(captions=80, warmup=64, questions=12, evaluation=6)
STEPS = dict(clip=2, base=2, sft=2, stage1=1, stage2=1)


def tiny_demo(out: str, family: str):
    """An untrained model is right about nothing, so the questions go into the buckets in turn."""
    write_buckets = data.write_buckets

    def in_turn(folder, samples, correct, group_size):
        counts = {sample.qid: (group_size, 1, 0)[i % 3] for i, sample in enumerate(samples)}
        return write_buckets(folder, samples, counts, group_size)

    short = ["--max_response=40"]
    with mock.patch.object(data, "write_buckets", in_turn), mock.patch.multiple(
            demo, SHARED=[*demo.SHARED, *short], TRAINING=[*demo.TRAINING, *short],
            REINFORCED=[*demo.REINFORCED, *short, "--questions_per_rollout=8", "--questions_per_update=2"]):
        demo.run(out, 0, demo.World(sizes=SIZES, steps=STEPS), family=family)


@pytest.mark.parametrize("processes, family", [(1, "qwen2_5_vl"), (2, "qwen3_vl")])
def test_the_five_stages_run_and_summarise(processes, family, tmp_path):
    """On one process or two there is one summary, and one process prints."""
    out = str(tmp_path / "demo")
    first, *others = ranks(processes, tiny_demo, out, family)
    summary = json.load(open(f"{out}/summary.json"))
    assert list(summary["phases"]) == ["sft", "stage1", "stage2"]
    for name, figures in summary["phases"].items():
        assert set(figures) == set(demo.FIGURES) and summary["seconds"][name] > 0
        for mean, half_width in figures.values():
            assert half_width >= 0 and mean <= 1
        assert os.path.exists(f"{out}/{name}/model/model.safetensors")
    for text in ("after stage 2", "caption_exact", f"{processes} process(es)", f"{out}/view.html"):
        assert text in first.stdout
    assert not any(other.stdout for other in others) and os.path.getsize(f"{out}/view.html") > 10_000


def test_a_stage_that_fails_ends_the_demo_with_its_exit_code(tmp_path):
    with pytest.raises(SystemExit) as stop:
        demo.call(train, "--stage", "sft", "--model", tmp_path / "absent", "--data", "absent.jsonl", "--out", tmp_path)
    assert stop.value.code == 2


def test_a_quiet_demo_says_little_and_its_log_has_everything(tmp_path, capsys):
    """A failing stage's line is seen all the same, since errors are not redirected."""
    log = tmp_path / "log.txt"
    with pytest.raises(SystemExit) as stop, demo.log_to(str(log)) as say:
        say("warm-up  9 s")
        demo.call(train, "--stage", "sft", "--model", tmp_path / "absent", "--data", "absent.jsonl", "--out", tmp_path)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "warm-up  9 s\n" and "absent" in err and len(err.splitlines()) == 1
    assert "warm-up  9 s\n" in log.read_text() and "$ python train.py --stage sft" in log.read_text()


def test_a_stages_line_has_the_means_of_its_first_and_its_last_three_steps(tmp_path):
    # (0 + 1 + 2) / 3 and (7 + 8 + 9) / 3
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"reward/clip": i}) + "\n" for i in range(10)))
    assert demo.learned(str(tmp_path), ("reward/clip",)) == "clip 1.00 -> 8.00"
    for i, name in enumerate(("easy", "medium", "hard")):
        (tmp_path / f"{name}.jsonl").write_text("{}\n" * i)
    assert demo.learned(str(tmp_path), ()) == "0 easy, 1 medium, 2 hard"


@pytest.mark.parametrize("end, code", [
    (None, 0), (ChildFailedError("demo.py", {0: ProcessFailure(0, 7, 2, "")}), 2),
    (SignalException("stopped", signal.SIGINT), 130)], ids=["well", "bad input", "ctrl-c"])
@pytest.mark.parametrize("cores, processes", [(2, 2), (64, 4)])
def test_started_by_hand_the_demo_starts_a_process_for_each_of_up_to_four_cores(cores, processes, end, code,
                                                                               tmp_path, monkeypatch):
    launched = mock.Mock(side_effect=end)
    monkeypatch.setattr(demo.torchrun, "main", launched)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(demo.torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--seed", "3"]) == code
    [argv] = launched.call_args.args
    assert argv == ["--standalone", "--nproc_per_node", str(processes), demo.__file__, "--seed", "3"]
