"""Mirrors of metrics.jsonl for who watches many runs: --tracker wandb, trackio or tensorboard. None is needed.

The files of the run remain the record, and view.py shows what was written about which image.
"""
import importlib
import os
from dataclasses import asdict

from plumbing.processes import is_main


def connect(config, folder: str):
    """log(step, metrics, rows) and end() of --tracker; on other ranks than the first, two functions that do nothing."""
    if config.tracker == "none" or not is_main():
        return lambda *_: None, lambda: None
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(os.path.join(folder, "tensorboard"))
        return lambda step, metrics, _: [writer.add_scalar(*each, step) for each in metrics.items()], writer.close
    service = importlib.import_module(config.tracker)  # trackio has wandb's names
    place = {"dir": folder} if config.tracker == "wandb" else {}
    service.init(project="pebr", name=os.path.relpath(folder).replace(os.sep, "-"), config=asdict(config), **place)

    def log(step: int, metrics: dict, rows: list[dict]):
        if rows and step % 20 == 0:
            one_question = rows[0]["responses"]
            cells = [list(response.values()) for response in one_question]
            metrics = metrics | {"sample": service.Table(columns=list(one_question[0]), data=cells)}
        service.log(metrics, step=step)
    return log, service.finish
