"""The kernels against float64 torch: in Triton's interpreter on a CPU, and compiled where there is a GPU (-m gpu)."""
import contextlib
import importlib
import io
import json
import math
import os
import runpy
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton, to interpret the kernels or to compile them")

import torch
import triton
import triton.language as tl
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from triton.backends import nvidia

from kernels import logprob, ops
from ranks import ranks
from triton_interpreter import CUDA, device_fixture, interpreted


TESTS = os.path.dirname(os.path.abspath(__file__))
LOGPROB_ERROR = 2e-5  # a log-prob is a difference of numbers around 30, whose float32 spacing is 2e-6
GRADIENT_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5,
                  torch.bfloat16: 3e-3}  # dlogits are rounded and so is the result, by about 1.6e-3 each
device = device_fixture(sys.modules[__name__], logprob)


def problem(device, N, V, H=64, dtype=torch.float32, spread=4.0, seed=0):
    """Hidden states, a head and targets whose logits have standard deviation `spread`, both inputs to differentiate."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g)
    weight = torch.randn(V, H, generator=g) * (spread / math.sqrt(H))
    targets = torch.randint(V, (N,), generator=g)
    likely = torch.rand(N, generator=g) < 0.5  # half of the targets are the most likely token, as in a response
    if N:
        targets = torch.where(likely, (hidden @ weight.T).argmax(-1), targets)
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets.to(device)


def exact(hidden, weight, targets, temperature):
    """Float64 log-probs, entropies and leaves to differentiate, by log_softmax: no equation shared with the kernels."""
    hidden, weight = (x.detach().cpu().double().requires_grad_() for x in (hidden, weight))
    z = (hidden @ weight.T / temperature).log_softmax(-1)  # (N, V)
    return z.gather(-1, targets.cpu()[:, None])[:, 0], -(z.exp() * z).sum(-1), hidden, weight


def slopes(N, device, seed=1):
    """Two random (N,): what the loss makes of the log-probs and of the entropies."""
    return torch.randn(2, N, generator=torch.Generator().manual_seed(seed)).to(device)


def distance(found, expected) -> float:
    """|found - expected| / |expected| of two tensors, in float64."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def check(found, inputs, temperature, g, u) -> dict[str, float]:
    """Largest errors of values (N,) twice, and relative errors of the gradients that are in `inputs`, within limits."""
    hidden, weight, targets = inputs
    logprobs, entropies, *leaves = exact(hidden, weight, targets, temperature)
    expected = torch.autograd.grad((logprobs * g.cpu() + entropies * u.cpu()).sum(), leaves)
    errors = {"logprobs": (found[0].cpu() - logprobs).abs().max().item(),
              "entropies": (found[1].cpu() - entropies).abs().max().item(),
              "hidden": distance(hidden.grad, expected[0]), "weight": distance(weight.grad, expected[1])}
    assert errors["logprobs"] <= LOGPROB_ERROR and errors["entropies"] <= LOGPROB_ERROR, errors
    assert max(errors["hidden"], errors["weight"]) <= GRADIENT_ERROR[hidden.dtype], errors
    return errors


# ------------------------------------------------------------------------------- log-probs and entropies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("N, V, chunk", [(13, 1000, 5), (7, 9001, 64)])
def test_values_and_both_gradients_equal_float64(device, N, V, chunk, temperature, dtype):
    """Vocabularies below a tile and of several tiles with a ragged end; chunks with a remainder, and a single one."""
    inputs = problem(device, N, V, dtype=dtype)
    found = logprob.linear_logprob(*inputs, temperature, chunk)
    g, u = slopes(N, device)
    (found[0] * g + found[1] * u).sum().backward()
    check(found, inputs, temperature, g, u)


def test_one_row_of_a_real_vocabulary(device):
    inputs = problem(device, 1, 151_936, H=16, dtype=torch.bfloat16, spread=7.0)  # logits up to 30
    found = logprob.linear_logprob(*inputs, 0.9)
    g, u = slopes(1, device)
    (found[0] * g + found[1] * u).sum().backward()
    check(found, inputs, 0.9, g, u)


def test_many_chunks_add_up_as_exactly_as_one(device):
    """In float32: sixteen sums rounded to bf16 would be off by 5e-3."""
    inputs = problem(device, 32, 1000, dtype=torch.bfloat16)
    found = logprob.linear_logprob(*inputs, 1.0, 2)
    g, u = slopes(32, device)
    (found[0] * g + found[1] * u).sum().backward()
    check(found, inputs, 1.0, g, u)


