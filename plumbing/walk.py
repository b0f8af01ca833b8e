"""Every tensor of one RL step, printed in the order in which `train.rl_step` makes them: `python demo.py --walk`.

It is the step itself that runs; only its responses are given, because an untrained model would write noise. Symbols:
Q questions, G responses to each, P tokens of a prompt, N response tokens of an optimiser step, T tokens of its packed
row, u images, p patches.
"""
import contextlib
import io
import random
import sys
import tempfile

import torch

import data
import rewards
import train
from engine import policy
from engine.plan import make_optimizer
from engine.sampler import Response

TENSORS = {  # function -> its tensors, as they are called there (a.b: an attribute, or an item), with their shapes
    data.encode_prompt: {"input_ids": "P", "position_ids": "3 P", "encoded.pixel_values": "p 1176", "grid_thw": "u 3"},
    rewards.score: {"cosines": "QG", "parts.clip": "QG", "parts.keyword": "QG", "parts.format": "QG",
                    "parts.length": "QG", "parts.accuracy": "QG"},
    train.group_advantages: {"group_rewards": "Q G", "exact": "Q G", "advantages": "Q G"},
    train.make_micro_batches: {"batch.weights": "N", "batch.advantages": "N"},
    policy.pack: {"ids": "T", "predictors": "N", "targets": "N"},
    policy.Policy.forward: {"inputs.inputs_embeds": "1 T H", "hidden": "1 T H"},
    train.grpo_loss: dict.fromkeys(("logprobs", "old_logprobs", "ref_logprobs", "ratio", "unclipped", "clipped",
                                    "objective", "bounded", "difference", "kl"), "N") | {"loss": "", "stats.kl": ""},
    train.update: {"norm": "", "ratio_max": ""},
}


def show(frame, event: str, _):
    """Prints the tensors of TENSORS when their function returns."""
    function = next((each for each in TENSORS if each.__code__ is frame.f_code), None)
    if event != "return" or function is None:
        return
    print(f"\n{function.__name__}: {function.__doc__.splitlines()[0]}")
    for name, shape in TENSORS[function].items():
        value = frame.f_locals
        for key in name.split("."):
            value = value[key] if hasattr(value, "keys") else getattr(value, key)
        tensor = torch.as_tensor(value).detach()
        size, few = " ".join(map(str, tensor.shape)), [f"{value:.4g}" for value in tensor.flatten()[:9].tolist()]
        print(f"    {name:<23}{f'({shape}) = ({size})':<24}{' '.join(few)}{' ..' * (tensor.numel() > 9)}")


def show_step(seed: int) -> int:
    """One step of stage 1 with every tensor: two questions; the right response, the teacher's, one without sections."""
    import demo  # which calls this

    def given(replica, prompts, *settings):
        for q in range(len(prompts)):
            ids = [data.encode_solution(data.Sample("", "", solution=text), run.processor) for text in texts[q]]
            yield q, [Response(each, [0.0] * len(each), True) for each in ids]

    with tempfile.TemporaryDirectory() as out:
        world = demo.World(sizes=dict(captions=8, warmup=8, questions=2, evaluation=1))
        demo.make_world(out, seed, world)
        items = demo.make_items(2, seed, "questions")
        demo.save_clip(demo.train_clip(items, seed, 1, world, batch=2), f"{out}/clip", world)
        texts = [[demo.teach(item.question, item.objects, 0, 0, random), item.response, item.reasoning]
                 for item in items]
        argv = (f"--stage 1 --model {out}/untrained --data {out}/world/questions.jsonl --out {out} --clip {out}/clip "
                "--group_size 3 --questions_per_rollout 2 --questions_per_update 1").split()
        with contextlib.redirect_stdout(io.StringIO()):  # its notes name temporary files
            run = train.start(train.read_config([*argv, *demo.TRAINING]))
        run.batches, train.stream = [[0, 1]], given
        for q, sample in enumerate(run.samples):
            print(f"\nquestion {q}: {sample.question} (gold {sample.answer}, key words {', '.join(sample.key_words)})")
            print("\n".join("    " + text.replace("\n", " ") for text in texts[q]))
        sys.setprofile(show)
        prompts = [data.encode_prompt(sample, run.processor) for sample in run.samples]
        train.rl_step(run, make_optimizer(run.policy, run.config), prompts, 0, 1)
        sys.setprofile(None)
    return 0
