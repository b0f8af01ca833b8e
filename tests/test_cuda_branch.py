"""The GPU's branch without a GPU: what it computes is what the CPU's does, and what a GPU would refuse is refused."""
import os

import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels")

import torch

import train
from data import seed_of
from engine import sampler
from engine import policy as policies
from engine.policy import Policy, pack
from engine.sampler import Decoder, generate
from kernels import decode, grpo, logprob, sample
from pretend_cuda import GPU, Cuda, on_cpu, pretend_cuda
from test_gpu import check_attention
from test_train import compare_metrics, largest_difference, metrics, questions, stage_1, weights

__all__ = ["questions"]  # a fixture: rows of stage 1


@pytest.fixture
def waits(monkeypatch):
    """A pretended GPU whose bursts are short, because Triton's interpreter takes milliseconds for each program."""
    monkeypatch.setattr(sampler, "BURST", 2)
    monkeypatch.setattr(sample, "BLOCK", 512)
    with pretend_cuda(decode, grpo, logprob, sample) as waits:
        yield waits


# ----------------------------------------------------------------------------------- the pretended GPU itself


def test_its_tensors_say_where_they_are_and_share_memory_with_the_cpu(waits):
    x = torch.zeros(2, 3, device="cuda")
    assert x.is_cuda and x.device == GPU and x.new_ones(2).is_cuda and torch.ones_like(x).is_cuda
    x[0] = torch.arange(3, device=GPU)
    assert x.sum(1).tolist() == [3, 0] and on_cpu(x).device.type == x.cpu().device.type == "cpu"
    weight = torch.nn.Parameter(x.clone())
    (2 * weight).sum().backward()
    assert weight.grad.is_cuda and weight.grad.tolist() == [[2.0] * 3] * 2
    assert (x * torch.tensor(2.0)).is_cuda  # a number on the CPU may meet it


def vector(n=3, dtype=torch.float32, device=GPU):
    return torch.ones(n, dtype=dtype, device=device)


def matrix(dtype=torch.float32, device=GPU):
    return torch.ones(3, 3, dtype=dtype, device=device)


REFUSED = [
    ("aten.add.Tensor: a CPU tensor", lambda: vector() + vector(device="cpu")),
    ("aten.index.Tensor: a CPU tensor", lambda: vector()[torch.tensor([0, 2])]),
    ("aten.index.Tensor: a CPU tensor", lambda: vector(device="cpu")[torch.tensor([0, 2], device=GPU)]),
    ("aten.index_put_.default: a CPU tensor", lambda: vector().index_put_((torch.tensor([0]),), vector(1))),
    ("aten.cat.default: a CPU tensor", lambda: torch.cat([vector(), vector(device="cpu")])),
    ("aten.mm.out: a CPU tensor", lambda: torch.mm(matrix(), matrix(), out=matrix(device="cpu"))),
    ("aten.mm.default: mixed dtypes", lambda: matrix() @ matrix(torch.bfloat16)),
    ("aten.mm.dtype_out: mixed dtypes", lambda: torch.mm(matrix(torch.bfloat16), matrix(), out_dtype=torch.float32,
                                                         out=matrix())),
    ("aten.mm.dtype_out: mixed dtypes", lambda: torch.mm(matrix(torch.bfloat16), matrix(torch.bfloat16),
                                                         out_dtype=torch.float32, out=matrix(torch.bfloat16))),
    ("aten.mm.dtype_out: no product of torch.float32 gives torch.float64", lambda: torch.mm(
        matrix(), matrix(), out_dtype=torch.float64, out=matrix(torch.float64))),
    ("_grpo_kernel: a CPU tensor", lambda: grpo.grpo_loss(*[vector()] * 4, vector(device="cpu"), 0.2, 0.3, 3.0, 0.01)),
]


@pytest.mark.parametrize("message, operation", REFUSED)
def test_a_mixture_is_refused_and_the_operation_named(waits, message, operation):
    with pytest.raises(RuntimeError, match=f"^{message}"):
        operation()


