"""Mirrors of metrics.jsonl for who watches many runs: --tracker wandb, trackio or tensorboard. None is needed.

The files of the run remain the record, and view.py shows what was written about which image.
"""
import importlib
import os
from dataclasses import asdict

from plumbing.processes import is_main


def connect(config, folder: str):
    """log(step, metrics) and end() of --tracker; on other ranks than the first, two functions that do nothing."""
    if config.tracker == "none" or not is_main():
        return lambda *_: None, lambda: None
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(os.path.join(folder, "tensorboard"))
        return lambda step, metrics: [writer.add_scalar(*each, step) for each in metrics.items()], writer.close
    service = importlib.import_module(config.tracker)  # trackio has wandb's names
    place = {"dir": folder} if config.tracker == "wandb" else {}
    service.init(project="pebr", name=os.path.relpath(folder).replace(os.sep, "-"), config=asdict(config), **place)
    return lambda step, metrics: service.log(metrics, step=step), service.finish
