"""A GPU that is not there: tensors that say `cuda`, hold real numbers on the CPU, and refuse what a GPU would refuse.

    with pretend_cuda(decode, logprob) as waits:    within, GPU is such a device, for these Triton files as well
        policy = Policy.load(folder, GPU)           .is_cuda is true: every branch of the program is the GPU's
    waits                                           how often the host has waited for the GPU, by what it waited at

A `Cuda` shares its memory with an ordinary tensor and differs in what it says of itself. Every operation on it, those
of a backward too, passes `Cuda.__torch_dispatch__`, which looks at the arguments and then computes it on the CPU:
    devices    A CPU tensor of more than one number meets one of the GPU. Torch lets an index on the CPU pass; it is
               refused here, because the host waits for its copy, and a CUDA graph cannot hold that copy.
    dtypes     The factors of a product differ. With out_dtype it makes float32 of 16 bits and nothing else.
    attention  What flash attention asks of `varlen_attn`, and what it takes on trust (pretend_ops.py).
    capture    What is captured as a CUDA graph, and the run before, wait for nothing and are the same operations.
Triton's kernels are interpreted and take no tensor but the GPU's. An error begins with the name of the operation.
"""
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen  # noqa: F401  registers the two operations of varlen_attn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

from engine import sampler
from pretend_ops import attend, attend_backward, check_product, product
from tape import Tape
from triton_interpreter import interpreted

aten, flash = torch.ops.aten, torch.ops.torch_attn
GPU = torch.device("cuda", 0)
GRID = (2**31 - 1, 65535, 65535)  # the most programs along each axis
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_consecutive, aten._unique2,
         aten.repeat_interleave}  # the host needs their result, or its shape
OURS = {aten.mm.dtype_out: product, aten.addmm.dtype_out: product, flash._varlen_attn.default: attend,
        flash._varlen_attn_backward.default: attend_backward}
waits = Counter()
tapes = []  # what the CUDA graph that is being captured holds so far


class Cuda(Tensor):
    """A tensor that says it lies on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __repr__ = object.__repr__  # in a traceback; torch's would ask for the numbers
    device, is_cuda, is_cpu = (property(lambda self, value=value: value) for value in (GPU, True, False))

    def tolist(self):
        wait("tolist")
        return on_cpu(self).tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs, kind = kwargs or {}, op.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if kind is aten.copy_ and not all(isinstance(x, Cuda) or x.dim() == 0 for x in tensors):
            wait(f"{op}, between CPU and GPU")
        elif kind is not aten.copy_:
            check_devices(op, tensors)
        if kind in WAITS or kind in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            wait(op)
        if kind in PRODUCTS:
            check_product(op, *args, **kwargs)
        with torch._C._DisableTorchDispatch():  # from here on a Cuda is the CPU tensor that it is
            out = OURS[op](*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs)) if op in OURS else op(*args, **kwargs)
            out = tree_map(on_gpu, out)
        if tapes:
            tapes[-1].operations.append((op, args, kwargs, out))
        return out


def on_gpu(x):
    """The same memory as a tensor of the GPU; what is no tensor stays as it is."""
    return Tensor._make_subclass(Cuda, x) if isinstance(x, Tensor) and not isinstance(x, Cuda) else x


def on_cpu(x):
    """The same memory as a tensor of the CPU."""
    with torch._C._DisableTorchDispatch():
        return x.detach() if isinstance(x, Cuda) else x


class Devices(TorchFunctionMode):
    """What Python asks for by the name of a device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device, name = kwargs.get("device"), getattr(function, "__name__", "")
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return move(name, *args, **kwargs)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Cuda):
            index, theirs = args[1], "transformers" in sys._getframe(1).f_code.co_filename  # it indexes by the CPU's
            if theirs or isinstance(index, list):
                index = torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index
                index = tree_map(lambda x: move(name, x, GPU) if isinstance(x, Tensor) else x, index)
            args = args[0], index, *args[2:]
        if device is None or torch.device(device).type == "meta":
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor):
            wait(name)
        out = function(*args, **kwargs | {"device": "cpu"})
        return on_gpu(out) if torch.device(device).type == "cuda" else on_cpu(out)


