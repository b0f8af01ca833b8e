"""PeBR-R1, perception before reasoning: a vision-language model learns to see first, and then to reason.

    torchrun --nproc_per_node 8 train.py --stage sft     supervised warm-up: the format      -> runs/pebr/sft/model
    torchrun --nproc_per_node 8 train.py --stage sample  8 rollouts sort easy, medium, hard  -> runs/pebr/sample/*.jsonl
    torchrun --nproc_per_node 8 train.py --stage 1       perception RL on the easy questions -> runs/pebr/stage1/model
    torchrun --nproc_per_node 8 train.py --stage 2       reasoning RL on the medium ones     -> runs/pebr/stage2/model

GRPO in seven lines, for one question; `rl_step` is these lines for many questions and many GPUs:
    responses  = [sample(policy, question) for _ in range(8)]
    rewards    = [score(response) for response in responses]           stage 1: description and form; stage 2: answer
    advantages = (rewards - mean(rewards)) / std(rewards)              better than its siblings?
    ratio      = exp(logprob(policy) - logprob(policy that sampled))   per token, from here on
    objective  = min(ratio * advantage, clip(ratio, 0.8, 1.3) * advantage)
    loss       = mean over all tokens of (-objective + 0.01 * KL(policy, reference))
    policy     = policy - learning_rate * gradient(loss)

Where all responses to a question are right, or all are wrong, accuracy gives no advantage and so no gradient. That is
why there are two stages: what is always answered right is rewarded for seeing, what sometimes is for the answer.

The release is the authors' own code; docs/differences.md says where this differs. Ranks, micro-batch sizes and resumes
change the result by rounding only, because random numbers are functions of (seed, step, index), the loss is divided by
a count over all ranks, and gradients are summed.
"""
import dataclasses
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import data
import rewards
from data import InputError, Prompt, Sample, seed_of
from engine.clip import load_clip
from engine.plan import GB, fit_plan, load_models, make_optimizer, shape_of, table
from engine.policy import Group, Policy, choose_loss, dummy_group, micro_batches, pack
from engine.sampler import stream, sync
from engine.weights import export, find_model, load_checkpoint, load_processor, save_checkpoint
from grading.algebra import check_rule, grader_counts
from grading.equal import correct
from plumbing import filters
from plumbing.flags import complain, read_stage
from plumbing.log import Log, check_skipped, mean, records, step_metrics
from plumbing.processes import (TOLD, Stopped, Timer, ahead, barrier, broadcast, ending_together, fair_shares, gather,
                                is_main, on_every_rank, print0, progress, shard_of_rank, start_processes,
                                stop_processes, stop_together, sum_over_ranks, told_to_stop)
from plumbing.run_folder import (check_folder, check_space, checkpoints, complete_files, fingerprints, kept,
                                 prepare_folder, replace_buckets, run_id)

# ------------------------------------------------------------------------------- settings and stages


