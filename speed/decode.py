"""Decode tokens per second of the sampler against what the memory's bandwidth allows, and without CUDA graphs.

    python speed/decode.py --shapes 3b 7b --out decode.json       one GPU, random weights, a minute
    python speed/decode.py --smoke                                tiny sizes on a CPU, for a test

A burst of engine/sampler.py is timed with LIVE keys in every slot. One step of S slots has to read the decoder's and
the head's weights once and each slot's keys and values once, so that with W bytes of weights, K bytes of a token's keys
and values and B bytes per second (of this machine's copy, measured first: it counts what is read and what is written)
    bound = S / ((W + S LIVE K) / B)    tokens per second
On an H100, B about 3.35e12, that is some 33 thousand for 256 slots of the 7B and 62 thousand of the 3B: arithmetic. The
aim is half of the bound.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from transformers import AttentionInterface

import demo
from engine.policy import ATTENTION, attention, policy_class
from engine.sampler import BURST, Decoder, Slots, capture
from engine.weights import model_config
from logprob import machine_rates, milliseconds

HERE = os.path.dirname(os.path.abspath(__file__))
LIVE = 800  # keys in a slot: an image and a question of 400 tokens, and a response half done


def shape_config(shape: str):
    if shape == "tiny":
        return demo.make_model(demo.make_processor(["How many red circles are there?"])).config
    return model_config(os.path.join(HERE, "configs", f"qwen2.5-vl-{shape}.json"))


def random_replica(config, device, dtype):
    """The sampler's copy with drawn weights, made where it is used: nothing is read or written."""
    AttentionInterface.register(ATTENTION, attention)
    with torch.device(device):
        replica = policy_class(config.model_type)._from_config(config, dtype=dtype)
    replica.model.language_model.config._attn_implementation = ATTENTION
    return replica.eval()


def bytes_of_step(replica, slots: int, live: int) -> int:
    """What one decode step has to read; of the embeddings, where they are not the head, next to nothing."""
    itemsize = replica.dtype.itemsize
    layers = sum(p.numel() for p in replica.model.language_model.layers.parameters())
    kv = 2 * sum(layer.self_attn.k_proj.out_features for layer in replica.model.language_model.layers)
    return itemsize * (layers + replica.lm_head.weight.numel() + slots * live * kv)


@torch.no_grad()
def measure(config, replica, slots: int, live: int, graphs: bool, rate: float, device, repeats: int) -> dict:
    """One row: seconds of a burst at `live` keys in each of `slots` slots."""
    state = Slots(replica, slots, live + 4 * BURST, 4 * BURST)
    decoder = Decoder(replica, state, 1.2, 0.99, config.text_config.vocab_size)
    burst = capture(decoder) if graphs else decoder.burst

    def timed():
        state.length.fill_(live - BURST // 2)  # on average of the burst's steps: live
        state.drawn.zero_()
        burst()

    seconds = milliseconds(timed, device, repeats, 1) / 1e3
    bound = slots * rate / bytes_of_step(replica, slots, live)
    tokens = slots * BURST / seconds
    return dict(slots=slots, live_keys=live, cuda_graphs=graphs, tokens_per_s=tokens, bound_tokens_per_s=bound,
                of_bound=tokens / bound, ms_per_step=1e3 * seconds / BURST)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the figures to this json file, after every row")
    parser.add_argument("--shapes", nargs="+", default=["3b", "7b"], choices=["3b", "7b", "tiny"])
    parser.add_argument("--slots", nargs="+", type=int, default=[256, 176, 64])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for a test")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, slots, live = (["tiny"], [4, 2], 16) if args.smoke else (args.shapes, args.slots, LIVE)
    rate = machine_rates(device, args.smoke)["bytes"]
    results = dict(copy_bytes_per_s=rate, rows=[])
    print(f"copy {rate / 1e12:.3f} TB/s", flush=True)
    for shape in shapes:
        config = shape_config(shape)
        replica = random_replica(config, device, torch.bfloat16)
        for S, graphs in [*((S, True) for S in slots), (slots[0], False)]:
            try:
                row = measure(config, replica, S, live, graphs, rate, device, 1 if args.smoke else 20)
            except torch.OutOfMemoryError:
                row = dict(slots=S, failed="out of memory")
            results["rows"].append(dict(shape=shape) | row)
            print(" ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                           for name, value in results["rows"][-1].items()), flush=True)
            if args.out:
                with open(args.out, "w") as f:
                    json.dump(results, f, indent=1)
        del replica
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