def test_a_nearly_certain_token_keeps_its_digits(device):
    """Logits 0 but one of 12 over 1,000 tokens: 1 - p = 999 e^-12 = .0061; both values small, neither cancelled."""
    hidden, weight = torch.ones(1, 1, device=device), torch.zeros(1000, 1, device=device)
    weight[5] = 12.0
    found = logprob.linear_logprob(hidden, weight, torch.tensor([5], device=device))
    logprobs, entropies, *_ = exact(hidden, weight, torch.tensor([5]), 1.0)
    torch.testing.assert_close(found[0].cpu().double(), logprobs, rtol=3e-5, atol=0)
    torch.testing.assert_close(found[1].cpu().double(), entropies, rtol=3e-5, atol=0)


@pytest.mark.parametrize("g, u", [(1.0, 0.0), (0.0, 1.0)], ids=["logprob", "entropy"])
def test_each_output_alone_is_differentiable(device, g, u):
    inputs = problem(device, 9, 500)
    found = logprob.linear_logprob(*inputs)
    found[0 if g else 1].sum().backward()
    check(found, inputs, 1.0, torch.full((9,), g), torch.full((9,), u))


def test_eq_dlogits_of_a_row_sum_to_zero(device):
    """In float32, written over the logits."""
    logits, g, u = torch.randn(5, 3000, device=device), *slopes(5, device)
    values = [torch.empty(5, device=device) for _ in range(3)]
    logprob.row_statistics(logits, torch.arange(5, device=device), 0.7, *values)
    dlogits = logprob.dlogits_in_place(logits, torch.arange(5, device=device), 0.7, values[2], values[1], g, u,
                                       torch.float32)
    assert dlogits.data_ptr() == logits.data_ptr() and dlogits.sum(-1).abs().max() < 1e-5


def test_bfloat16_dlogits_over_float32_logits_are_those_beside_them(device):
    """Three tiles of 2,048 and an odd end: what block k overwrites has been read before."""
    logits, g, u = 3 * torch.randn(3, 7001, device=device), *slopes(3, device)
    targets = torch.tensor([0, 6999, 4100], device=device)
    values = [torch.empty(3, device=device) for _ in range(3)]
    logprob.row_statistics(logits, targets, 1.0, *values)
    rest = (targets, 1.0, values[2], values[1], g, u)
    beside = logprob.dlogits_in_place(logits.clone(), *rest, torch.float32)
    over = logprob.dlogits_in_place(logits, *rest, torch.bfloat16)
    torch.testing.assert_close(over.float(), beside, rtol=2**-8, atol=1e-6)  # bf16 keeps 8 bits


def test_weights_of_zero_give_gradients_of_exactly_zero(device):
    inputs = problem(device, 6, 300, dtype=torch.bfloat16)
    logprobs, entropies = logprob.linear_logprob(*inputs, 1.0, 4)
    (0 * logprobs + 0 * entropies).sum().backward()
    assert not inputs[0].grad.any() and not inputs[1].grad.any()


@pytest.mark.parametrize("with_loss", [False, True], ids=["plain", "loss"])
def test_an_empty_batch_stays_in_the_graph(device, with_loss):
    """A rank without response tokens still takes part in the gradient's reduction, with zeros."""
    inputs = problem(device, 0, 300)
    if with_loss:
        loss, logprobs, entropies = logprob.linear_logprob_loss(*inputs, token_losses(0, device))
    else:
        logprobs, entropies = logprob.linear_logprob(*inputs)
        loss = (logprobs + entropies).sum()
    loss.backward()
    assert logprobs.shape == entropies.shape == (0,) and loss == 0
    assert inputs[0].grad.shape == (0, 64) and torch.equal(inputs[1].grad, torch.zeros_like(inputs[1]))


def test_inputs_in_any_memory_order(device):
    hidden, weight, targets = problem(device, 10, 700)
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = weight.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    targets = targets.repeat_interleave(2)[::2]
    assert not any(x.is_contiguous() for x in (hidden, weight, targets))
    found = logprob.linear_logprob(hidden, weight, targets, 1.0, 4)
    g, u = slopes(10, device).repeat_interleave(2, 1)[:, ::2]
    (found[0] * g + found[1] * u).sum().backward()
    check(found, (hidden, weight, targets), 1.0, g, u)


def test_a_target_outside_the_vocabulary_gives_nan_and_harms_no_other_row(device):
    hidden, weight, _ = problem(device, 3, 300)
    logprobs, entropies = logprob.linear_logprob(hidden, weight, torch.tensor([300, -100, 7], device=device))
    assert logprobs.isnan().tolist() == [True, True, False] and entropies.isfinite().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy on what the interpreter does with it