@dataclass(frozen=True)
class Sampling:
    """What asking a model questions and scoring its responses needs. clip is CLIP here; clip_ratio_* is PPO's clip."""

    # model
    model: str = ""  # Hugging Face folder or hub name
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of computing, sampling and export; master weights are float32
    min_pixels: int = 576  # images are resized to between min and max pixels, the same everywhere
    max_pixels: int = 802816  # at most 1024 tokens of 28 x 28 pixels
    prompt: Literal["own", "release"] = "own"  # text around a question; the release's has images after it
    # data
    data: str = ""  # json, jsonl, parquet, folder or hub data set; of files several, with commas between
    split: str = "train"  # of a folder or a hub data set
    image_root: str = ""  # what image paths are relative to, one or one each; empty: the folder of the data file
    max_prompt: int = 2048  # tokens; longer prompts are dropped before the run, never cut
    # sampling
    group_size: int = 8  # G, responses per question (pebr_stage1.yaml: n)
    max_response: int = 2048  # tokens, at most
    temperature: float = 1.2  # divides the logits, in sampling and in all log-probs of training
    top_p: float = 0.99  # of sampling only
    seed: int = 0  # of all random numbers
    # rewards
    clip: str = "qihoo360/fg-clip-large"  # FG-CLIP folder or hub name, open_clip folder, or open_clip name:pretrained
    clip_target: float = 0.4  # cosine that earns the whole clip part (pebr_1.py)
    length_limit: int = 512  # tokens up to which the length part is 1 (pebr_1.py)
    keyword_scope: Literal["description", "response"] = "description"  # where key words count, as whole words
    rules: Literal["own", "release"] = "own"  # of clip, keyword and format; the release's: rewards.release_parts
    grader: Literal["own", "release"] = "own"  # the accuracy rule: grading/, or mathruler (to be installed)
    # memory
    slots: int = 0  # responses decoded together on one GPU; 0: as many as its memory has room for, at most 256
    cuda_graphs: bool = True  # on a GPU, replay captured decoding; the same tokens up to rounding, only faster
    # run
    patience: float = 60.0  # minutes that a rank which is done waits for the others, before the run ends
    grace: float = 120.0  # seconds that SIGTERM or Ctrl-C leave to end the step and save it; a second ends at once


@dataclass(frozen=True)
class Config(Sampling):
    """Every number that affects training. The model is also the reference policy of RL."""

    # run
    stage: str = ""  # sft, sample, 1 or 2; to be given
    parity: Literal["none", "release"] = "none"  # release: all settings of plumbing/release.py
    out: str = "runs/pebr"  # everything is written below this folder
    restart: bool = False  # begin anew instead of resuming; the old run stays beside it, as FOLDER.before-restart
    save_every: int = 0  # steps between checkpoints to resume from; 0: none
    eval_data: str = ""  # held-out questions, asked greedily during training; the figures are eval/*
    eval_every: int = 0  # evaluate eval_data every so many steps, and after the last; 0: never
    eval_questions: int = 256  # so many of eval_data, always the same
    tracker: Literal["none", "wandb", "trackio", "tensorboard"] = "none"  # mirrors metrics
    # data
    questions_per_rollout: int = 560  # Q, per step, in the warm-up as well (pebr_stage1.yaml: rollout_batch_size)
    questions_per_update: int = 112  # questions per optimiser step (pebr_stage1.yaml: global_batch_size)
    epochs: int = 1  # passes over the data
    drop_last: bool = False  # leave out what fills no batch of an epoch, or of stage sample, as the release
    cutoff: int = 0  # tokens of prompt and solution in the warm-up, the end is cut; 0: longer rows are dropped
    allow_text: bool = False  # with a CLIP weight, keep questions without an image, whose clip part is 0
    max_steps: int = 0  # stop after this many steps; 0: after the epochs
    # rewards
    clip_weight: float = 0.0  # in the reward's sum, of: does the description match the image?
    keyword_weight: float = 0.0  # of: does the description name what matters?
    format_weight: float = 0.0  # of: are all sections there?
    length_weight: float = 0.0  # of: is the response short enough?
    accuracy_weight: float = 0.0  # of: is the answer right?
    # GRPO
    advantage_dtype: Literal["float64", "float32"] = "float64"  # float32 as in the release: its rounding teaches
    clip_ratio_low: float = 0.2  # the ratio is clipped at 1 - this (verl actor/config.py)
    clip_ratio_high: float = 0.3  # and at 1 + this
    clip_ratio_c: float = 3.0  # dual clip: bounds the loss of bad tokens whose ratio explodes
    kl_coef: float = 0.01  # weight of the KL to the reference policy (pebr_stage1.yaml); 0 loads no reference
    fused_loss: Literal["auto", "on", "off"] = "auto"  # on a GPU, Triton's twin of grpo_loss; auto: if both agree
    # optimiser
    lr: float = 1e-6  # learning rate of AdamW
    lr_decay: Literal["constant", "cosine"] = "constant"  # cosine goes to 0
    warmup_ratio: float = 0.0  # share of the optimiser steps over which lr rises from 0
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 1.0  # a longer gradient is shortened to this norm
    freeze_vision: bool = False  # train the language model only
    # LoRA
    lora_rank: int = 0  # of adapters beside frozen weights, which alone are then trained; 0: train all weights
    lora_alpha: float = 32.0  # adapters are scaled by this / lora_rank
    lora_targets: str = "all-linear"  # of the decoder layers; or attention, or names such as q_proj,v_proj
    lora_vision: bool = False  # adapters in the vision tower as well
    # memory
    recipe: Literal["none", "small"] = "none"  # settings to start from, beside the stage's: RECIPES
    gradient_checkpointing: bool = True  # compute activations again in the backward instead of keeping them
    token_budget: int = 16384  # tokens in one packed row; changes memory and speed, not the result
    plan: bool = False  # print the memory plan and stop; needs no data, no weights and no GPU
    gpus: int = 8  # of the plan
    gpu_gb: float = 80.0  # of the plan, memory of one GPU


