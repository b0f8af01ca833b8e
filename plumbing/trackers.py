"""Mirrors of metrics.jsonl for who watches many runs: --tracker wandb, trackio or tensorboard. None is needed.

Every EVERY steps one question goes along, with its images and all responses. The files of the run remain the record.
"""
import importlib
import os
from dataclasses import asdict

import numpy

from data import load_image

EVERY = 20  # steps from one question to the next
COLUMNS = ("text", "reward", "advantage", "clip", "keyword", "format", "length", "accuracy")


def cells_of(row: dict) -> list[list]:
    return [[response.get(name) for name in COLUMNS] for response in row["responses"]]


class Service:
    """wandb, and trackio, which has its names. Their own variables, such as WANDB_MODE, say where it all goes."""

    def __init__(self, config, folder: str):
        self.service = importlib.import_module(config.tracker)
        place = {"dir": folder} if config.tracker == "wandb" else {}
        name = os.path.relpath(folder).replace(os.sep, "-")
        self.service.init(project="pebr", name=name, config=asdict(config), **place)

    def log(self, step: int, metrics: dict, rows: list[dict]):
        known = {name: value for name, value in metrics.items() if value is not None}
        if rows and step % EVERY == 0:
            images = [self.service.Image(load_image(path)) for path in rows[0]["images"]]
            cells = [[rows[0]["question"], *images, *cells] for cells in cells_of(rows[0])]
            names = ["question", *(f"image {i}" for i in range(1, len(images) + 1)), *COLUMNS]
            known["sample"] = self.service.Table(columns=names, data=cells)
        self.service.log(known, step=step)

    def end(self):
        self.service.finish()


class Tensorboard:
    """Files that `tensorboard --logdir` shows, in the stage's folder."""

    def __init__(self, config, folder: str):
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard

        self.writer = SummaryWriter(os.path.join(folder, "tensorboard"))

    def log(self, step: int, metrics: dict, rows: list[dict]):
        for name, value in metrics.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        if rows and step % EVERY == 0:
            lines = [COLUMNS, ["---"] * len(COLUMNS), *cells_of(rows[0])]
            table = "\n".join("| " + " | ".join(" ".join(str(cell).split()) for cell in line) + " |" for line in lines)
            self.writer.add_text("sample", f"{rows[0]['question']}\n\n{table}", step)
            for i, path in enumerate(rows[0]["images"], 1):
                self.writer.add_image(f"sample/image {i}", numpy.asarray(load_image(path)), step, dataformats="HWC")

    def end(self):
        self.writer.close()


def connect(config, folder: str):
    """The tracker of --tracker, or None."""
    if config.tracker == "none":
        return None
    return (Tensorboard if config.tracker == "tensorboard" else Service)(config, folder)