def test_a_nan_in_the_hidden_states_reaches_the_values(device):
    hidden, weight, targets = problem(device, 3, 300)
    with torch.no_grad():
        hidden[1, 2] = math.nan
        found = logprob.linear_logprob(hidden, weight, targets)
    assert all(x.isnan().tolist() == [False, True, False] for x in found)


# ------------------------------------------------------------------------------- what is not computed


@pytest.fixture
def products(monkeypatch):
    """A list that grows by one entry with every matrix product."""
    made, multiply = [], logprob.multiply

    def counting(*arguments, **options):
        made.append(arguments[0].shape)
        return multiply(*arguments, **options)

    monkeypatch.setattr(logprob, "multiply", counting)
    return made


@pytest.mark.parametrize("frozen, plain, with_loss", [(None, 12, 9), ("hidden", 9, 6), ("weight", 9, 6)])
def test_products_per_chunk_and_none_for_a_frozen_input(device, products, frozen, plain, with_loss):
    """Three chunks: logits, logits again, dhidden, dweight; the loss form needs its logits once."""
    hidden, weight, targets = problem(device, 10, 300)
    if frozen:
        (hidden if frozen == "hidden" else weight).requires_grad_(False)
    logprob.linear_logprob(hidden, weight, targets, 1.0, 4)[0].sum().backward()
    assert len(products) == plain
    products.clear()
    logprob.linear_logprob_loss(hidden, weight, targets, token_losses(10, device), 1.0, 4)[0].backward()
    assert len(products) == with_loss
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_without_gradients_there_is_one_product_per_chunk(device, products):
    inputs = problem(device, 10, 300)
    with torch.no_grad():
        logprob.linear_logprob(*inputs, 1.0, 4)
        loss, *_ = logprob.linear_logprob_loss(*inputs, token_losses(10, device), 1.0, 4)
    assert len(products) == 6 and not loss.requires_grad


def test_nothing_of_vocabulary_size_is_kept_for_the_backward(device):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        logprob.linear_logprob(*problem(device, 10, 300), 1.0, 4)
    assert sorted(kept) == [(10,), (10,), (10,), (10, 64), (300, 64)]  # targets, lse2s, entropies, hidden, weight


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("with_loss", [False, True], ids=["plain", "loss"])
def test_peak_memory_is_one_chunk_of_logits_and_the_float32_weight_gradient(device, with_loss):
    """4 C V + 4 V H bytes, and dhidden: the cast of dweight to bf16 comes when the chunk is gone."""
    N, V, H, C = 4096, 30_000, 1024, 1024
    inputs = problem(device, N, V, H, torch.bfloat16)

    def both():
        if with_loss:
            loss = logprob.linear_logprob_loss(*inputs, token_losses(N, device), 1.0, C)[0]
        else:
            loss = logprob.linear_logprob(*inputs, 1.0, C)[0].sum()
        torch.autograd.grad(loss, inputs[:2])

    both()  # the first call leaves cuBLAS's workspaces behind
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    assert torch.cuda.max_memory_allocated() - before <= 4 * C * V + 4 * V * H + 2 * N * H + 2**23  # and (N,) vectors


# ------------------------------------------------------------------------------------ with a loss on top


def token_losses(N, device):
    """A per-token loss of both outputs whose slopes depend on them."""
    g, u = slopes(N, device)

    def loss_fn(logprobs, entropies, rows):
        return g[rows] * logprobs.exp() + u[rows] * entropies * logprobs

    return loss_fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", [5, 64])
def test_the_loss_form_equals_float64_autograd(device, chunk, dtype):
    """Also with a gradient of 2 from above, in several chunks and in one."""
    inputs = problem(device, 13, 1000, dtype=dtype)
    loss, logprobs, entropies = logprob.linear_logprob_loss(*inputs, token_losses(13, device), 0.7, chunk)
    (2 * loss).backward()
    *values, hidden, weight = exact(*inputs, 0.7)
    expected = token_losses(13, "cpu")(*values, slice(None)).sum()
    gradients = torch.autograd.grad(2 * expected, (hidden, weight))
    assert abs(loss.item() - expected.item()) <= 1e-5 * values[0].abs().sum()  # a sum of 13 terms of these sizes
    assert not logprobs.requires_grad and not entropies.requires_grad
    assert (logprobs.cpu() - values[0]).abs().max() <= LOGPROB_ERROR
    assert distance(inputs[0].grad, gradients[0]) <= GRADIENT_ERROR[dtype]
    assert distance(inputs[1].grad, gradients[1]) <= GRADIENT_ERROR[dtype]