STAGES = {
    "sft": dict(  # qwen2_5vl_full_sft.yaml: 4 per device x 4 accumulation x 8 GPUs
        model="Qwen/Qwen2.5-VL-7B-Instruct", data="HuanjinYao/Mulberry-SFT", epochs=2, questions_per_rollout=128,
        questions_per_update=128, lr=1e-5, lr_decay="cosine", warmup_ratio=0.1, freeze_vision=True, save_every=500),
    "sample": dict(model="{out}/sft/model", data="cythu/PeBR_R1_dataset"),  # pebr_sample.yaml
    "1": dict(  # pebr_stage1.yaml, pebr_1.py
        model="{out}/sft/model", data="{out}/sample/easy.jsonl", save_every=10,
        clip_weight=0.4, keyword_weight=0.4, format_weight=0.1, length_weight=0.1),
    "2": dict(  # pebr_stage2.yaml, pebr_2.py
        model="{out}/stage1/model", data="{out}/sample/medium.jsonl", save_every=10, epochs=2,
        questions_per_rollout=512, questions_per_update=128, accuracy_weight=0.9, format_weight=0.1),
}
RECIPES = {"none": {}, "small": dict(lora_rank=16, token_budget=8192)}  # small: all stages of a 3B on one 24 GB card
FOLDERS = {"sft": "sft", "sample": "sample", "1": "stage1", "2": "stage2"}  # below config.out
# A setting NAME_weight makes NAME a part of the reward: rewards.score computes it under this name.
PARTS = tuple(name.removesuffix("_weight") for name in Config.__annotations__ if name.endswith("_weight"))
CHUNK = 16  # finished questions that are scored together, and by eval.py written to disk

# ------------------------------------------------------------------------------- GRPO, as equations


def group_advantages(group_rewards: Tensor, dtype: str = "float64") -> Tensor:
    """Eq. ADVANTAGE: how much better a response is than its group, in standard deviations. (Q, G) -> (Q, G).

    A = (R - mean_group) / (std_group + 1e-6), std with G - 1 (verl core_algos.py: compute_grpo_outcome_advantage).
    In float64, because in float32 the mean of eight times 0.7 is not 0.7, and the division would turn that rounding
    error into an advantage of 0.05: a group of equal rewards must teach nothing.
    """
    Q, G = group_rewards.shape
    assert G >= 2, f"{G=}: a group needs at least 2 responses to compare"
    exact = group_rewards.to(getattr(torch, dtype))
    advantages = (exact - exact.mean(-1, keepdim=True)) / (exact.std(-1, keepdim=True) + 1e-6)  # Eq. ADVANTAGE
    return advantages.to(group_rewards.dtype)


