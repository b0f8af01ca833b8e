"""Parts of a GRPO step against what Hugging Face offers for them, in one run: ratios of medians on this machine.

    python bench/step.py --out bench/results/step_cpu.json

    train    log-probs of one group, forward and backward: packed with a shared prompt, against a padded batch of G rows
    rollout  G responses to each prompt: the slot sampler, against generate(num_return_sequences=G)

Both sides have the same weights, prompts and response lengths. The model is the demo's tiny Qwen2.5-VL, untrained.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

import data
import world
from model import Policy, pack
from rollout import generate, seed_of

G = 8


def compare(ours, theirs, repeats: int) -> dict[str, float]:
    """Median seconds of two functions run in turn, after one unmeasured run each."""
    seconds = {ours: [], theirs: []}
    for round_ in range(repeats + 1):
        for function, times in seconds.items():
            start = time.perf_counter()
            function()
            if round_:
                times.append(time.perf_counter() - start)
    mine, other = (statistics.median(times) for times in seconds.values())
    return dict(ours_s=mine, theirs_s=other, ratio=other / mine)


def make_prompt(processor, side: int, length: int, seed: int):
    """A prompt of exactly `length` tokens with a noise image of side x side pixels."""
    noise = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    sample = data.Sample("q", "", (Image.fromarray(noise.numpy()),))
    short = length - len(data.encode_prompt(sample, processor).input_ids)
    assert short >= 0, f"an image of side {side} alone takes more than {length} tokens"
    prompt = data.encode_prompt(data.Sample("q", "~" * short, sample.images), processor)  # one token each: no merges
    assert len(prompt.input_ids) == length, f"{len(prompt.input_ids)} tokens instead of {length}"
    return prompt


def bench_train(policy, theirs, processor, prompt_length: int, response_length: int, repeats: int) -> dict:
    """Forward and backward of one group: a shared prompt of prompt_length and G responses around response_length."""
    prompt = make_prompt(processor, 448, prompt_length, 0)
    lengths = [response_length + delta for delta in (-20, -12, -6, -2, 2, 6, 12, 20)]
    responses = [[(7 * i + j) % 200 for j in range(n)] for i, n in enumerate(lengths)]
    packed = pack([(prompt, responses)])
    longest = max(lengths)
    ids = torch.tensor([prompt.input_ids + response + [0] * (longest - len(response)) for response in responses])
    mask = torch.tensor([[1] * (prompt_length + n) + [0] * (longest - n) for n in lengths])
    pixels, grid = prompt.pixel_values.repeat(G, 1), prompt.grid_thw.repeat(G, 1)
    real = mask[:, prompt_length:].bool()  # (G, longest)

    def ours():
        logprobs, _ = policy(packed)
        logprobs.sum().backward()
        return logprobs.detach()

    def padded():
        logits = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grid,
                        mm_token_type_ids=(ids == theirs.config.image_token_id).int(),
                        logits_to_keep=longest + 1).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, prompt_length:, None])[..., 0]
        (logprobs * real).sum().backward()
        return logprobs.detach()[real]

    difference = float((ours() - padded()).abs().max())
    assert difference < 1e-3, f"the two do not compute the same: log-probs differ by {difference}"
    return dict(prompt=prompt_length, responses=lengths, largest_logprob_difference=difference,
                **compare(ours, padded, repeats))


def bench_rollout(replica, theirs, processor, questions: int, slots: int, tokens: int, stop: float,
                  repeats: int) -> dict:
    """G responses of up to `tokens` to each question; the end token has about probability `stop` at each step."""
    prompts = [make_prompt(processor, 112, 80, seed) for seed in range(questions)]
    ids = torch.tensor([prompt.input_ids for prompt in prompts])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids),
                  mm_token_type_ids=(ids == replica.config.image_token_id).int(),
                  pixel_values=torch.cat([p.pixel_values for p in prompts]),
                  image_grid_thw=torch.cat([p.grid_thw for p in prompts]))
    ends = [token for token in range(int(stop * len(processor.tokenizer)))] or [len(processor.tokenizer)]
    replica.generation_config.eos_token_id = theirs.generation_config.eos_token_id = ends

    def ours():
        seeds = [seed_of(i) for i in range(questions)]
        return generate(replica, prompts, seeds, G, tokens, 1.0, 1.0, slots, len(processor.tokenizer))

    def hugging_face():
        torch.manual_seed(0)
        return theirs.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=G,
                               max_new_tokens=tokens)

    lengths = [len(response.ids) for reply in ours() for response in reply]
    return dict(questions=questions, slots=slots, max_new_tokens=tokens, mean_length=statistics.fmean(lengths),
                **compare(ours, hugging_face, repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the figures to this json file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        processor = world.make_processor(["How many red circles are there?"])
        world.make_model(processor, initializer_range=0.02).save_pretrained(folder)  # near uniform: `stop` sets lengths
        processor.save_pretrained(folder)
        processor = data.load_processor(folder, 28 * 28, 448 * 448)
        policy, replica = (Policy.load(folder, "cpu", torch.float32) for _ in range(2))
        theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    prompt_length, response_length, tokens = (300, 30, 16) if args.smoke else (368, 123, 256)
    results = {
        "train, packed against padded": bench_train(policy, theirs, processor, prompt_length, response_length,
                                                    args.repeats),
        "rollout, all of equal length": bench_rollout(replica, theirs, processor, 24, 24 * G, tokens // 4, 0.0,
                                                      args.repeats),
        "rollout, long tail": bench_rollout(replica, theirs, processor, 16, 64, tokens, 0.02, args.repeats),
    }
    machine = dict(cpu=platform.processor() or platform.machine(), cores=os.cpu_count(), threads=args.threads,
                   torch=torch.__version__, transformers=transformers.__version__)
    print(" ".join(f"{name}={value}" for name, value in machine.items()))
    for name, result in results.items():
        print(f"{name:<32} ours {result['ours_s']:.3f} s  theirs {result['theirs_s']:.3f} s  "
              f"ratio {result['ratio']:.2f}")
    if args.out:
        with open(args.out, "w") as f:
            json.dump(dict(machine=machine, results=results), f, indent=1)


if __name__ == "__main__":
    main()