def test_the_loss_form_can_go_backward_twice(device):
    hidden, weight, targets = problem(device, 6, 300)
    loss, *_ = logprob.linear_logprob_loss(hidden, weight, targets, token_losses(6, device), 1.0, 4)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (hidden, weight))))


# ----------------------------------------------------------- without Triton, under FSDP, compiled ahead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_on_a_cpu_the_reference_is_picked_and_equals_float64(dtype):
    inputs = problem("cpu", 21, 1000, dtype=dtype)
    found = ops.linear_logprob_ref(*inputs, 0.7, 8)
    g, u = slopes(21, "cpu")
    (found[0] * g + found[1] * u).sum().backward()
    check(found, inputs, 0.7, g, u)
    assert all(map(torch.equal, ops.linear_logprob(*inputs, 0.7), ops.linear_logprob_ref(*inputs, 0.7)))
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    assert ops.backend("cpu").startswith("torch") and ops.backend("cuda").startswith("triton")


def test_the_reference_of_the_loss_form_equals_the_kernels(device):
    inputs = problem(device, 13, 500)
    ours = logprob.linear_logprob_loss(*inputs, token_losses(13, device), 0.7, 5)
    theirs = ops.linear_logprob_loss_ref(*inputs, token_losses(13, device), 0.7, 5)
    for mine, other in zip([*ours, *torch.autograd.grad(ours[0], inputs[:2])],
                           [*theirs, *torch.autograd.grad(theirs[0], inputs[:2])]):
        assert distance(mine, other) <= 1e-5


class Head(nn.Linear):
    """A head that never shows its logits: inside its forward FSDP has gathered the weight."""

    def forward(self, hidden, targets, with_loss):
        if with_loss:
            return logprob.linear_logprob_loss(hidden, self.weight, targets, token_losses(11, "cpu"), 1.0, 4)[0]
        logprobs, entropies = logprob.linear_logprob(hidden, self.weight, targets, 1.0, 4)
        return token_losses(11, "cpu")(logprobs, entropies, slice(None)).sum()


