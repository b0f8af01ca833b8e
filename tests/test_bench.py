"""The benchmarks run at tiny sizes, count flops rightly, and draw models of the right sizes."""
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoProcessor

import data
from conftest import picture
from engine import policy as engine_policy
from ranks import HANGS, ROOT, ranks, start_server
from speed import flops, load, shapes

SPEED = os.path.join(ROOT, "speed")
NAMES = ["stage1", "step, equal lengths, 2 updates", "train", "rollout, equal lengths", "rollout, long tail",
         "scaling"]


def run_side(arguments, commands, answers, said):
    """What `python speed/sides.py` does, with these pipes and this file for its standard input, output and error."""
    for number, stream in enumerate((commands, answers, open(said, "w"))):
        os.dup2(stream.fileno(), number)
    sys.stdin = open(0)
    sys.argv = ["sides.py", *arguments]
    sys.path.insert(0, SPEED)
    importlib.import_module("sides").main()


class ForkedSide:
    """Takes the place of subprocess.Popen for speed/sides.py: the same process, without its imports."""

    def __init__(self, command, stderr, **unused):
        self.stderr, self.said = stderr, tempfile.NamedTemporaryFile("r")
        commands, to_commands = multiprocessing.Pipe(duplex=False)
        from_answers, answers = multiprocessing.Pipe(duplex=False)
        self.process = start_server().Process(target=run_side, args=(command[2:], commands, answers, self.said.name))
        self.process.start()
        commands.close(), answers.close()
        self.stdin, self.stdout = open(os.dup(to_commands.fileno()), "w"), open(os.dup(from_answers.fileno()))
        to_commands.close(), from_answers.close()

    def wait(self):
        self.process.join(HANGS)
        self.stderr.write(self.said.read())


def test_step_benchmark_smoke(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    step, out = importlib.import_module("step"), tmp_path / "step.json"
    monkeypatch.setattr(step, "subprocess", SimpleNamespace(Popen=ForkedSide, PIPE=subprocess.PIPE))
    parts = ["stage1", "step", "rollout", "train", "scaling"]
    monkeypatch.setattr(sys, "argv", ["step.py", "--smoke", "--repeats", "1", "--out", str(out), "--only", *parts])
    step.main()
    saved = json.loads(out.read_text())
    stage, step, train, equal, tail, scaling = (saved["results"][name] for name in NAMES)
    tokens = 2 * 2 * 8  # questions x G x tokens; with a prompt of 40 for each of the four responses 192
    assert stage["ours"]["response_tokens"] == tokens and stage["ours"]["planned_training_gb"] > 0
    speeds = stage["ours"]["prompt_and_response_tokens_per_s"], stage["ours"]["tokens_per_s"]
    assert speeds[0] / speeds[1] == pytest.approx(192 / tokens)
    assert {"cuda_graphs False", "cuda_graphs True"} <= set(stage["switches"])
    assert step["ours"]["response_tokens"] == 2 * 2 * 6  # questions x G x tokens
    assert 0 < step["ours"]["update_utilisation"] and saved["machine"]["torch"]
    if importlib.util.find_spec("trl"):
        assert step["ratio"] > 0 and step["trl"]["2"]["response_tokens"] == 2 * 2 * 6
    else:
        assert "pip install trl" in step["trl"] and "ratio" not in step
    assert train["ratio"] > 0
    assert all(rollout[cache]["ratio"] > 0 for rollout in (equal, tail) for cache in ("dynamic", "static"))
    assert all(series["train_last_to_first"] > 0 for series in scaling["series"].values())


def run_load(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["load.py", *argv])
        return load.main()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peaks of memory are read from /proc")
def test_load_benchmark_at_a_tiny_size(tiny_folder, tmp_path, monkeypatch):
    def torchrun(command, **unused):
        """Starts forked ranks instead."""
        ranks(int(command[command.index("--nproc_per_node") + 1]), run_load, *command[command.index("--worker"):])
        return subprocess.CompletedProcess(command, 0)

    out = tmp_path / "load.json"
    monkeypatch.setattr(load, "subprocess", SimpleNamespace(run=torchrun))
    assert run_load("--config", os.path.join(tiny_folder, "config.json"), "--processes", "1", "--ways", "ours",
                    "--file_bytes", "100000", "--export", "--out", str(out)) == 0
    (saved,) = json.loads(out.read_text()).values()
    assert saved["results"][0]["shard"] == 4 * saved["parameters"] and saved["results"][0]["export_seconds"] > 0


def test_forward_flops_are_those_of_the_products_and_of_the_attention_that_runs(tiny_folder, processor, monkeypatch):
    """Torch counts all products but those of attention; those are counted here from the segments it is given."""
    prompt = data.encode_prompt(data.Sample("q", "How many?", (picture(140, 84, 0),)), processor)  # 6 x 10 patches
    lengths, attended, varlen = [5, 9, 1], [], engine_policy.varlen

    def counting(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
        for n, m in zip(cu_q.diff().tolist(), cu_k.diff().tolist()):
            pairs = sum(m - n + 1 + i for i in range(n)) if causal else n * m
            attended.append(4 * pairs * q.shape[1] * q.shape[2])  # two products, two operations each
        return varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)

    monkeypatch.setattr(engine_policy, "varlen", counting)
    policy = engine_policy.Policy.load(tiny_folder, "cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy(engine_policy.pack([(prompt, [[1] * n for n in lengths])]))
    counted = sum(count for operation, count in counter.get_flop_counts()["Global"].items() if "bmm" not in
                  str(operation))  # of rope's angles, which are not counted
    expected = flops.forward_flops(policy.config, len(prompt.input_ids), prompt.grid_thw[0].tolist(), [lengths])
    assert expected == counted + sum(attended)


@pytest.mark.parametrize("name, total", [
    ("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656), ("qwen3-vl-2b", 2_127_532_032),
    ("qwen3-vl-4b", 4_437_815_808), ("qwen3-vl-8b", 8_767_123_696)])
def test_shapes_have_the_parameters_of_the_real_models(name, total):
    assert shapes.parameters(AutoConfig.from_pretrained(f"{ROOT}/speed/configs/{name}.json")) == total


def test_a_shape_with_a_large_vocabulary_has_a_tokenizer_of_that_size(tmp_path):
    with open(f"{ROOT}/speed/configs/qwen2.5-vl-3b.json") as f:
        shape = json.load(f)
    shape |= dict(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1,
                  num_hidden_layers=1, vocab_size=5000, rope_scaling=dict(type="mrope", mrope_section=[8, 12, 12]))
    shape["vision_config"] |= dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=1, out_hidden_size=64)
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    config = shapes.make_model_folder(str(tmp_path / "model"), str(tmp_path / "shape.json"), "cpu")
    tokenizer = AutoProcessor.from_pretrained(str(tmp_path / "model")).tokenizer
    assert len(tokenizer) == config.text_config.vocab_size == 5000
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert tokenizer.decode([401, 300]) == " 1 401 300 300"