def grpo_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, weights: Tensor,
              clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float,
              kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped, KL-regularised policy loss of N response tokens: a scalar, and its statistics as weighted sums.

    All are (N,); weights: 1 / (response tokens of the optimiser step, all ranks), 0 for padding (verl core_algos.py).
    The clip stops a token that has already moved far enough in the right direction; the dual clip stops a bad token
    whose ratio explodes. Clamps prevent overflow, and a clamped token has no gradient.
    On a GPU its twin in kernels/grpo.py runs, after a comparison at the start has found both equal (--fused_loss).
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # Eq. RATIO
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high) * advantages
    objective = torch.minimum(unclipped, clipped)  # Eq. CLIP
    bounded = torch.where(advantages < 0, torch.maximum(objective, clip_ratio_c * advantages), objective)  # Eq. DUAL
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    kl = (difference.exp() - difference - 1).clamp(max=10)  # Eq. KL3
    loss = (weights * (-bounded + kl_coef * kl)).sum()  # Eq. LOSS
    with torch.no_grad():
        active = clipped < unclipped  # the clip is the smaller one, so the token has no gradient (dual not counted)
        stats = {
            "kl": (weights * kl).sum(),
            "clip_low": (weights * (active & (advantages < 0))).sum(),
            "clip_high": (weights * (active & (advantages > 0))).sum(),
            "ratio_max": torch.where(weights > 0, ratio, 0.0).max(),
        }
    return loss, stats


def sft_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Eq. SFT: cross-entropy of the solution's tokens, the end token included. Both (N,) -> scalar."""
    return -(weights * logprobs).sum()  # Eq. SFT


def learning_rate(config: Config, index: int, updates: int) -> float:
    """Rate of optimiser step `index` of `updates`: a linear rise, then constant or a cosine to 0."""
    rise = max(1, round(config.warmup_ratio * updates))
    lr = config.lr * min(1.0, (index + 1) / rise)
    if config.lr_decay == "cosine" and index >= rise:
        lr *= 0.5 * (1 + math.cos(math.pi * (index - rise) / max(1, updates - rise)))
    return lr


# ---------------------------------------------------- collect: questions in, rewarded responses out


def collect(replica, processor, clip, samples: list[Sample], prompts: Iterable[Prompt], seeds: list[int], config,
            timer: Timer) -> Iterator[list[rewards.Answered]]:
    """Sample G responses to each question and score them. The same code trains, sorts questions and evaluates.
    Questions come as they are finished, CHUNK at a time; then sampling goes on where it was. `sorted` orders them."""
    longest = max((data.prompt_length(sample, processor) for sample in samples), default=0)
    groups = stream(replica, prompts, longest, seeds, config.group_size, config.max_response, config.temperature,
                    config.top_p, config.slots, len(processor.tokenizer), config.cuda_graphs)
    for _ in range(0, len(samples), CHUNK):
        if timer.stoppable and told_to_stop():
            break
        with timer("rollout"):
            finished = list(islice(groups, CHUNK))
        with timer("reward"):
            answered = rewards.judge(samples, finished, processor.tokenizer, clip, config)
        yield answered
    with timer("wait"):  # for the ranks with longer responses
        barrier(config.patience)
    if timer.stoppable:
        stop_together()


def ask(replica, processor, clip, samples: list[Sample], config, purpose: str) -> Iterator[list[rewards.Answered]]:
    """Graded responses to this rank's share of the questions, as `collect` yields them. A seed depends on the purpose
    and the question alone: an interrupted run asks the rest as if nothing had happened."""
    share = shard_of_rank(samples)
    seeds = [seed_of(config.seed, purpose, sample.qid) for sample in share]
    prompts = progress(ahead(data.encode_prompt, share, CHUNK, processor), purpose, len(share))
    timer = Timer(f"{len(share)} questions", stoppable=purpose != "evaluate")  # that is a part of a step
    return collect(replica, processor, clip, share, prompts, seeds, config, timer)


