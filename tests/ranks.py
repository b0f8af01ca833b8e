"""Ranks in milliseconds: processes that are forked from a server which has imported torch and transformers once.

    zero, one = ranks(2, train.main, argv)       both run train.main(argv), as two ranks of one group
    [only] = ranks(1, function, argument)        a process of its own

Importing takes each process seconds of a CPU. The server does nothing but import: it starts no thread and runs no
model, so a process forked from it is as good as new. Where there is no such server (Windows), each process imports for
itself. torchrun, the launcher that people use, runs in test_processes.py and in test_memory.py.
"""
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
import time
from typing import NamedTuple
from unittest import mock

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.pathsep.join((ROOT, os.path.dirname(os.path.abspath(__file__))))
FORK_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
needs_fork_server = pytest.mark.skipif(not FORK_SERVER, reason="no fork server on this system")
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


def work(function, arguments, env: dict[str, str], said: str):
    """What a process does: its output goes to files, and what function returns is its exit code."""
    from plumbing.processes import stop_processes

    os.environ.update(env)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.exit(stop_processes(function(*arguments) or 0))


def start_server():
    """multiprocessing's context with its server running; the first call starts it."""
    if not FORK_SERVER:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["heavy"])
    with mock.patch.dict(os.environ, PYTHONPATH=PATH):  # sys.path does not reach the server before Python 3.12
        multiprocessing.forkserver.ensure_running()
    return context


def ranks(n: int, function, *arguments, grace: float = HANGS, expect: int | None = 0) -> list[Done]:
    """Run function(*arguments) on n ranks and wait for all; what it returns is the exit code (None: 0).

    function: of a module's top level, so that the process finds it. grace: seconds that the others have after the first
    has ended, before they are killed (exit code -9). expect: the exit code of all; None: the caller will see.
    """
    context = start_server()
    group = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        running = [context.Process(target=work, args=(function, arguments, group | dict(RANK=str(r), LOCAL_RANK=str(r)),
                                                      f"{folder}/{r}")) for r in range(n)]
        for process in running:
            process.start()
        end = time.monotonic() + HANGS
        while any(process.is_alive() for process in running) and time.monotonic() < end:
            if not all(process.is_alive() for process in running):
                end = min(end, time.monotonic() + grace)
            time.sleep(0.01)
        for process in running:
            process.kill()
            process.join()
        done = [Done(process.exitcode, *(open(f"{folder}/{r}.{name}").read() for name in ("out", "err")))
                for r, process in enumerate(running)]
    for rank, one in enumerate(done):
        assert expect in (None, one.code), f"rank {rank} ended with {one.code}\n{one.stdout[-2000:]}{one.stderr[-3000:]}"
    return done
