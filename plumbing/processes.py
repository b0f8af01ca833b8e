"""Processes: join torchrun's group, deal questions out, gather what came of them, wait for each other, end together.

`python train.py` is a group of one. One process is not a special case: the same lines run for any number of ranks.

Ranks run in lock-step except where they read, sample and score, because there each takes its own time. Afterwards they
wait for each other at a `barrier`. It is kept in the group's store and is no collective, so that a wait names the
missing rank every minute, ends, and ends at once with the message of a rank that has failed. In the store are
    met/R     how many barriers rank R has come to; met: the sum over all ranks
    go/N      barrier N is over: empty, or why a rank will never come; deleted at barrier N + 1
"""
import contextlib
import gc
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from data import InputError

COLLECTIVE = timedelta(minutes=10)  # all ranks are there when a collective begins, so a slower one is broken
SIGN_OF_LIFE = 60.0  # seconds between two lines about who is missing
THREADS = 4  # that work ahead of a rank
# The signal that has told this rank to end, or 0, and the seconds that it then has; 0 while there is nothing to save.
TOLD = SimpleNamespace(signal=0, grace=0.0, since=0.0)


def restarts() -> int:
    """How often torchrun has started this run again after a failure (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


class SharedError(InputError):
    """Bad input that every rank raises, so that rank 0 speaks for all."""


def start_processes() -> tuple[torch.device, DeviceMesh]:
    """Join torchrun's process group, or a group of one; returns this rank's device and the mesh of all ranks."""
    if sys.platform == "win32":
        raise InputError("Windows lacks what this needs: run it in Linux under WSL (`wsl --install`)")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        # Rollout and training take turns with the memory; in fixed segments the holes of one would not fit the other.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same variable
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.backends.cudnn.allow_tf32 = False  # by default cuDNN rounds float32 to 10 bits
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, rank, world_size = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://"))
            if restarts() and below_prefixes(store).check(["refused"]):
                sys.exit(2)  # torchrun starts everything again, but the input is as bad as it was, and that was said
            # torchrun's store outlives a restart, and without a prefix so would the addresses of dead processes in it
            store = dist.PrefixStore(f"restart {restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE)
        if cuda:  # NCCL takes its memory at the first collective, while there still is some
            dist.all_reduce(torch.zeros(1, device=device))
    return device, init_device_mesh(device.type, (dist.get_world_size(),))


def stop_processes(code: int) -> int:
    """Leave the process group; passes an exit code on."""
    if dist.is_initialized():
        gc.collect()  # gloo aborts when a sharded model outlives its group
        if code == 0:
            try:
                barrier()
                dist.barrier()  # the store may live in rank 0: it leaves after all others have read from it
            except SharedError:  # a rank that was still writing has failed and said so
                code = 2
        dist.destroy_process_group()
    return code


# ------------------------------------------------------------------------ who prints, who has which rows


def is_main() -> bool:
    """Whether this process prints, and writes the files that exist once: rank 0."""
    return os.environ.get("RANK", "0") == "0"


def print0(*words):
    """Print on rank 0 only."""
    if is_main():
        print(*words, flush=True)


def progress(items: Iterable, name: str, total: int, done: int = 0) -> tqdm:
    """A bar on rank 0, if there is a terminal; it goes when the last item is done."""
    return tqdm(items, name, total, leave=False, initial=done, disable=None if is_main() else True)


def broadcast(value):
    """Rank 0's value of something small, on every rank. What is on disk is asked like this: shared disks can lag."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def shard_of_rank(items) -> list:
    """This rank's share of what all ranks hold: items r, r + W, .. of rank r of W."""
    return list(items)[dist.get_rank() :: dist.get_world_size()]