def varlen(change):
    """Three segments of 4, 1 and 3 queries over 5, 1 and 6 keys, with one thing changed."""
    from torch.nn.attention.varlen import varlen_attn

    q, k = (torch.ones(n, heads, 8, dtype=torch.bfloat16, device=GPU) for n, heads in ((8, 4), (12, 2)))
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=GPU) for ends in ([0, 4, 5, 8], [0, 5, 6, 12]))
    arguments = dict(query=q, key=k, value=k.clone(), cu_seq_q=cu_q, cu_seq_k=cu_k, max_q=4, max_k=6, scale=1.0)
    return varlen_attn(**arguments | {name: function(arguments[name]) for name, function in change.items()})


@pytest.mark.parametrize("rule, change", [
    ("16 bits", dict(query=Cuda.float)),
    ("16 bits", dict(value=Cuda.half)),
    ("a contiguous last axis", dict(query=lambda q: q.transpose(1, 2).contiguous().transpose(1, 2))),
    ("a head size", dict(query=lambda q: q[..., :7].contiguous(), key=lambda k: k[..., :7].contiguous(),
                         value=lambda v: v[..., :7].contiguous())),
    ("query heads a multiple", dict(query=lambda q: q[:, :3])),
    ("cu_seq contiguous, of int32", dict(cu_seq_q=Cuda.long)),
    ("as many segments", dict(cu_seq_q=lambda cu: cu[1:])),
    ("max_k no less than the longest", dict(max_k=lambda most: most - 1)),
    ("cu_seq_k from 0 up to 12", dict(cu_seq_k=lambda cu: cu - 1)),
])
def test_what_flash_attention_would_not_take_is_refused(waits, rule, change):
    varlen({})
    with pytest.raises(RuntimeError, match=f"^varlen_attn: wants .*{rule}"):
        varlen(change)


# -------------------------------------------------------------------- what runs there equals what a CPU computes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, D, causal", [(16, 2, 128, True), (28, 4, 128, True), (16, 16, 80, False)],
                         ids=["3B", "7B", "vision"])
def test_attention_is_that_of_float64(waits, heads, kv_heads, D, causal, dtype):
    """Output and gradients. A prompt of 5 tokens and responses of 3 and 1, or windows of 5, 3 and 1 patches."""
    prompt, rest = list(range(5)), ([5, 6, 7], [8])
    segments = [(prompt, prompt), *((own, prompt + own if causal else own) for own in rest)]
    check_attention(heads, kv_heads, D, 9, segments, causal, GPU, dtype)


def score(tiny_folder, prompts, device, dtype, checkpointing=False):
    """Log-probs of 6 tokens to each of three prompts, and the gradient of their sum in all parameters."""
    policy = Policy.load(tiny_folder, device, dtype)
    policy.prepare_training(False, checkpointing)
    logprobs, _ = policy(pack([(prompt, [[5, 6, 7, 8], [9, 10]]) for prompt in prompts[1:4]], device))
    logprobs.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert all(isinstance(x, Cuda) == (device == GPU) for x in (logprobs, *gradients, *policy.buffers()))
    return on_cpu(logprobs).detach(), torch.cat([on_cpu(gradient).flatten().float() for gradient in gradients])


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policy_in_float32_is_that_of_a_cpu(tiny_folder, prompts, waits, checkpointing):
    ours, exact = (score(tiny_folder, prompts, device, torch.float32, checkpointing) for device in (GPU, "cpu"))
    assert max(map(error, ours, exact)) <= 1e-5


def test_the_policy_in_bfloat16_is_as_near_to_float32_as_on_a_cpu(tiny_folder, prompts, waits):
    ours, theirs = (score(tiny_folder, prompts, device, torch.bfloat16) for device in (GPU, "cpu"))
    exact = score(tiny_folder, prompts, "cpu", torch.float32)
    for found, other, expected in zip(ours, theirs, exact):
        assert error(found, expected) <= 1.5 * error(other, expected)


