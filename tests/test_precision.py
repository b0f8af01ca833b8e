"""Computing in bfloat16: shards, the sampler's whole copy and a checkpoint's recomputation round alike, bit for bit."""
import pytest
import torch

import data
from conftest import picture
from engine.policy import Policy, pack


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