def move(name, x, *args, copy=False, **kwargs):
    """x.to(..), x.cpu() or x.cuda(). The gradient of a copy between devices is needed nowhere here."""
    args = args if args or kwargs else [name]
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type in (x.device.type, "meta") or x.is_meta:
        return x.to(device=device if "meta" in str(device) else None, dtype=dtype, copy=copy)
    wait(f"{name}, {x.device.type} to {device.type}")
    assert not (x.requires_grad and torch.is_grad_enabled()), f"{name}: between devices, in a graph of autograd"
    moved = on_cpu(x).to(dtype=dtype, copy=True)
    return on_gpu(moved) if device.type == "cuda" else moved


# ---------------------------------------------------------------------------------------- what is refused


def wait(name):
    """The host waits for the GPU, or copies something to it, for which it waits as well."""
    if tapes:
        raise RuntimeError(f"{name}: the host waits for the GPU while a CUDA graph is captured")
    waits[str(name)] += 1


def check_devices(name, tensors):
    backward = torch._C._current_graph_task_id() != -1  # autograd makes zeros there in place of a missing gradient
    for x in tensors:
        if not isinstance(x, Cuda) and x.dim() > 0 and not (backward and not x.any()):
            raise RuntimeError(f"{name}: a CPU tensor of shape {tuple(x.shape)} meets one of the GPU")


# --------------------------------------------------------------------------------- in place of the GPU's own


def launch(kernel, *args, grid, warmup=False, run=InterpretedFunction.run, **kwargs):
    """InterpretedFunction.run"""
    check_devices(kernel.fn.__name__, [x for x in args if isinstance(x, Tensor)])
    assert all(programs <= most for programs, most in zip(grid, GRID)), f"{kernel.fn.__name__}: a grid of {grid}"
    run(kernel, *map(on_cpu, args), grid=grid, warmup=warmup, **kwargs)
    if tapes:
        tapes[-1].operations.append((launch, (kernel, *args), dict(grid=grid, **kwargs), None))


def make_stream():
    return SimpleNamespace(wait_stream=lambda other: None, tape=Tape())  # tape: what has run on it


@contextmanager
def record(tape, before=None):
    """Run and record. What is captured has to be what ran before: no other operation has been tried."""
    tapes.append(tape)
    try:
        yield
    finally:
        tapes.pop()
    both = ([(op, [x.shape for x in tree_leaves(args) if isinstance(x, Tensor)]) for op, args, *_ in one.operations]
            for one in (before or tape, tape))
    for first, second in zip_longest(*both, fillvalue=("the end", [])):
        if first != second:
            raise RuntimeError(f"{second[0]} {second[1]} is captured, but what ran before had {first[0]} {first[1]}")


def recompute(function, *args):
    """What a checkpoint calls: in a backward no mode is active any more."""
    with Devices():
        return function(*args)


@contextmanager
def pretend_cuda(*modules):
    """Within, GPU is a device, also for these Triton files. Yields what the host has waited at, a Counter."""
    generator = torch.Generator
    with interpreted(*modules), pytest.MonkeyPatch.context() as patch, Devices():
        patch.setattr(InterpretedFunction, "run", launch)
        patch.setattr(sampler, "capture_stream", make_stream)  # which would keep one for good
        patch.setattr(checkpoint, "_run_fn_with_dynamo_disabled", recompute)
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        for name, ours in dict(
                stream=lambda stream: record(stream.tape), current_stream=make_stream, CUDAGraph=Tape,
                graph=lambda tape, stream, capture_error_mode: record(tape, stream.tape),
                get_device_capability=lambda device=None: (9, 0),
                get_device_properties=lambda device=None: SimpleNamespace(total_memory=80 << 30)).items():
            patch.setattr(torch.cuda, name, ours)
        waits.clear()
        yield waits
