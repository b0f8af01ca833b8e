"""Processes: join torchrun's group, deal questions out, gather what came of them, end together.

`python train.py` is a group of one; nothing here or elsewhere asks how many there are in order to do something else.
"""
import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

ROLLOUT_TIMEOUT = timedelta(hours=1)  # how long a rank with short responses waits for one with long ones


def start_processes() -> tuple[torch.device, DeviceMesh]:
    """Join torchrun's process group, or a group of one; returns this rank's device and the mesh of all ranks."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            store, rank, world_size = next(dist.rendezvous("env://"))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # its store outlives a restart: no stale keys
            dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank,
                                    world_size=world_size, timeout=ROLLOUT_TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device, init_device_mesh(device.type, (dist.get_world_size(),))


def stop_processes(code: int) -> int:
    """Leave the process group; passes an exit code on."""
    if dist.is_initialized():
        gc.collect()  # gloo aborts when a sharded model outlives its group
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
    return code


def first_error(error: Exception | None) -> Exception | None:
    """What the first rank that has something to complain about says, known to all ranks, so that all end together."""
    if not dist.is_initialized():  # not even the command line was right: each rank has seen that for itself
        return error
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((e for e in errors if e is not None), None)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def is_writer() -> bool:
    """Whether this process prints, and writes the files that exist once: rank 0."""
    return os.environ.get("RANK", "0") == "0"


def print0(*words):
    """Print on rank 0 only."""
    if is_writer():
        print(*words, flush=True)


def no_bar() -> bool | None:
    """tqdm's `disable`: no bar but on rank 0, and there only on a terminal."""
    return None if is_writer() else True


def mine(items) -> list:
    """This rank's share of what all ranks hold: items r, r + W, .. of rank r of W."""
    return list(items)[dist.get_rank() :: dist.get_world_size()]


def gather(rows: list) -> list:
    """On rank 0 the rows of all ranks in the order in which `mine` dealt them out, elsewhere nothing."""
    W = dist.get_world_size()
    per_rank = [None] * W if is_writer() else None
    dist.gather_object(rows, per_rank)
    return [per_rank[i % W][i // W] for i in range(sum(map(len, per_rank)))] if is_writer() else []
