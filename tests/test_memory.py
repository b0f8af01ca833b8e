"""What saves memory or meets its end: checkpointing, freezing, advice."""
import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from engine import plan, sampler
from plumbing.processes import stop_processes
from ranks import start_server
from test_train import compare_metrics, largest_difference, metrics, one_process, questions, stage_1, weights
from train import read_config


TWO_STEPS = ["--questions_per_rollout", "3", "--max_steps", "2"]  # of one update each
__all__ = ["one_process", "questions"]  # fixtures: a run of stage 1 on one process, and its data


def run_stage(tiny_folder, questions, out, *flags):
    assert train.main(stage_1(tiny_folder, questions, out, *flags)) == 0
    return os.path.join(str(out), "stage1")


# ------------------------------------------------------------------ switches that change nothing, or only what they say


def test_checkpointing_leaves_the_result_bit_for_bit(one_process, tiny_folder, questions, tmp_path):
    ours = run_stage(tiny_folder, questions, tmp_path, "--gradient_checkpointing", "True")
    assert largest_difference(weights(ours), weights(one_process)) == 0
    compare_metrics(ours, one_process)


def test_a_frozen_vision_tower_stays_as_it_was(one_process, tiny_folder, questions, tmp_path):
    ours = weights(run_stage(tiny_folder, questions, tmp_path, "--freeze_vision", "True"))
    before = train.Policy.load(tiny_folder, "cpu").state_dict()
    for name, tensor in ours.items():
        if name.startswith("visual."):
            assert torch.equal(tensor, before["model." + name]), name
    first, reference = (metrics(folder)[0] for folder in (tmp_path / "stage1", one_process))
    assert first["reward/total"] == reference["reward/total"]  # the same rollout
    assert largest_difference({n: t for n, t in ours.items() if not n.startswith("visual.")},
                              {n: t for n, t in weights(one_process).items() if not n.startswith("visual.")}) < 6e-3


# ----------------------------------------------------------------------------------------- when memory ends


def run_out(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory (as if)")


def test_out_of_memory_while_models_load_is_one_line(tiny_folder, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_models", run_out)
    assert train.main(stage_1(tiny_folder, questions, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "out of memory in the loading of the models" in error


@pytest.mark.parametrize("module, name, phase, advice", [
    (sampler, "Slots", "rollout of step 1", "lower --slots"),
    (train, "update", "update of step 1", "lower --token_budget"),
    (torch.optim.AdamW, "step", "update of step 1", "or use more GPUs")])
def test_out_of_memory_is_one_line_of_advice_and_the_checkpoint_goes_on(
        one_process, tiny_folder, questions, tmp_path, monkeypatch, capsys, module, name, phase, advice):
    """It comes in step 1, whose predecessor is saved; the same command then ends as an undisturbed run does."""
    flags = [*TWO_STEPS, "--save_every", "1"]
    calls, real, last = [], getattr(module, name), {"Slots": 2, "update": 1, "step": 1}[name]  # calls in step 0

    def sometimes(*args, **kwargs):
        calls.append(name)
        return run_out() if len(calls) == last + 1 else real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, sometimes)
        assert train.main(stage_1(tiny_folder, questions, tmp_path, *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: rank 0 is out of memory in the {phase}: ") and error.count("\n") == 1
    assert advice in error and "the same command goes on from the last checkpoint" in error
    ours = run_stage(tiny_folder, questions, tmp_path, *flags, "--token_budget", "300")  # another one is no other run
    assert [line["step"] for line in metrics(ours)] == [0, 1] and os.path.exists(os.path.join(ours, "model"))


def fail_once_on_rank_1(argv):
    """Rank 1 of the first attempt dies in the second update of step 1."""
    update, calls = train.update, []

    def update_or_die(*args):
        calls.append(args)
        if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], len(calls)) == ("0", "1", 5):
            os._exit(9)
        return update(*args)

    train.update = update_or_die
    assert stop_processes(train.main(argv)) == 0


def test_torchrun_restarts_a_run_from_its_own_checkpoint_although_it_was_told_to_begin_anew(tiny_folder, questions,
                                                                                            tmp_path):
    """The second attempt, told --restart as well, goes on from step 1. The agent is the one that torchrun runs."""
    flags = ["--epochs", "2", "--save_every", "1", "--restart"]
    one = run_stage(tiny_folder, questions, tmp_path / "one", *flags)
    old = os.path.join(run_stage(tiny_folder, questions, tmp_path / "two", "--lr", "1e-4"), "metrics.jsonl")
    before = open(old).read()
    start_server()
    settings = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, run_id="restart",
                            rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver",
                            logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path / "logs"), redirects=Std.ALL))
    agent = elastic_launch(settings, fail_once_on_rank_1)
    with ThreadPoolExecutor(1) as thread, mock.patch.dict(os.environ):  # in the main thread it would keep the signals
        thread.submit(agent, stage_1(tiny_folder, questions, tmp_path / "two", *flags)).result()
    said = "".join(path.read_text() for path in (tmp_path / "logs").rglob("stdout.log"))
    assert said.count("step 1/2 ") == said.count("step 2/2 ") == 1  # the first step was not done again
    two = os.path.join(str(tmp_path / "two"), "stage1")
    assert largest_difference(weights(two), weights(one)) < 2e-4
    compare_metrics(two, one)
    assert open(os.path.join(two, "metrics.jsonl")).read() != before
    assert open(os.path.join(two + ".before-restart", "metrics.jsonl")).read() == before


def test_slots_are_chosen_where_none_are_asked_for(tiny_folder, questions, tmp_path):
    config = read_config(stage_1(tiny_folder, questions, tmp_path, "--slots", "0"))
    assert plan.fit_plan(config, tiny_folder, torch.device("cpu")).slots == 128
    assert json.dumps(dataclasses.asdict(config))  # and 0 is what config.json keeps
