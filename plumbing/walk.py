"""Every tensor of one RL step, printed in the order in which `train.rl_step` makes them: `python demo.py --walk`.

It is the step itself that runs; Python says when one of the functions below returns, and its local variables are shown.
Only the responses are given, because an untrained model would write noise. Symbols: Q questions, G responses to each,
P tokens of a prompt, N response tokens of an optimiser step, T tokens of its packed row, u images, p patches.
"""
import contextlib
import functools
import inspect
import io
import random
import sys
import tempfile

import torch

import data
import rewards
import train
from engine import policy
from engine.memory import make_optimizer
from engine.sampler import Response
from plumbing.processes import stop_processes

TENSORS = {  # function -> its tensors, as they are called there (a.b: an attribute, or an item), with their shapes
    data.encode_prompt: {"input_ids": "P", "position_ids": "3 P", "encoded.pixel_values": "p 1176", "grid_thw": "u 3"},
    rewards.score: {"cosines": "QG", "parts.clip": "QG", "parts.keyword": "QG", "parts.format": "QG",
                    "parts.length": "QG", "parts.accuracy": "QG"},
    train.group_advantages: {"group_rewards": "Q G", "exact": "Q G", "advantages": "Q G"},
    train.make_micro_batches: {"batch.weights": "N", "batch.advantages": "N", "batch.sampler_logprobs": "N"},
    policy.pack: {"ids": "T", "predictors": "N", "targets": "N"},
    policy.Policy.forward: {"inputs.inputs_embeds": "1 T H", "hidden": "1 T H"},
    train.grpo_loss: dict.fromkeys(("logprobs", "old_logprobs", "ref_logprobs", "ratio", "unclipped", "clipped",
                                    "objective", "bounded", "difference", "kl"), "N") | {"loss": "", "stats.kl": ""},
    train.update: {"norm": "", "ratio_max": ""},
}


class Guide:
    """Shows the tensors of TENSORS when their functions return, and asserts that their shapes are those there."""

    def __init__(self, Q: int, G: int):
        self.fixed = {"Q": Q, "G": G, "QG": Q * G}
        self.tensors = {function.__code__: names for function, names in TENSORS.items()}
        self.about = {function.__code__: inspect.getdoc(function).split("\n")[0] for function in TENSORS}

    def __call__(self, frame, event, _):
        if event == "return" and frame.f_code in self.tensors:
            print(f"\n{frame.f_code.co_name}: {self.about[frame.f_code]}")
            sizes = dict(self.fixed)  # within a function a symbol has one size
            for name, shape in self.tensors[frame.f_code].items():
                value = functools.reduce(lambda value, key: value[key] if hasattr(value, "keys") else
                                         getattr(value, key), name.split("."), frame.f_locals)
                tensor = torch.as_tensor(value).detach()
                assert tensor.dim() == len(shape.split()), f"{name}: {tuple(tensor.shape)} is not ({shape})"
                for symbol, size in zip(shape.split(), tensor.shape):
                    known = int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, size)
                    assert known == size, f"{name}: {symbol} is {known}, but {tuple(tensor.shape)}"
                values = [f"{value:.4g}" for value in tensor.flatten().tolist()]
                few = values if len(values) <= 12 else [*values[:6], "..", *values[-3:]]
                size = " ".join(map(str, tensor.shape))
                print(f"    {name:<23}{f'({shape}) = ({size})':<24}{' '.join(few)}")


def walk(argv: list[str], texts: list[list[str]]):
    """One step of `train.py ARGV`, whose questions are answered by texts: for each question its G responses."""
    def given(replica, prompts, longest, seeds, group_size, *settings):
        for q, prompt in enumerate(prompts):
            group = [data.encode_solution(data.Sample("", "", solution=text), run.processor) for text in texts[q]]
            logprobs = iter(replica(policy.pack([(prompt, group)]), run.config.temperature)[0].tolist())
            yield q, [Response(ids, [next(logprobs) for _ in ids], True) for ids in group]

    with contextlib.redirect_stdout(io.StringIO()):  # its notes name temporary files
        run = train.start(train.read_config(argv))
    run.batches, stream, train.stream = [list(range(len(texts)))], train.stream, given
    optimizer, guide = make_optimizer(run.policy, run.config), Guide(len(texts), len(texts[0]))
    for q, sample in enumerate(run.samples):
        print(f"\nquestion {q}: {sample.question} (gold {sample.answer}, key words {', '.join(sample.key_words)})")
        for text in texts[q]:
            print("    " + text.replace("\n", " "))
    sys.setprofile(guide)
    try:
        prompts = [data.encode_prompt(sample, run.processor) for sample in run.samples]
        train.rl_step(run, optimizer, prompts, 0, 1)
    finally:
        sys.setprofile(None)
        train.stream = stream


def show_step(seed: int) -> int:
    """One step of stage 1 with every tensor: two questions; the right response, the teacher's, one without sections."""
    import demo  # which calls this
    with tempfile.TemporaryDirectory() as out:
        demo.make_world(out, seed, captions=8, warmup=8, questions=2, evaluation=1)
        items = demo.make_items(2, seed, "questions")
        demo.save_clip(demo.train_clip(items, seed, steps=1, batch=2), f"{out}/clip")
        texts = [[demo.teach(item.question, item.objects, 0, 0, random.Random(seed)), item.response, item.reasoning]
                 for item in items]
        walk(["--stage", "1", "--model", f"{out}/untrained", "--data", f"{out}/world/questions.jsonl", "--out", out,
              "--clip", f"{out}/clip", "--group_size", "3", "--questions_per_rollout", "2", "--questions_per_update",
              "1", *demo.TRAINING], texts)
    return stop_processes(0)
