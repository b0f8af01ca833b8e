"""FSDP2 on eight ranks with layers of 3B and 7B: who holds what, what is gathered, and that the plan counts the same.

No weight takes memory and nothing is sent: tensors are of the meta device or FakeTensors, which have shapes and no
numbers, and the process group is torch's fake one, in which a process may be any rank. It would be the only group of
the tests' process, so each model has a process of its own. Layers are alike, so there are few: the shapes are real.
"""
import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import engine.policy
from engine.plan import always_bytes, shape_of
from engine.policy import Policy
from engine.weights import model_config
from ranks import ROOT, ranks
from train import Config

W = 8
LAYERS, BLOCKS = 4, 8  # of the decoder and of the vision tower; the last block attends to all, the others in windows


def load(path: str, device: str, mesh) -> Policy:
    """The shards of this rank as a run loads them, but that no file of weights is read."""
    with mock.patch.multiple(engine.policy, find_model=str, model_config=model_config, read_weights=lambda *_: None,
                             other_files=lambda _: {}):
        return Policy.load(path, device, torch.float32, mesh, torch.bfloat16)


def gathered(policy) -> list[dict]:
    """Each FSDP unit gathered alone: names, bytes, dtypes of the parameters that are whole then; and its settings."""
    units = []
    for unit in policy.modules():
        if isinstance(unit, FSDPModule):
            settings = unit._get_fsdp_state()._mp_policy
            unit.unshard()
            whole = {name: x for name, x in policy.named_parameters() if not isinstance(x, DTensor)}
            unit.reshard()
            units.append(dict(names=list(whole), bytes=sum(x.nbytes for x in whole.values()),
                              dtypes=sorted({str(x.dtype) for x in whole.values()}),
                              reduced=str(settings.reduce_dtype), cast_inputs=settings.cast_forward_inputs))
    assert all(isinstance(x, DTensor) for x in policy.parameters())
    return units


def describe(path: str):
    """In a process of its own: print what each rank holds of a model, and what a rank gathers."""
    local, found = [], {}
    for rank in range(W):
        dist.init_process_group("fake", rank=rank, world_size=W, store=FakeStore())
        mesh = init_device_mesh("cpu", (W,))
        policy = load(path, "meta", mesh)
        local.append({name: list(x.to_local().shape) for name, x in policy.named_parameters()})
        if rank == W - 1:
            with FakeTensorMode(allow_non_fake_inputs=True):
                policy = load(path, "cpu", mesh)
                found = dict(shapes={name: list(x.shape) for name, x in policy.named_parameters()},
                             dtypes=sorted({str(x.dtype) for x in policy.parameters()}), units=gathered(policy),
                             tied=policy.lm_head.weight is policy.get_input_embeddings().weight)
        dist.destroy_process_group()
    print(json.dumps(found | dict(local=local)))


@pytest.fixture(scope="module", params=["3b", "7b"])
def model(request, tmp_path_factory):
    """A model's name, what the plan knows of it (shape), and what `describe` has found."""
    with open(os.path.join(ROOT, "speed", "configs", f"qwen2.5-vl-{request.param}.json")) as file:
        config = json.load(file) | dict(num_hidden_layers=LAYERS)
    config["vision_config"]["depth"] = BLOCKS
    path = tmp_path_factory.mktemp(request.param) / "config.json"
    path.write_text(json.dumps(config))
    [done] = ranks(1, describe, str(path))
    return SimpleNamespace(name=request.param, shape=shape_of(str(path)), **json.loads(done.stdout.splitlines()[-1]))


def test_every_parameter_lies_in_one_unit_and_the_units_are_blocks_layers_and_the_rest(model):
    assert len(model.units) == BLOCKS + LAYERS + 1
    names = [name for unit in model.units for name in unit["names"]]
    assert len(names) == len(set(names)) and set(names) == set(model.shapes)
    inner = [{name.split(".")[3] for name in unit["names"]} for unit in model.units[1:]]  # model.visual.blocks.7.norm1
    assert all(len(numbers) == 1 for numbers in inner)
    (head,) = [unit for unit in model.units if "model.language_model.embed_tokens.weight" in unit["names"]]
    assert head is model.units[0]
    assert model.tied == (model.name == "3b") == ("lm_head.weight" not in head["names"])  # one of two names counts


def test_shards_and_sums_of_gradients_are_float32_and_what_is_gathered_is_bfloat16(model):
    assert model.dtypes == ["torch.float32"]
    for unit in model.units:
        assert (unit["dtypes"], unit["reduced"], unit["cast_inputs"]) == (["torch.bfloat16"], "torch.float32", False)


def test_a_rank_holds_its_eighth_of_the_rows_and_the_last_one_what_is_left(model):
    """n rows: ranks take ceil(n / 8) until none are left. The vision MLP's 3,420 are 7 x 428 + 424."""
    for name, (n, *rest) in model.shapes.items():
        share = -(-n // W)
        rows = [max(0, min(share, n - rank * share)) for rank in range(W)]
        assert sum(rows) == n and [shapes[name] for shapes in model.local] == [[r, *rest] for r in rows], name
    uneven = "model.visual.blocks.0.mlp.gate_proj.weight"
    assert [shapes[uneven][0] for shapes in model.local] == [428] * 7 + [424]


def numbers(shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_the_plan_counts_what_is_held_and_what_is_gathered(model):
    """Gathered weights exactly; the fullest rank has at most .1 % more than the eighth that is planned."""
    config, shape = Config(stage="1"), model.shape
    b, sizes = getattr(torch, config.dtype).itemsize, [unit["bytes"] for unit in model.units]
    assert sorted(sizes) == sorted([b * shape.root] + [b * shape.block] * BLOCKS + [b * shape.layer] * LAYERS)
    assert max(sizes) == sizes[0] == b * shape.root
    held, planned = [4 * numbers(shapes) for shapes in model.local], always_bytes(config, shape, W)
    assert sum(held) == 4 * shape.total == 4 * numbers(model.shapes)
    assert planned["master weights, fp32"] <= max(held) <= 1.001 * planned["master weights, fp32"]