# ---------------------------------------------- micro-batches, and one optimiser step on some of them


@dataclass
class MicroBatch:
    """Groups that go through the model in one packed row, and what the loss needs of their N response tokens."""
    groups: list[Group]  # laid end to end by engine.policy.pack
    weights: Tensor  # (N,) 1 / response tokens of the optimiser step on all ranks; 0 in a dummy
    advantages: Tensor  # (N,) each token has that of its response
    sampler_logprobs: Tensor  # (N,) the sampler's, before top-p, which no log-prob of training knows
    old_logprobs: Tensor | None = None  # (N,) before the first update on this rollout; None: it is the first
    ref_logprobs: Tensor | None = None  # (N,) under the reference policy; None: there is none


def make_micro_batches(groups: list[Group], token_budget: int, device, advantages: Tensor | None = None,
                       sampled: list[list[float]] | None = None) -> list[MicroBatch]:
    """Cut one optimiser step's groups into rows of at most token_budget tokens.

    A collective: all ranks need equally many forwards, and a rank that is short of work gets dummies of weight 0.
    Of RL: advantages (Q, G), and sampled, the sampler's log-probs of each of the Q G responses.
    """
    lengths = [[len(ids) for ids in responses] for _, responses in groups]  # Q x G
    # One denominator for all micro-batches of all ranks, whose gradients FSDP adds up.
    tokens = sum_over_ranks({"tokens": sum(map(sum, lengths))})["tokens"]
    batches = []
    for row in micro_batches([len(prompt.input_ids) for prompt, _ in groups], lengths, token_budget):
        part = [(groups[q][0], [groups[q][1][g] for g in members]) for q, members in row] or [dummy_group()]
        zeros = torch.zeros(sum(len(ids) for _, responses in part for ids in responses), device=device)
        batch = MicroBatch(part, zeros + (1 / tokens if row else 0.0), zeros, zeros)
        if row and advantages is not None:
            chosen, G = [(q, g) for q, members in row for g in members], advantages.shape[1]
            batch.advantages = torch.cat([advantages[q, g].expand(lengths[q][g]) for q, g in chosen]).to(device)
            batch.sampler_logprobs = torch.tensor([x for q, g in chosen for x in sampled[q * G + g]], device=device)
        batches.append(batch)
    return batches


def update(policy, optimizer, batches: list[MicroBatch], loss_fn: Callable, lr: float, temperature: float,
           max_grad_norm: float, device) -> dict[str, float]:
    """One optimiser step on the micro-batches of all ranks together. Returns its statistics, equal on all ranks.

    loss_fn(logprobs, batch, rows) -> the loss of the tokens `rows` (a slice) of a micro-batch, and statistics that add
    up over tokens (ratio_max apart). The model calls it chunk by chunk, while a chunk's logits are there.
    """
    totals, ratio_max = defaultdict(lambda: torch.zeros((), device=device)), torch.zeros((), device=device)
    for batch in batches:
        def chunk_loss(logprobs, entropies, rows):
            nonlocal ratio_max
            loss, stats = loss_fn(logprobs, batch, rows)
            ratio_max = torch.maximum(ratio_max, stats.pop("ratio_max", ratio_max))
            stats |= dict(loss=loss, entropy=(batch.weights[rows] * entropies).sum(),
                          tokens=(batch.weights[rows] > 0).sum())
            for name, value in stats.items():
                totals[name] += value.detach()
            return loss

        policy(pack(batch.groups, device), temperature, chunk_loss)[0].backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    finite_norm = bool(norm.isfinite())  # of all ranks' gradients together, so all ranks decide alike
    if finite_norm:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(ratio_max, dist.ReduceOp.MAX)
    return sum_over_ranks(totals) | dict(ratio_max=ratio_max.item(), grad_norm=norm.item(), lr=lr,
                                         skipped=float(not finite_norm))


# ------------------------------------------------- a run: what the stages share, and three kinds of step


