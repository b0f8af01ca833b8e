"""What uneven lengths cost a step of stage 1 on 8 GPUs, counted in tokens by the program's own functions, on any CPU.

    python speed/rows.py                                              lengths drawn from the distribution of `draw`
    python speed/rows.py --rollouts runs/pebr/stage1/rollouts/*.jsonl  the responses' lengths of a run, prompts drawn

rows    Ranks go from row to row together, so each row takes as long as the fullest rank's. Efficiency: the tokens there
        are, each prompt once, over ranks x the sum of the fullest rows. Questions as they were sampled (rank r has
        r, r + 8, ..) against dealt out anew by their tokens.
queue   Decode steps of one rank with S slots: handed out in chunks and waiting for each chunk's end, or in one queue.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy

from engine.policy import micro_batches
from engine.sampler import BURST
from plumbing.processes import deal

RANKS, QUESTIONS, UPDATE, G, BUDGET, LONGEST = 8, 560, 112, 8, 16384, 2048  # stage 1 on 8 GPUs
CHUNK, SLOTS = QUESTIONS // RANKS, 256  # questions that a rank was handed at a time; responses decoded together


def draw(rng, questions: int) -> tuple[list[int], list[list[int]]]:
    """Lengths of prompts, uniform from 250 to 1,150, and of responses: log-normal, mean 500 (sigma .5 between
    questions, .25 within one), cut to 20 .. 2,048."""
    mean = rng.lognormal(numpy.log(500) - 0.125, 0.5, (questions, 1))
    lengths = numpy.clip(mean * rng.lognormal(-0.03, 0.25, (questions, G)), 20, LONGEST).astype(int)
    return rng.integers(250, 1150, questions).tolist(), lengths.tolist()


def recorded(path: str) -> list[list[int]]:
    """The responses' lengths in a rollout file."""
    with open(path) as file:
        return [[response["tokens"] for response in json.loads(line)["responses"]] for line in file]


def fullest_rows(prompts: list[int], responses: list[list[int]], shares: list[list[int]], budget: int) -> int:
    """Tokens that the ranks wait for, when they hold these shares: the sum over rows of the longest of all ranks."""
    filled = []  # per rank, the tokens of each of its rows
    for share in shares:
        rows = micro_batches([prompts[i] for i in share], [responses[i] for i in share], budget)
        filled.append([sum(prompts[share[q]] + sum(responses[share[q]][g] for g in members) for q, members in row)
                       for row in rows])
    most = max(map(len, filled))
    return sum(max(row) for row in zip(*(rows + [0] * (most - len(rows)) for rows in filled)))


def efficiency(prompts, responses, dealt: bool, ranks=RANKS, update=UPDATE, budget=BUDGET) -> float:
    """Share of all ranks' time in the updates of one step that is spent on tokens of the step."""
    tokens, waited = [p + sum(r) for p, r in zip(prompts, responses)], 0
    for first in range(0, len(tokens), update):
        block = tokens[first : first + update]
        shares = deal(block, ranks) if dealt else [range(r, len(block), ranks) for r in range(ranks)]
        waited += fullest_rows(prompts, responses, [[first + i for i in share] for share in shares], budget)
    return sum(tokens) / (ranks * waited)


def decode_steps(responses: list[list[int]], slots: int) -> int:
    """Steps in which `stream` decodes these responses: G slots for a group, looked at and refilled after each burst."""
    waiting, live, bursts = [[-(-(n - 1) // BURST) for n in group] for group in responses], [], 0
    while waiting or live:
        while waiting and len(live) + len(waiting[0]) <= slots:
            live += [left for left in waiting.pop(0) if left]
        live, bursts = [left - 1 for left in live if left > 1], bursts + bool(live)
    return bursts * BURST


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", nargs="*", help="rollout files of a run, in place of drawn lengths")
    parser.add_argument("--trials", type=int, default=6, help="steps to draw")
    args = parser.parse_args()
    rng, steps = numpy.random.default_rng(0), []
    for path in args.rollouts or [None] * args.trials:
        responses = recorded(path) if path else draw(rng, QUESTIONS)[1]
        steps.append((draw(rng, len(responses))[0], responses))
    print(f"{len(steps)} steps, responses {'recorded' if args.rollouts else 'drawn'}, prompts drawn")
    for name, dealt in (("as they were sampled", False), ("dealt out anew", True)):
        print(f"update, questions {name}: efficiency {numpy.mean([efficiency(*step, dealt) for step in steps]):.3f}")
    responses = [lengths for _, step in steps for lengths in step]
    chunks = sum(decode_steps(responses[i : i + CHUNK], SLOTS) for i in range(0, len(responses), CHUNK))
    for name, count in ((f"in chunks of {CHUNK}", chunks), ("in one queue", decode_steps(responses, SLOTS))):
        print(f"decode steps per {CHUNK} questions, {SLOTS} slots, {name}: {count * CHUNK / len(responses):.0f}")


if __name__ == "__main__":
    main()
