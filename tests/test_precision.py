"""Shards: in bfloat16 they round as the sampler's whole copy and a recomputation do; after a step none is gathered."""
import pytest
import torch
from torch.distributed.tensor import DTensor

import data
import train
from conftest import picture
from engine.policy import Policy, pack
from test_train import RL, SMALL, questions

__all__ = ["questions"]  # a fixture


@pytest.fixture(scope="module")
def packed(processor):
    """A picture of 8 x 9 tokens, so that window and full attention see different tables, and two responses."""
    sample = data.Sample("b", "a blue square", (picture(252, 224, 0),), "3")
    return pack([(data.encode_prompt(sample, processor), [[5, 6, 7, 8, 9, 10, 11, 12], [9, 10]])])


def sharded(tiny_folder, processes):
    return Policy.load(tiny_folder, *processes[:1], torch.float32, processes[1], torch.bfloat16)


def test_the_samplers_copy_and_the_shards_give_the_same_logprobs(tiny_folder, processes, packed):
    replica = Policy.load(tiny_folder, processes[0], torch.bfloat16).eval()
    with torch.no_grad():
        ours, whole = sharded(tiny_folder, processes)(packed), replica(packed)
    for a, b in zip(ours, whole, strict=True):  # log-probs, entropies
        assert torch.equal(a, b)


def test_gradient_checkpointing_leaves_the_gradients_bit_for_bit(tiny_folder, processes, packed):
    gradients = []
    for checkpointing in (False, True):
        policy = sharded(tiny_folder, processes)
        policy.prepare_training(False, checkpointing)
        policy(packed)[0].sum().backward()
        gradients.append({name: parameter.grad.full_tensor() for name, parameter in policy.named_parameters()})
    plain, recomputed = gradients
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]), name


def test_after_a_step_neither_the_policy_nor_the_reference_is_gathered(tiny_folder, questions, tmp_path, monkeypatch):
    """A gathered root holds the embeddings and the head whole: 2.1 GiB of the 7B, for the rest of the run."""
    gathered, rl_step = {}, train.rl_step

    def watched(run, *args):
        out = rl_step(run, *args)
        for name, policy in (("policy", run.policy), ("reference", run.ref_policy)):
            gathered[name] = [key for key, weight in policy.named_parameters() if not isinstance(weight, DTensor)]
        return out

    monkeypatch.setattr(train, "rl_step", watched)
    assert train.main(["--stage", "1", "--out", str(tmp_path), "--model", tiny_folder, "--data", questions, *SMALL,
                       *RL]) == 0
    assert gathered == {"policy": [], "reference": []}