@dataclass
class Run:
    """What a stage works with."""
    config: Config
    folder: str  # the stage's own folder below config.out
    prints: dict[str, str]  # fingerprints of rows, prompt and weights
    device: torch.device
    processor: object
    samples: list[Sample]
    held_out: list[Sample]  # what --eval_data asks
    batches: list[list[int]]  # which samples each step of training takes
    policy: Policy | None  # sharded, trained
    ref_policy: Policy | None  # sharded, frozen
    replica: Policy | None  # whole, draws the responses
    clip: object  # engine.clip.ClipScorer or None
    grpo_loss: Callable  # the one above, or its twin on a GPU


def start(config: Config) -> Run:
    """Load and check everything that a stage needs; nothing of an earlier run is touched yet."""
    check_rule(config.grader)
    device, mesh = start_processes()  # joined in main; here for its device and mesh
    print0(f"{dist.get_world_size()} process(es) on {device.type}")
    folder = find_model(config.model)
    processor = load_processor(folder, config.min_pixels, config.max_pixels, config.prompt)
    samples = data.load_samples(config.data, config.image_root, config.split)
    samples = filters.usable(samples, config, processor, correct, log=print0)
    held_out = filters.held_out(config, processor, log=print0)
    batches = []
    if config.stage != "sample":
        batches = data.batches(len(samples), config.questions_per_rollout, config.epochs, config.seed, config.drop_last)
        print0(f"{len(samples)} questions x {config.epochs} epochs: {len(batches)} steps")
    clip = load_clip(config.clip, device) if config.clip_weight > 0 else None
    out = os.path.join(config.out, FOLDERS[config.stage])
    prints = fingerprints(config, folder, samples, processor.chat_template)
    check_folder(config, out, prints)
    config = fit_plan(config, folder, device)  # chooses the slots
    with Timer("the models")("loading"):
        policy, ref_policy, replica = load_models(config, folder, device, mesh)
    return Run(config, out, prints, device, processor, samples, held_out, batches, policy, ref_policy, replica, clip,
               choose_loss(grpo_loss, config.fused_loss, device, log=print0))


def sft_step(run: Run, optimizer, prompts: Iterable[Prompt], step: int, steps: int) -> tuple[list, list[dict], Timer]:
    """One optimiser step of supervised warm-up: a solution is a group of one response."""
    config, timer = run.config, Timer(f"step {step}")

    def loss_fn(logprobs, batch, rows):
        return sft_loss(logprobs, batch.weights[rows]), {}  # it has no statistics

    with timer("encode"):
        groups = [(prompt, [data.encode_solution(prompt.sample, run.processor, config.cutoff - len(prompt.input_ids))])
                  for prompt in prompts]
    with timer("wait"):
        barrier(config.patience)
    with timer("update"):
        batches = make_micro_batches(groups, config.token_budget, run.device)
        lr = learning_rate(config, step, steps)
        stats = update(run.policy, optimizer, batches, loss_fn, lr, 1.0, config.max_grad_norm, run.device)
    return [], [stats], timer


def deal_out(run: Run, step: int, prompts: list[Prompt], answered: list[rewards.Answered],
             advantages: Tensor) -> list[list[MicroBatch]]:
    """The micro-batches of each optimiser step: question i of the batch belongs to step i // U on any number of ranks.
    A row waits for the longest one of all ranks. So the questions of a step are dealt out again, now by their tokens,
    and a rank encodes the prompts that others have sampled, because sending pixels would take longer."""
    lengths = gather([len(prompt.input_ids) for prompt in prompts])
    tokens = [n + sum(len(response.ids) for response in one.responses) for n, one in zip(lengths, answered)]
    shares = fair_shares(tokens, run.config.questions_per_update)  # of each optimiser step
    known = dict(zip(shard_of_rank(range(len(answered))), prompts))
    others = [i for i in chain(*shares) if i not in known]
    samples = [run.samples[run.batches[step][i]] for i in others]
    known |= zip(others, ahead(data.encode_prompt, samples, len(samples), run.processor))
    barrier()
    minibatches = []
    for share in shares:
        groups = [(known[i], [response.ids for response in answered[i].responses]) for i in share]
        sampled = [response.logprobs for i in share for response in answered[i].responses]
        minibatches.append(make_micro_batches(groups, run.config.token_budget, run.device, advantages[share], sampled))
    return minibatches


