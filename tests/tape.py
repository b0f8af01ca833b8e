"""What a CUDA graph does, on a CPU: the operations of a function, recorded once and run again on the same tensors."""
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    """`with tape: function()` runs the function and records it; `tape.replay()` repeats what torch did, without Python.

    A tensor that was there before is used where it lies, with what it then holds; what an operation makes is made anew.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        fresh = {}  # what an operation makes now, by the identity of what it made when it was recorded
        for function, args, kwargs, recorded in self.operations:
            args, kwargs = tree_map(lambda x: fresh.get(id(x), x) if isinstance(x, Tensor) else x, (args, kwargs))
            out = function(*args, **kwargs)
            fresh.update((id(old), new) for old, new in zip(tree_leaves(recorded), tree_leaves(out)))


def record(decoder):
    """In place of `engine.sampler.capture`."""
    tape = Tape()
    with tape:
        decoder.burst()
    return tape.replay