def deal(costs: list[float], ranks: int) -> list[list[int]]:
    """The numbers of the items that each rank gets so that their costs add up to about the same everywhere: the dearest
    item first, each to the rank with the least so far (Graham 1969, longest processing time first)."""
    shares, loads = [[] for _ in range(ranks)], [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += costs[i]
    return shares


def fair_shares(costs: list[float], block: int) -> list[list[int]]:
    """This rank's items of each block of so many, when each block is dealt out by costs that all ranks know."""
    W, rank = dist.get_world_size(), dist.get_rank()
    return [[first + i for i in deal(costs[first : first + block], W)[rank]] for first in range(0, len(costs), block)]


def gather(rows: list) -> list:
    """The rows of all ranks, on every rank, in the order in which `shard_of_rank` dealt them out."""
    W = dist.get_world_size()
    per_rank = [None] * W
    dist.all_gather_object(per_rank, rows)
    return [per_rank[i % W][i // W] for i in range(sum(map(len, per_rank)))]


def sum_over_ranks(values: dict) -> dict[str, float]:
    """The sum over all ranks of each of these numbers or scalar tensors; every rank names the same ones."""
    device = next((value.device for value in values.values() if isinstance(value, torch.Tensor)), "cpu")
    total = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


# ------------------------------------------------------------------------- waiting, and ending together


def group_store() -> dist.Store:
    """What torchrun's processes share across nodes: keys and values, no tensors."""
    return dist.distributed_c10d._get_default_store()


def below_prefixes(store: dist.Store) -> dist.Store:
    """What torchrun keeps over its restarts: an attempt reads here what the last one wrote."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def barrier(patience: float = 60.0):
    """Wait until every rank has come here; meanwhile the first of those that wait says every minute who is missing.

    After `patience` minutes all that wait raise a TimeoutError that names the missing; an InputError at once if a rank
    has ended with an error (`ending_together`). What a rank has written to disk before, others can read after.
    """
    if not dist.is_initialized():
        return
    store, rank, W = group_store(), dist.get_rank(), dist.get_world_size()
    n = store.add(f"met/{rank}", 1)
    if store.add("met", 1) == n * W:  # the last to come
        store.set(f"go/{n}", "")
        store.delete_key(f"go/{n - 1}")  # all have read it: they are here
    began, signs, pause = time.monotonic(), 1, 1e-4
    while not store.check([f"go/{n}"]):
        waited = time.monotonic() - began
        if waited > min(signs * SIGN_OF_LIFE, patience * 60):
            signs += 1
            missing = [r for r in range(W) if store.add(f"met/{r}", 0) < n]
            if missing and waited > patience * 60:
                raise TimeoutError(f"gave up after {patience:g} minutes of waiting for ranks {missing}")
            if missing and rank == min(set(range(W)) - set(missing)):
                print(f"waiting for ranks {missing}", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    if reason := store.get(f"go/{n}").decode():
        raise SharedError(reason)


def hear(number: int, _):
    """The first signal asks the run to end well; a second one, or TOLD.grace seconds, end it at once."""
    now = time.monotonic()
    if TOLD.grace and not TOLD.signal:
        TOLD.signal, TOLD.since = number, now
        signal.setitimer(signal.ITIMER_REAL, TOLD.grace)
    elif number == signal.SIGALRM or now > TOLD.since + 1:  # sooner it is the same, handed on by torchrun
        number = TOLD.signal or number
        if is_main():
            line = f"{signal.Signals(number).name}: ended at once; the same command goes on from what is saved\n"
            os.write(sys.stderr.fileno(), line.encode())  # print may be in use by what was interrupted
        os._exit(128 + number)


@contextlib.contextmanager
def ending_together():
    """Around a rank's work: SIGTERM and SIGINT raise nothing, they set TOLD.signal, which is looked at now and then.

    An error that ends this rank also ends those that will wait for it at the next barrier. A failed collective becomes
    an InputError.
    """
    TOLD.signal, TOLD.grace = 0, 0.0
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "Connection" not in str(error):  # gloo's errors have no class
            raise
        why = str(error).splitlines()[0][:100]
        raise InputError(f"rank {dist.get_rank()} has lost another ({why}); the same command goes on from the last "
                         "checkpoint") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, SharedError) and dist.is_initialized():
            with contextlib.suppress(dist.DistError):  # the store dies with the process that holds it
                store, rank = group_store(), dist.get_rank()
                kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
                store.set(f"go/{store.add(f'met/{rank}', 0) + 1}", f"rank {rank} has ended: {kind}{error}")


class Stopped(SharedError):
    """SIGTERM or SIGINT has ended the run, on every rank, and what was done is on disk."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"{signal.Signals(number).name}: ended{where}; the same command goes on from there")
        self.number, self.code = number, 128 + number


def told_to_stop() -> bool:
    """Whether a signal has come to this rank, or to another that has looked; to be asked where work can be left off."""
    if TOLD.signal:
        group_store().set("stop", "")
    return bool(TOLD.signal) or group_store().check(["stop"])


def stop_together():
    """Raise Stopped on all ranks if a signal has come to one of them. A collective."""
    number = torch.tensor(TOLD.signal)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if number:
        raise Stopped(int(number))


def on_every_rank(function: Callable):
    """function() on every rank; bad input on one of them ends all, with what the first has to complain about."""
    result, complaint = None, None
    try:
        result = function()
    except InputError as error:
        complaint = error
    barrier()
    for error in gather([complaint]):
        if error is not None:
            below_prefixes(group_store()).set("refused", "")
            raise SharedError(str(error)) from error
    return result


# ----------------------------------------------------- work beside that of the device, phases of a step


def ahead(function: Callable, items: Iterable, most: int, *rest) -> Iterator:
    """function(item, *rest) of each item, in order; threads begin up to `most` before their results are taken.

    Reading an image file, resizing it and torch's own operations leave Python to others, so the device need not wait
    for them. `most` bounds the memory of results that wait. An error is raised where the result of its item is taken.
    """
    pool, begun = ThreadPoolExecutor(THREADS), deque()
    try:
        for item in items:
            begun.append(pool.submit(function, item, *rest))
            if len(begun) > most:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Timer:
    """Seconds per phase: `with timer("rollout"): ..` adds to timer.seconds["rollout"]."""

    def __init__(self, where: str, stoppable: bool = True):
        self.where, self.seconds = where, {}  # where: "step 12"
        self.stoppable = stoppable  # its rollout can be left off when a signal comes

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise InputError(f"rank {dist.get_rank()} is out of memory in the {phase} of {self.where}: in a rollout "
                             "lower --slots, else lower --token_budget, or use more GPUs (see --plan); the same "
                             "command goes on from the last checkpoint") from error
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