def rl_step(run: Run, optimizer, prompts: Iterable[Prompt], step: int, steps: int) -> tuple[list, list[dict], Timer]:
    """Sample and score responses to Q questions, then take Q / questions_per_update optimiser steps on them."""
    config, device, timer = run.config, run.device, Timer(f"step {step}")
    with timer("sync"):
        sync(run.policy, run.replica)  # the sampler's weights are now the policy's
    with timer("encode"):
        prompts = list(prompts)
    samples = [prompt.sample for prompt in prompts]
    seeds = [seed_of(config.seed, step, i) for i in shard_of_rank(range(config.questions_per_rollout))]
    parts = collect(run.replica, run.processor, run.clip, samples, prompts, seeds, config, timer)
    answered = gather(sorted(chain(*parts)))  # Q
    advantages = group_advantages(torch.tensor([one.earned["reward"] for one in answered]), config.advantage_dtype)
    for one, values in zip(answered, advantages.tolist()):
        one.earned["advantage"] = values
    with timer("deal"):
        minibatches = deal_out(run, step, prompts, answered, advantages)
    with timer("logprobs"), torch.no_grad():  # before any update; the sampler's own log-probs round differently
        for batch in chain(*minibatches[1:]):  # the first update's own log-probs are its old ones
            batch.old_logprobs, _ = run.policy(pack(batch.groups, device), config.temperature)
        if run.ref_policy is not None:  # in a loop of its own, so that layers of one policy at a time are gathered
            with run.ref_policy.adapters_off():  # with LoRA the reference is the policy without its adapters
                for batch in chain(*minibatches):
                    batch.ref_logprobs, _ = run.ref_policy(pack(batch.groups, device), config.temperature)

    def loss_fn(logprobs, batch, rows):
        now, weights = logprobs.detach(), batch.weights[rows]
        old = now if batch.old_logprobs is None else batch.old_logprobs[rows]
        ref = old if batch.ref_logprobs is None else batch.ref_logprobs[rows]
        loss, stats = run.grpo_loss(logprobs, old, ref, batch.advantages[rows], weights, config.clip_ratio_low,
                                    config.clip_ratio_high, config.clip_ratio_c, config.kl_coef)
        return loss, stats | {"sampler_gap": (weights * (batch.sampler_logprobs[rows] - now).abs()).sum()}

    stats, updates = [], len(minibatches)
    with timer("update"):
        for u, batches in enumerate(minibatches):
            lr = learning_rate(config, step * updates + u, steps * updates)
            stats.append(update(run.policy, optimizer, batches, loss_fn, lr, config.temperature, config.max_grad_norm,
                                device))
    return answered, stats, timer


def sample_questions(run: Run):
    """Stage sample: G graded responses to every question, then the three buckets. A second run replaces the first."""
    config, folder = run.config, f"{run.folder}.asked-{run_id(run.config, run.prints)}"
    asked = kept(folder, "responses", run.samples, lambda todo: map(records, ask(
        run.replica, run.processor, None, todo, config, "sample")))
    if is_main():
        replace_buckets(run.folder, run.samples, list(asked.values()), config.group_size, folder)
    barrier()


# ----------------------------------------------------------------------------------------- the loop


