"""Triton's interpreter without its environment variable, and with three faults of version 3.6 repaired.

    device = device_fixture(module, ..)    a test that takes `device` runs interpreted on a CPU, and compiled on a GPU

Triton reads TRITON_INTERPRET when a function is decorated, its own `tl.sum` and `tl.max` included. By the time a test
module is imported, torch has imported Triton, so it is too late; `interpreted` swaps the functions themselves instead.
"""
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.experimental.gluon  # noqa: F401  a launch imports it, and while things are interpreted that fails
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction


CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: the compiled kernels have not run here")])


def repaired_patch(patch_tensor):
    """Fault 1: `range(0, n, step)` with n known at run time only asks the tensor for __index__, which does int() of a
    numpy array of shape (1,): a TypeError since numpy 2.4. item() is what was meant."""

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    return patch


def repaired_convert(convert):
    """Fault 2: float32 -> bfloat16 truncates, where hardware rounds to nearest even (half of all values differ)."""

    def round_to_nearest_even(x, source, target, rounding):
        if source != tl.float32 or target != tl.bfloat16:
            return convert(x, source, target, rounding)
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # half a unit of the last kept bit, less one if it is even
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)  # adding to a nan's bits could make it an inf

    return round_to_nearest_even


def repaired_dot(create_dot):
    """Fault 3: tl.dot of bfloat16 multiplies the bit patterns as integers, silently."""

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    return dot


def patched_once(patch_lang):
    """A launch patches Triton's language for the kernel's module, and every call of a function within it does so again,
    which takes a third of a test's time. Here the launch patches for all modules, and `call` leaves it at that."""
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    return lambda fn: patch_lang(everywhere)


def call(function, *args, **kwargs):
    return function.rewrite()(*args, **kwargs)


@contextmanager
def interpreted(*modules):
    """Within, the kernels of these modules run on CPU tensors, program after program, in numpy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", repaired_patch(interpreter._patch_lang_tensor))
        patch.setattr(interpreter, "_convert_float", repaired_convert(interpreter._convert_float))
        patch.setattr(InterpreterBuilder, "create_dot", repaired_dot(InterpreterBuilder.create_dot))
        patch.setattr(interpreter, "_patch_lang", patched_once(interpreter._patch_lang))
        patch.setattr(InterpretedFunction, "__call__", call)
        functions = {}  # tl.sum and tl.standard.sum are one function and have to stay one
        for module in (tl, tl.standard, *modules):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    function = functions.setdefault(id(value), InterpretedFunction(value.fn))
                    patch.setattr(module, name, function)
        yield


def device_fixture(*modules):
    """Where a test's tensors are; on a CPU the kernels of these modules are interpreted."""

    @pytest.fixture(params=["interpreter", CUDA])
    def device(request):
        if request.param == "cuda":
            yield "cuda"
        else:
            with interpreted(*modules):
                yield "cpu"

    return device
