"""Ranks in milliseconds: processes that are forked from a server which has imported torch and transformers once.

    zero, one = ranks(2, train.main, argv)       both run train.main(argv), as two ranks of one group
    [only] = ranks(1, function, argument)        a process of its own

Importing takes each process seconds of a CPU. The server does nothing but import: it starts no thread and runs no
model, so a process forked from it is as good as new. torchrun, the launcher that people use, runs in
test_processes.py and in test_memory.py.
"""
import functools
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from typing import NamedTuple
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.pathsep.join((ROOT, os.path.dirname(os.path.abspath(__file__))))
LOCK = threading.Lock()  # two threads may have ranks; multiprocessing looks after the processes of both
HANGS = 300  # seconds after which processes are taken to hang; a slow machine needs a fraction of them


class Done(NamedTuple):
    """How a process has ended, and what it has said."""

    code: int
    stdout: str
    stderr: str


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def work(function, arguments, env: dict[str, str], out: str, err: str):
    """What a process does: its output goes to two files, and what function returns is its exit code."""
    from plumbing.processes import stop_processes

    os.environ.update(env)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY), stream.fileno())
    sys.exit(stop_processes(function(*arguments) or 0))


def import_from(folder: str):
    """In a process of its own: what is imported from now on comes from a copy of this project, nothing from here."""
    ours = {name.removesuffix(".py") for name in os.listdir(ROOT)}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.path[:] = [folder, *(path for path in sys.path if path != ROOT)]


@functools.cache
def start_server():
    """multiprocessing's context with its server running; the first call starts it."""
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(["heavy"])
    with mock.patch.dict(os.environ, PYTHONPATH=PATH):  # sys.path does not reach the server before Python 3.12
        os.environ.pop("TRITON_INTERPRET", None)  # some of its children compile
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def ranks(n: int, function, *arguments, grace: float = HANGS, expect: int | None = 0) -> list[Done]:
    """Run function(*arguments) on n ranks and wait for all; what it returns is the exit code (None: 0).

    function: of a module's top level, so that the process finds it. grace: seconds that the others have after the first
    has ended, before they are killed (exit code -9). expect: the exit code of all; None: the caller will see.
    """
    context = start_server()
    group = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        said = [[os.path.join(folder, f"{rank}.{stream}") for stream in ("out", "err")] for rank in range(n)]
        running, end = [], time.monotonic() + HANGS
        for rank, paths in enumerate(said):
            for path in paths:
                open(path, "w").close()
            env = group | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            running.append(context.Process(target=work, args=(function, arguments, env, *paths)))
            with LOCK:
                running[-1].start()
        alive = running
        while alive and time.monotonic() < end:
            time.sleep(0.01)
            with LOCK:
                alive = [process for process in running if process.is_alive()]
            if len(alive) < n:
                end = min(end, time.monotonic() + grace)
        with LOCK:
            for process in running:
                process.kill()
                process.join()
        done = [Done(process.exitcode, *(open(path).read() for path in paths)) for process, paths in zip(running, said)]
    for rank, one in enumerate(done):
        assert expect in (None, one.code), f"rank {rank}: {one.code}\n{one.stdout[-2000:]}{one.stderr[-3000:]}"
    return done