def evaluate(run: Run) -> dict[str, float]:
    """Greedy answers to the held-out questions: the mean of accuracy, format and the stage's other reward parts."""
    config = dataclasses.replace(run.config, group_size=1, temperature=0.0)
    sync(run.policy, run.replica)
    parts = ask(run.replica, run.processor, run.clip, run.held_out, config, "evaluate")
    rows = gather(records(sorted(chain(*parts))))
    shown = [part for part in PARTS if part in ("accuracy", "format") or getattr(config, f"{part}_weight") > 0]
    return {f"eval/{part}": mean(row["responses"][0][part] for row in rows) for part in shown}


def train(run: Run, step_function):
    """The loop of every training stage: batches in; metrics, rollouts, checkpoints and a model out."""
    config, steps = run.config, min(len(run.batches), run.config.max_steps or len(run.batches))
    optimizer = make_optimizer(run.policy, config)
    if broadcast(os.path.exists(os.path.join(run.folder, "model"))) and not config.restart:
        print0(f"{run.folder} is complete; --restart runs it again")
        return
    first = done = prepare_folder(run.folder, config, run.prints)
    folder, skipped = os.path.join(run.folder, "checkpoints"), 0
    check_space(config, run.policy)
    on_every_rank(lambda: load_checkpoint(folder, run.policy, optimizer))
    mine = [run.samples[i] for batch in run.batches[first:steps] for i in shard_of_rank(batch)]
    share = len(shard_of_rank(run.batches[0]))  # of one step
    # The prompts of the next step are encoded while this one trains.
    prompts = ahead(data.encode_prompt, mine, share, run.processor)
    bar = progress(range(first, steps), f"stage {config.stage}", steps, first)
    log = Log(config, run.folder, bar)
    try:
        for step in bar:
            began = time.perf_counter()
            answered, stats, timer = step_function(run, optimizer, islice(prompts, share), step, steps)
            rows = records(answered)
            metrics = step_metrics(rows, PARTS, stats, timer.seconds) | sum_over_ranks(grader_counts(config.grader))
            if config.eval_every and ((step + 1) % config.eval_every == 0 or step + 1 == steps):
                metrics |= evaluate(run)
            metrics["time/step"] = time.perf_counter() - began
            log.step(step, metrics, rows)
            barrier()  # if rank 0 could not write, nobody goes on
            skipped, done = skipped + 1 if metrics["opt/skipped"] else 0, step + 1
            check_skipped(run, step, skipped)
            if config.save_every and done % config.save_every == 0 and not skipped:
                save_checkpoint(folder, done, run.policy, optimizer)
            stop_together()
    except Stopped as stop:  # between two steps, or in a rollout, which has changed no weight
        if done and f"step-{done:06d}" not in broadcast(checkpoints(folder)):
            save_checkpoint(folder, done, run.policy, optimizer)
        raise Stopped(stop.number, f" after step {done} of {steps}") from stop
    export(os.path.join(run.folder, "model"), run.policy, run.processor, getattr(torch, config.dtype))
    log.end()
    print0(f"model -> {run.folder}/model")


def read_config(argv: list[str]) -> Config:
    """A command line as a checked Config: defaults < STAGES < RECIPES < --parity < argv. InputError: what is wrong."""
    return read_stage(argv, __doc__, Config, STAGES, RECIPES, FOLDERS)


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, or after one line 2 for bad input, 143 for SIGTERM, 130 for Ctrl-C."""
    try:
        with ending_together(), complete_files():
            start_processes()  # join first, so that a bad flag ends all ranks with one message
            config = on_every_rank(lambda: read_config(sys.argv[1:] if argv is None else argv))
            if config.plan:
                on_every_rank(lambda: print0(table(config, shape_of(config.model), config.gpus, config.gpu_gb * GB)))
                return 0
            run = on_every_rank(lambda: start(config))
            TOLD.grace = config.grace
            if run.config.stage == "sample":
                sample_questions(run)
            else:
                train(run, sft_step if run.config.stage == "sft" else rl_step)
    except InputError as error:  # it may concern only this rank, e.g. a corrupt image
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