class Tiny(nn.Module):
    """Embedding, a layer, and a head that may share the embedding's weight."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(300, 32), nn.Linear(32, 32), Head(32, 300, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, targets, with_loss):
        return self.head(self.layer(self.embedding(ids)), targets, with_loss)


@pytest.mark.parametrize("with_loss", [False, True], ids=["plain", "loss"])
@pytest.mark.parametrize("where", ["tied", "root", "own group"])
def test_under_fsdp_the_gradients_are_those_of_the_whole_model(processes, where, with_loss):
    whole = Tiny(where == "tied")
    sharded = Tiny(where == "tied")
    sharded.load_state_dict(whole.state_dict())
    for module in [sharded.layer, *([sharded.head] if where == "own group" else []), sharded]:
        fully_shard(module, mesh=processes[1], reshard_after_forward=True)
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide while it reduces
    ids, targets = torch.arange(11) * 7, torch.arange(11) * 13
    with interpreted(logprob):
        for model in (whole, sharded):
            model(ids, targets, with_loss).backward()
    for (name, parameter), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), parameter.grad, msg=name)


def compile_one():
    """On a rank, which has never interpreted: that leaves traces in Triton."""
    import compile_kernels

    return compile_kernels.main(("80", "90")[int(os.environ["RANK"])])


@pytest.fixture(scope="module")
def compiled():
    """What compile_kernels.py prints for both cards."""
    folder = os.path.join(os.path.dirname(nvidia.__file__), "bin")
    if not all(os.path.exists(os.path.join(folder, name)) for name in ("ptxas", "cuobjdump")):
        pytest.skip("this Triton comes without ptxas or cuobjdump")
    rows = [row for rank in ranks(2, compile_one) for row in json.loads(rank.stdout)]
    return {(row["kernel"], row["arch"]): row for row in rows}


@pytest.mark.parametrize("arch", [80, 90], ids=["A100", "H100 and H200"])
@pytest.mark.parametrize("kernel, registers, wide_loads, wide_stores", [
    ("statistics", 32, True, False), ("dlogits bf16", 32, True, True), ("dlogits fp32", 32, True, True),
    ("grpo loss", 63, False, False), ("decode 3B bf16", 80, True, True), ("decode 7B bf16", 80, True, True),
    ("decode 7B fp32", 80, True, True), ("merge", 80, True, False), ("sample top_p 1", 64, True, False),
    ("sample nucleus", 64, True, False)])
def test_machine_code_has_no_spills_few_registers_and_wide_accesses(compiled, kernel, arch, registers, wide_loads,
                                                                    wide_stores):
    """32 registers x 2,048 threads are all a multiprocessor has: one more and fewer rows are on their way at once.

    Decoding has three programs of 256 threads beside each other, or two where shared memory is the 164 KB of an A100,
    and copies tiles while it computes; drawing has one program of 1,024 threads.
    """
    row = compiled[kernel, arch]
    assert row["spills"] == row["stack"] == 0 and row["registers"] <= registers and row["shared"] <= 80_000, row
    assert bool(row["wide_loads"]) >= wide_loads and bool(row["wide_stores"]) >= wide_stores, row
    assert not kernel.startswith("decode") or row["async_loads"] >= 2, row  # keys and values
    assert kernel != "dlogits bf16" or row["barriers"] == 1, row  # without it a warp could overwrite unread logits


@pytest.fixture
def benchmark(monkeypatch):
    """speed/gpu.py, without a GPU; its scripts run in this process, which has imported torch and transformers."""
    root = os.path.dirname(TESTS)
    monkeypatch.syspath_prepend(os.path.join(root, "speed"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = importlib.import_module("gpu")
    run_process = module.run

    def run(command, seconds):
        if command[0] == "-m":
            return run_process(command, seconds)
        monkeypatch.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            runpy.run_path(os.path.join(root, command[0]), run_name="__main__")
        return {"code": 0, "seconds": 0.0}

    monkeypatch.setattr(module, "run", run)
    return module


def test_gpu_benchmark_smoke(tmp_path, benchmark):
    """Its tests skip here, the other parts run on the reference; each has a file of its own."""
    assert benchmark.main(["--smoke", "--out", str(tmp_path)]) == 0
    saved = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in (*benchmark.SECONDS, "gpu")
             if part != "tests"}
    assert list(saved["gpu"]) == ["machine", *benchmark.SECONDS]
    assert "needs a CUDA GPU" in saved["gpu"]["tests"]["output"]
    ours = [row for row in saved["table"]["table"] if row["provider"].startswith("ours")]
    assert len(ours) == 4 and all(row["loss_error"] <= 1e-6 and row["weight_error"] <= 3e-3 for row in ours)
    assert saved["table"]["machine"]["flops"] > 0 and "torch.compile" in saved["table"]["left_out"]
    assert [(row["slots"], row["cuda_graphs"]) for row in saved["decode"]["rows"]] == [(4, True), (2, True), (4, False)]
    assert saved["step"]["results"]["rollout, long tail"]["static"]["ratio"] > 0
    assert len(saved["chunks"]["rows"]) == 2


def test_a_part_that_takes_too_long_ends_with_what_it_has_started(benchmark, tmp_path):
    """The child of a part holds its standard output, which closes when both have ended."""
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    ended = benchmark.run(["-m", "timeit", "-n", "1", "-r", "1", code], 1.5)
    assert ended["code"] is None and "begun" in ended["output"] and ended["seconds"] < 10


# ------------------------------------------------------------------------------ the interpreter's repairs


@triton.jit
def _faults_kernel(x, n, total, rounded, product, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    count = 0.0
    for start in range(0, n, SIZE):  # n is known at run time only
        count += tl.sum(tl.load(x + start + index, mask=start + index < n, other=0.0), 0)
    tl.store(total, count)
    half = tl.load(x + index).to(tl.bfloat16)
    tl.store(rounded + index, half)
    square = half[:, None] + tl.zeros((SIZE, SIZE), tl.bfloat16)
    tl.store(product + index[:, None] * SIZE + index[None, :], tl.dot(square, tl.trans(square)))


def test_the_interpreter_counts_rounds_and_multiplies_as_hardware_does(device):
    x = torch.randn(37, generator=torch.Generator().manual_seed(0)).to(device)
    total, rounded = torch.zeros(1, device=device), torch.zeros(16, device=device, dtype=torch.bfloat16)
    product = torch.zeros(16, 16, device=device)
    _faults_kernel[(1,)](x, 37, total, rounded, product, SIZE=16)
    torch.testing.assert_close(total[0], x.sum())
    assert torch.equal(rounded, x[:16].bfloat16())
    torch.testing.assert_close(product, 16 * torch.outer(rounded.float(), rounded.float()))