@pytest.mark.parametrize("dtype, temperature, top_p, bound", [
    (torch.float32, 0.0, 1.0, 5e-5), (torch.float32, 1.2, 0.9, 5e-5), (torch.bfloat16, 1.2, 1.0, 0.1)])
def test_captured_bursts_draw_what_eager_ones_draw_and_log_what_a_cpu_scores(
        tiny_folder, prompts, processor, waits, dtype, temperature, top_p, bound):
    """Two responses of 3 tokens through one slot, so that a prompt is read between two replays."""
    replica, seeds = Policy.load(tiny_folder, GPU, dtype).eval(), [seed_of(1, 0), seed_of(1, 1)]
    captured, eager = (generate(replica, prompts[:2], seeds, 1, 3, temperature, top_p, 1, len(processor.tokenizer),
                                graphs) for graphs in (True, False))
    assert captured == eager
    packed = pack([(prompt, [response.ids for response in reply]) for prompt, reply in zip(prompts, captured)])
    with torch.no_grad():
        logprobs, _ = Policy.load(tiny_folder, "cpu", dtype).eval()(packed, temperature or 1.0)
    drawn = torch.tensor([x for reply in captured for response in reply for x in response.logprobs])
    assert float((drawn - logprobs).abs().mean()) <= bound


# ------------------------------------------------------------------------------------ a whole stage, from main


@pytest.fixture
def one_step(tiny_folder, questions, tmp_path, monkeypatch):
    """one_step(device, flags) runs one step of stage 1 with two updates; returns its folder."""
    small = ["--group_size", "2", "--questions_per_rollout", "2", "--questions_per_update", "1", "--max_steps", "1",
             "--max_response", "5", "--slots", "2", "--top_p", "1", "--token_budget", "250", "--eval_every", "0",
             "--eval_data", "", "--gradient_checkpointing", "True"]
    monkeypatch.setattr(Policy, "reshard", list, raising=False)  # a policy that is whole has nothing to free
    monkeypatch.setattr(policies, "backend", str)  # it looks for a compiler, which the interpreter does not need

    def run(device, *flags):
        train.start_processes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "start_processes", lambda: (device, None))
            assert train.main(stage_1(tiny_folder, questions, tmp_path / device.type, *small, *flags)) == 0
        return os.path.join(tmp_path, device.type, "stage1")

    return run


@pytest.mark.parametrize("flags", [[], ["--freeze_vision", "True"], ["--lora_rank", "4", "--lora_vision", "True"]],
                         ids=str)
def test_a_step_of_stage_1_is_that_of_a_cpu(waits, one_step, flags):
    """The same tokens, rewards and statistics, and the same weights after two updates."""
    ours, theirs = (one_step(device, *flags) for device in (GPU, torch.device("cpu")))
    compare_metrics(ours, theirs)
    said, expected = (open(os.path.join(folder, "rollouts", "step_000000.jsonl")).read() for folder in (ours, theirs))
    assert said == expected
    assert largest_difference(weights(ours), weights(theirs)) <= 2e-4


def test_a_step_in_bfloat16_ends_with_finite_numbers(waits, one_step):
    """The sampler's copy and the reference are in bfloat16, the policy, which is no shard, in float32."""
    (step,) = metrics(one_step(GPU, "--dtype", "bfloat16"))
    assert step["opt/skipped"] == 0 and 0 < step["policy/sampler_gap"] < 0.2 and 0 <= step["policy/kl"] < 2


# --------------------------------------------------------------------------------------------- planted faults


