"""Warm-up steps with slow images: prompts encoded by threads while the step before trains, against within each step.

    python speed/encode.py          a planted decode of 50 ms, and real JPEG files of 3000 x 3000 pixels; 2 minutes

The planted decode sleeps, which leaves Python and the cores to others as a decode on an idle core would. The real files
take the cores, so with C cores at most C times less can be had. A tiny model, 16 questions a step, seconds of a step:
the median over all steps but the first and the last (the one waits for its prompts, the other has none to begin).
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy
import torch
from PIL import Image

import data
import demo
import train

QUESTIONS, STEPS = 16, 6


def write_rows(folder: str, side: int) -> str:
    """As many rows as the steps take, each with a JPEG file of noise, which is the slowest to decode."""
    rng, rows = numpy.random.default_rng(0), []
    for i in range(QUESTIONS * STEPS):
        path = os.path.join(folder, f"{side}_{i}.jpg")
        Image.fromarray(rng.integers(0, 256, (side, side, 3), numpy.uint8)).save(path, quality=80)
        answer = "### Image Description: 1 2\n### Rationales: r\n### Step 1: s\n### The final answer is: 7"
        rows.append(dict(messages=[dict(role="user", content="How many?"), dict(role="assistant", content=answer * 4)],
                         images=[path]))
    path = os.path.join(folder, f"{side}.json")
    with open(path, "w") as file:
        json.dump(rows, file)
    return path


def seconds_per_step(folder: str, model: str, rows: str, name: str) -> float:
    """The median of time/step in a run of stage sft."""
    argv = ["--stage", "sft", "--model", model, "--data", rows, "--out", os.path.join(folder, name), "--epochs", "1",
            "--questions_per_rollout", str(QUESTIONS), "--questions_per_update", str(QUESTIONS), "--dtype", "float32",
            "--max_pixels", "100352", "--save_every", "0"]
    assert train.main(argv) == 0
    with open(os.path.join(folder, name, "sft", "metrics.jsonl")) as file:
        return statistics.median([json.loads(line)["time/step"] for line in file][1:-1])


def within_the_step(function, items, most, *rest):
    """In place of `ahead`: each result is computed when it is asked for."""
    return (function(item, *rest) for item in items)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="write the figures to this json file")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as torchrun does, so that the other cores are free for the images
    load_image, ahead, figures = data.load_image, train.ahead, {}
    with tempfile.TemporaryDirectory() as folder:
        processor = demo.make_processor(["How many red circles are there?"])
        model = os.path.join(folder, "model")
        demo.make_model(processor).save_pretrained(model)
        processor.save_pretrained(model)
        for name, side, pause in (("planted decode of 50 ms", 224, 0.05), ("JPEG of 3000 x 3000", 3000, 0.0)):
            rows = write_rows(folder, side)
            data.load_image = lambda image, pause=pause: time.sleep(pause) or load_image(image)
            for way, train.ahead in (("within the step", within_the_step), ("ahead", ahead)):
                figures[f"{name}, {way}"] = seconds_per_step(folder, model, rows, f"{side} {way}")
            before, after = (figures[f"{name}, {way}"] for way in ("within the step", "ahead"))
            print(f"{name}, {os.cpu_count()} cores: {before:.2f} s a step within the step, {after:.2f} s ahead: "
                  f"{before / after:.2f} times faster", flush=True)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(dict(cores=os.cpu_count(), torch=torch.__version__, **figures), file, indent=1)


if __name__ == "__main__":
    main()