def plant(monkeypatch, owner, name, fault):
    """owner.name is followed by fault(self or first argument, its result), whose result is then the result."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda first, *rest: fault(first, real(first, *rest)))


def forward(tiny_folder, prompts, dtype=torch.bfloat16):
    return Policy.load(tiny_folder, GPU, dtype)(policies.pack([(prompt, [[5, 6], [9]]) for prompt in prompts], GPU))


@pytest.mark.parametrize("message, fault", [
    ("aten.index.Tensor: a CPU tensor", lambda packed: packed._replace(predictors=packed.predictors.to("cpu"))),
    ("aten.embedding.default: a CPU tensor", lambda packed: packed._replace(input_ids=packed.input_ids.cpu())),
    ("varlen_attn: wants cu_seq contiguous, of int32", lambda packed: packed._replace(
        layout=packed.layout._replace(cu_k=packed.layout.cu_k.long()))),
    ("varlen_attn: wants max_k no less", lambda packed: packed._replace(
        layout=packed.layout._replace(max_k=packed.layout.max_k - 1))),
], ids=["an index on the CPU", "ids on the CPU", "int64 ends", "a limit that is too small"])
def test_a_fault_in_packing_is_found(tiny_folder, prompts, waits, monkeypatch, message, fault):
    forward(tiny_folder, prompts)
    plant(monkeypatch, policies, "pack", lambda groups, packed: fault(packed))
    with pytest.raises(RuntimeError, match=f"^{message}"):
        forward(tiny_folder, prompts)


def test_embeddings_of_a_wrong_dtype_are_found(tiny_folder, prompts, waits, monkeypatch):
    plant(monkeypatch, Policy, "embed", lambda policy, inputs: {"inputs_embeds": inputs["inputs_embeds"].float()})
    with pytest.raises(RuntimeError, match="^aten.addmm.default: mixed dtypes, torch.float32 @ torch.bfloat16"):
        forward(tiny_folder, prompts)


@pytest.mark.parametrize("message, fault", [
    ("aten._local_scalar_dense.default: the host waits", lambda state, drawn: drawn[0][0].item()),
    ("aten._local_scalar_dense.default: the host waits", lambda state, drawn: bool((drawn[0] > 0).all())),
    ("tolist: the host waits", lambda state, drawn: drawn[0].tolist()),
    ("cpu, cuda to cpu: the host waits", lambda state, drawn: drawn[1].cpu()),
    ("to, cpu to cuda: the host waits", lambda state, drawn: torch.arange(2).to(GPU)),
    ("tensor: the host waits", lambda state, drawn: torch.tensor([1], device=GPU)),
    ("__setitem__, cpu to cuda: the host waits", lambda state, drawn: state.length.__setitem__([0], 0)),
    ("aten.nonzero.default: the host waits", lambda state, drawn: drawn[0].nonzero()),
    ("aten.index.Tensor: the host waits", lambda state, drawn: drawn[0][drawn[0] > 0]),
    ("aten.index.Tensor: a CPU tensor", lambda state, drawn: drawn[0][torch.arange(2)]),
], ids=["item", "bool", "tolist", "cpu", "to", "tensor", "list", "nonzero", "mask", "index"])
def test_a_host_wait_inside_a_captured_burst_is_found(tiny_folder, prompts, waits, monkeypatch, message, fault):
    def planted(decoder, drawn):
        fault(decoder.state, drawn)
        return drawn

    plant(monkeypatch, Decoder, "pick", planted)
    with pytest.raises(RuntimeError, match=f"^{message}"):
        generate(Policy.load(tiny_folder, GPU).eval(), prompts[:1], [0], 2, 4, 0.0, 1.0, 2, 200)


def test_a_burst_that_does_another_thing_the_second_time_is_found(tiny_folder, prompts, waits, monkeypatch):
    """A graph would go on with what the second burst did, and every later one with it."""
    picked = []

    def planted(decoder, drawn):
        picked.append(drawn)
        return drawn if len(picked) < 4 else [x.clone() for x in drawn]

    plant(monkeypatch, Decoder, "pick", planted)
    with pytest.raises(RuntimeError, match="^aten.clone.default .* is captured, but what ran before had aten.copy_"):
        generate(Policy.load(tiny_folder, GPU).eval(), prompts[:1], [0], 2, 4, 0.0, 1.0, 2, 200)
