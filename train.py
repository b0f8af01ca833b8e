"""PeBR-R1, perception before reasoning: warm-up, sampling, perception RL and reasoning RL, on any number of processes.

    torchrun --nproc_per_node 8 train.py --stage sft     supervised warm-up: the format      -> runs/pebr/sft/model
    torchrun --nproc_per_node 8 train.py --stage sample  8 rollouts sort easy, medium, hard  -> runs/pebr/sample/*.jsonl
    torchrun --nproc_per_node 8 train.py --stage 1       perception RL on the easy questions -> runs/pebr/stage1/model
    torchrun --nproc_per_node 8 train.py --stage 2       reasoning RL on the medium ones     -> runs/pebr/stage2/model

A stage is a dict of overrides of one Config (STAGES); its default input is what the stage before wrote. An RL step:
    collect   questions -> G sampled responses each -> reward parts -> rewards -> advantages  (a whole policy per rank)
    score     log-probs of the responses under the policy as it is now and the reference      (FSDP2, no gradient)
    update    several optimiser steps of the clipped GRPO loss on slices of these questions   (FSDP2)

Q questions x G responses = N sequences, group after group: `rewards.view(Q, G)` is a group per row. Rank r of W holds
questions r, r + W, ... Nothing depends on W, on the micro-batch size or on what was computed before: random numbers
are functions of (seed, step, question); the loss is divided by the token count of the optimiser step over all ranks.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import rewards
from data import InputError, Sample, parse, worth_imitating
from engine.clip import load_clip
from engine.memory import REHEARSED, drop_notes, fit_plan, make_optimizer, read_notes, rehearse, within_memory
from engine.plan import GB, shape_of, table
from engine.policy import Group, Policy, dummy_group, find_model, load_processor, micro_batches, note_pixels, pack
from engine.sampler import Response, enough_for, generate
from engine.weights import export, load_checkpoint, save_checkpoint, sync
from grading.algebra import check_rule, process_grader
from kernels import backend, pick_grpo_loss
from plumbing.flags import Flags, check_sampling, check_training, complain, refuse_outside
from plumbing.log import Timer, console_line, finite, rollout_metrics, time_metrics, update_metrics
from plumbing.processes import (
    SharedError,
    ending_together,
    gather,
    is_writer,
    meet,
    mine,
    no_bar,
    of_writer,
    on_every_rank,
    print0,
    start_processes,
    stop_processes,
)
from plumbing.run_folder import ASIDE, check_folder, prepare_folder, write_text


@dataclass(frozen=True)
class Sampling:
    """What asking a model questions and scoring its responses needs; training and evaluation share these defaults."""

    model: str = ""  # Hugging Face folder or hub name
    data: str = ""  # json, jsonl, or hub data set
    split: str = "train"  # of a hub data set
    image_root: str = ""  # what image paths are relative to; empty: the folder of the data file
    clip: str = "qihoo360/fg-clip-large"  # FG-CLIP folder or hub name, open_clip folder, or open_clip name:pretrained
    dtype: str = "bfloat16"  # of computing, sampling and export (bfloat16 or float32); master weights are float32
    seed: int = 0

    group_size: int = 8  # G, responses per question (pebr_stage1.yaml: n)
    max_prompt: int = 2048  # tokens; longer prompts are dropped before the run, never cut
    max_response: int = 2048  # tokens
    min_pixels: int = 576  # images are resized to between min and max pixels, the same everywhere
    max_pixels: int = 802816
    temperature: float = 1.2  # divides the logits, in sampling and in all log-probs of training
    top_p: float = 0.99  # of sampling only
    slots: int = 0  # responses decoded together on one GPU; 0: as many as its memory has room for, at most 256
    cuda_graphs: bool = True  # on a GPU, replay captured decoding; the same tokens up to rounding, only faster
    patience: float = 60.0  # minutes that a rank which is done waits for the others, before the run ends

    clip_target: float = 0.4  # cosine that earns the whole clip part (pebr_1.py)
    length_limit: int = 512  # tokens up to which the length part is 1 (pebr_1.py)
    keyword_scope: str = "description"  # where key words count: description (paper) or response (release)
    grader: str = "own"  # the rule of the accuracy part: own (answers.py, grader.py) or release (mathruler)


@dataclass(frozen=True)
class Config(Sampling):
    """Every number that affects training. The model is also the reference policy of RL."""

    stage: str = ""  # sft, sample, 1 or 2
    out: str = "runs/pebr"  # everything is written below this folder
    restart: bool = False  # begin anew instead of resuming; the old run is dropped when the new one is complete

    questions_per_rollout: int = 560  # Q, questions per step (stage1.yaml: rollout_batch_size)
    questions_per_update: int = 112  # questions per optimiser step (stage1.yaml: global_batch_size)
    epochs: int = 1
    max_steps: int = 0  # stop after this many steps; 0: after the epochs

    clip_weight: float = 0.0  # the reward is the weighted sum of its five parts
    keyword_weight: float = 0.0
    format_weight: float = 0.0
    length_weight: float = 0.0
    accuracy_weight: float = 0.0

    clip_low: float = 0.2  # the ratio is clipped this far below 1 (verl actor/config.py)
    clip_high: float = 0.3  # and this far above
    clip_dual: float = 3.0  # bounds the loss of bad tokens whose ratio explodes
    kl_coef: float = 0.01  # weight of the KL to the reference policy (stage1.yaml)
    lr: float = 1e-6
    lr_decay: str = "constant"  # constant, or cosine to 0
    warmup_ratio: float = 0.0  # share of the optimiser steps over which lr rises from 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    freeze_vision: bool = False  # train the language model only
    gradient_checkpointing: bool = True
    adam_dtype: str = "float32"  # of Adam's two moments; bfloat16 saves 4 bytes a parameter, rounded at random
    ref_offload: bool = False  # keep the reference policy in host memory; a layer at a time comes to the GPU
    token_budget: int = 16384  # tokens in one packed row; changes memory and speed, not the result

    save_every: int = 0  # steps between checkpoints to resume from; 0: none
    keep_prompts: bool = False  # keep encoded warm-up prompts in memory: for data sets that fit

    plan: bool = False  # print the memory plan and stop; needs no data, no weights and no GPU
    gpus: int = 8  # of the plan
    gpu_gb: float = 80  # of the plan, memory of one GPU


STAGES = {
    "sft": dict(  # qwen2_5vl_full_sft.yaml: 4 per device x 4 accumulation x 8 GPUs
        model="Qwen/Qwen2.5-VL-7B-Instruct", data="HuanjinYao/Mulberry-SFT", epochs=2, questions_per_rollout=128,
        questions_per_update=128, lr=1e-5, lr_decay="cosine", warmup_ratio=0.1, freeze_vision=True, save_every=500),
    "sample": dict(model="{out}/sft/model", data="cythu/PeBR_R1_dataset"),  # pebr_sample.yaml
    "1": dict(  # pebr_stage1.yaml, pebr_1.py
        model="{out}/sft/model", data="{out}/sample/easy.jsonl", save_every=5,
        clip_weight=0.4, keyword_weight=0.4, format_weight=0.1, length_weight=0.1),
    "2": dict(  # pebr_stage2.yaml, pebr_2.py
        model="{out}/stage1/model", data="{out}/sample/medium.jsonl", save_every=5, epochs=2,
        questions_per_rollout=512, questions_per_update=128, accuracy_weight=0.9, format_weight=0.1),
}
FOLDERS = {"sft": "sft", "sample": "sample", "1": "stage1", "2": "stage2"}  # below config.out


def read_config(argv: list[str], doc: str = "") -> Config:
    """A training command line as a checked Config."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", nargs="?", default="", const="")
    stage = first.parse_known_args(argv)[0].stage
    if stage not in STAGES and not {"-h", "--help"} & set(argv):
        raise InputError(f"--stage {stage or 'is missing'}: give one of {', '.join(STAGES)}")
    config = Flags(Config, doc).read(argv, STAGES.get(stage, {}))
    given = {name: getattr(config, name).replace("{out}", config.out) for name in ("model", "data")}
    config = dataclasses.replace(config, **given)
    if config.plan:
        config = dataclasses.replace(config, model=planned_model(config))
    else:
        check_inputs(config)
    check_sampling(config)
    check_rule(config.grader)
    refuse_outside(config, 1, 1e6, "gpus gpu_gb")
    if stage != "sample":
        check_training(config)
    return config


def check_inputs(config: Config):
    """A stage's default input is what an earlier stage made; if it is missing, say with which command."""
    for name in ("model", "data"):
        default = STAGES[config.stage][name]
        for maker, folder in FOLDERS.items():
            made_here = default.startswith(f"{{out}}/{folder}/")
            path = default.replace("{out}", config.out)
            if made_here and getattr(config, name) == path and not os.path.exists(path):
                raise InputError(f"{path} is missing: make it with `train.py --stage {maker} --out {config.out}`, "
                                 f"or give --{name}")


def planned_model(config: Config) -> str:
    """The model that a plan is for: where an earlier stage has yet to make it, what that stage will make it from."""
    default = STAGES[config.stage]["model"].replace("{out}", config.out)
    return STAGES["sft"]["model"] if config.model == default and not os.path.exists(default) else config.model


def sampler_gap(rollout, old_logprobs: list[list[Tensor]]) -> float:
    """Mean |log-prob of the sampler - log-prob of the trainer| of all sampled tokens: how differently the two round."""
    drawn = torch.tensor([x for response in rollout.responses for x in response.logprobs])
    scored = torch.cat([piece.cpu() for group in old_logprobs for piece in group] or [drawn])
    total = torch.tensor([(drawn - scored).abs().sum(), len(drawn)])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def grader_metrics(rule: str) -> dict[str, float]:
    """Pairs that all ranks had compared by algebra since the last call, and those given up after grader.LIMIT."""
    counts = process_grader(rule).take_counts()
    total = torch.tensor([float(counts["asked"]), float(counts["timeouts"])])
    dist.all_reduce(total)
    return {"grader/asked": total[0].item(), "grader/timeouts": total[1].item()}


def seed_of(*parts) -> int:
    """A seed from anything printable, e.g. (seed, step, qid): equal on every rank, in every run, after every resume."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass
class Rollout:
    """The responses to this rank's Q questions and what they earned."""

    samples: list[Sample]  # Q
    groups: list[Group]  # Q prompts with the ids of their G responses
    responses: list[Response]  # N
    texts: list[str]  # N
    parts: dict[str, Tensor]  # each reward part, (N,)
    rewards: Tensor  # (Q, G)


def collect(replica, processor, clip, samples: list[Sample], seeds: list[int], config, timer: Timer) -> Rollout:
    """Sample G responses to each question and score them. The same code trains, sorts questions and evaluates."""
    with timer("rollout"), enough_for(config.slots):
        prompts = [data.encode_prompt(sample, processor) for sample in samples]
        replies = generate(replica, prompts, seeds, config.group_size, config.max_response, config.temperature,
                           config.top_p, config.slots, len(processor.tokenizer), config.cuda_graphs)
    with timer("reward"):
        responses = [response for group in replies for response in group]
        texts = [processor.tokenizer.decode(response.ids, skip_special_tokens=True) for response in responses]
        lengths = [len(response.ids) for response in responses]
        weights = {part: getattr(config, f"{part}_weight", 0.0) for part in rewards.PARTS}
        total, parts = rewards.score(samples, texts, lengths, weights, clip, config.clip_target, config.length_limit,
                                     config.keyword_scope, config.grader)
    with timer("wait"):  # for the ranks with longer responses
        meet(config.patience)
    groups = [(prompt, [response.ids for response in group]) for prompt, group in zip(prompts, replies)]
    return Rollout(samples, groups, responses, texts, parts, total.view(len(samples), config.group_size))


def records(rollout: Rollout, advantages: Tensor | None = None) -> list[dict]:
    """A rollout as json rows, one per question: the rollouts file, the metrics and the evaluation are made of these."""
    Q, G = rollout.rewards.shape
    columns = rollout.parts | {"reward": rollout.rewards.view(-1)}
    if advantages is not None:
        columns["advantage"] = advantages.reshape(-1)
    columns = {name: values.tolist() for name, values in columns.items()}
    rows = []
    for q, sample in enumerate(rollout.samples):
        replies = []
        for i in range(q * G, (q + 1) * G):
            text, response = rollout.texts[i], rollout.responses[i]
            replies.append(dict(text=text, extracted=parse(text).answer, tokens=len(response.ids),
                                finished=response.finished, **{name: values[i] for name, values in columns.items()}))
        rows.append(dict(qid=sample.qid, question=sample.question, answer=sample.answer, responses=replies))
    return rows


# ------------------------------------------------------------------------------- GRPO, as equations


def group_advantages(rewards: Tensor) -> Tensor:
    """Eq. ADVANTAGE: how much better a response is than its group, in standard deviations. (Q, G) -> (Q, G).

    A = (R - mean_group) / (std_group + 1e-6), std with G - 1 (verl core_algos.py: compute_grpo_outcome_advantage).
    In float64, because in float32 the mean of eight times 0.7 is not 0.7, and the division would turn that rounding
    error into an advantage of 0.05: a group of equal rewards must teach nothing.
    """
    Q, G = rewards.shape
    assert G >= 2, f"{G=}: a group needs at least 2 responses to compare"
    exact = rewards.double()
    advantages = (exact - exact.mean(-1, keepdim=True)) / (exact.std(-1, keepdim=True) + 1e-6)
    return advantages.to(rewards.dtype)


def grpo_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, weights: Tensor,
              clip_low: float, clip_high: float, clip_dual: float, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped, KL-regularised policy loss of N response tokens: a scalar, and its statistics as weighted sums.

    ratio = exp(logprob - old_logprob)                                     Eq. RATIO   difference clamped to +-20
    obj   = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)       Eq. CLIP
    obj   = max(obj, clip_dual A)  where A < 0                             Eq. DUAL
    kl    = exp(ref - logprob) - (ref - logprob) - 1                       Eq. KL3     clamped to +-20, kl to at most 10
    loss  = sum_tokens weight (-obj + kl_coef kl)                          Eq. LOSS
    All are (N,); weights: 1 / (response tokens of the optimiser step, all ranks), 0 for padding. (verl core_algos.py)
    """
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()  # Eq. RATIO
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)  # Eq. CLIP
    bounded = torch.where(advantages < 0, torch.maximum(objective, clip_dual * advantages), objective)  # Eq. DUAL
    difference = (ref_logprobs - logprobs).clamp(-20, 20)
    kl = (difference.exp() - difference - 1).clamp(max=10)  # Eq. KL3
    loss = (weights * (-bounded + kl_coef * kl)).sum()  # Eq. LOSS
    with torch.no_grad():
        active = clipped < unclipped  # the clip took part of the objective, and with it the gradient
        stats = {
            "kl": (weights * kl).sum(),
            "clip_low": (weights * (active & (advantages < 0))).sum(),
            "clip_high": (weights * (active & (advantages > 0))).sum(),
            "ratio_max": torch.where(weights > 0, ratio, 0.0).max(),
        }
    return loss, stats


def sft_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Eq. SFT: cross-entropy of the solution's tokens, the end token included. Both (N,) -> scalar."""
    return -(weights * logprobs).sum()


def learning_rate(config: Config, update: int, updates: int) -> float:
    """Rate of optimiser step `update` of `updates`: linear warm-up, then constant or a cosine to 0."""
    warmup = max(1, round(config.warmup_ratio * updates))
    rate = config.lr * min(1.0, (update + 1) / warmup)
    if config.lr_decay == "cosine" and update >= warmup:
        rate *= 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))
    return rate


# ----------------------------------------------------- score and update: packed rows in, a step out

Index = list[tuple[int, int]]  # (group, response) of each response in a packed row, in its order


def rows_of(groups: list[Group], token_budget: int) -> Iterator[tuple[list[Group], Index]]:
    """Cut groups into micro-batches; a rank that has fewer than the others ends with dummy rows of empty index."""
    prompt_lengths = [len(prompt.input_ids) for prompt, _ in groups]
    response_lengths = [[len(ids) for ids in responses] for _, responses in groups]
    for row in micro_batches(prompt_lengths, response_lengths, token_budget):
        part = [(groups[q][0], [groups[q][1][g] for g in chosen]) for q, chosen in row]
        yield part or [dummy_group()], [(q, g) for q, chosen in row for g in chosen]


@torch.no_grad()
def response_logprobs(policy, groups: list[Group], config: Config, device) -> list[list[Tensor]]:
    """Log-probs of every response's tokens under a policy: Q lists of G tensors (length,)."""
    out = [[None] * len(responses) for _, responses in groups]
    for part, index in rows_of(groups, config.token_budget):
        logprobs, _ = policy(pack(part, device), config.temperature)
        lengths = [len(groups[q][1][g]) for q, g in index]
        for (q, g), piece in zip(index, logprobs[: sum(lengths)].split(lengths)):
            out[q][g] = piece
    return out


def policy_loss(old_logprobs, ref_logprobs, advantages: Tensor, config: Config, device) -> Callable:
    """`grpo_loss` of some questions as `update` takes it; log-probs as `response_logprobs` gives, advantages (Q, G)."""
    per_token = [[a.expand(len(old)) for a, old in zip(*group)] for group in zip(advantages, old_logprobs)]
    loss = pick_grpo_loss(grpo_loss, device)

    def row_loss(index: Index, weights: Tensor):
        old, ref, A = (torch.cat([values[q][g] for q, g in index]) if index else torch.zeros_like(weights)
                       for values in (old_logprobs, ref_logprobs, per_token))
        return lambda logprobs, rows: loss(logprobs, old[rows], ref[rows], A[rows], weights[rows], config.clip_low,
                                           config.clip_high, config.clip_dual, config.kl_coef)

    return row_loss


def solution_loss(index: Index, weights: Tensor):
    """`sft_loss` as `update` takes it."""
    return lambda logprobs, rows: (sft_loss(logprobs, weights[rows]), {})


def update(policy, optimizer, groups: list[Group], row_loss: Callable, rate: float, temperature: float, config: Config,
           device) -> dict[str, float]:
    """One optimiser step on the groups of all ranks together. Returns its statistics, equal on all ranks.

    row_loss(index, weights (N,)) is told which responses are in a packed row; the function that it returns takes
    (logprobs (n,), rows: slice of the N) and gives their loss and statistics that add up, but for ratio_max.
    """
    count = torch.tensor(float(sum(len(ids) for _, responses in groups for ids in responses)))
    dist.all_reduce(count)  # before the loop: all micro-batches of all ranks share one denominator
    sums, ratio_max = defaultdict(lambda: torch.zeros((), device=device)), torch.zeros((), device=device)
    for part, index in rows_of(groups, config.token_budget):
        packed = pack(part, device)
        weights = torch.full((len(packed.targets),), 1 / count.item() if index else 0.0, device=device)
        token_loss = row_loss(index, weights)

        def chunk_loss(logprobs, entropies, rows):
            nonlocal ratio_max
            loss, stats = token_loss(logprobs, rows)
            ratio_max = torch.maximum(ratio_max, stats.pop("ratio_max", ratio_max))
            for name, value in dict(stats, loss=loss, entropy=(weights[rows] * entropies).sum()).items():
                sums[name] += value.detach()
            return loss

        loss, _, _ = policy(packed, temperature, chunk_loss)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    usable = bool(norm.isfinite())  # the norm is of all ranks' gradients, so all ranks decide alike
    if usable:
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            optimizer.step()
        except torch.OutOfMemoryError as error:  # some weights may have moved: this cannot be repeated
            raise InputError("out of memory in the optimiser's step, where rows of any size are gone: "
                             "see --plan for what to change") from error
    optimizer.zero_grad()
    totals = torch.stack(list(sums.values()))
    dist.all_reduce(totals)
    dist.all_reduce(ratio_max, dist.ReduceOp.MAX)
    return dict(zip(sums, totals.tolist()), ratio_max=ratio_max.item(), grad_norm=norm.item(),
                skipped=float(not usable), lr=rate, tokens=count.item())


# --------------------------------------------------------------------- a run: what the stages share


@dataclass
class Run:
    """What a stage works with."""

    config: Config
    folder: str  # the stage's own folder below config.out
    device: torch.device
    processor: object
    samples: list[Sample]
    batches: list[list[int]]  # which samples each step of training takes
    policy: Policy | None  # sharded, trained
    ref_policy: Policy | None  # sharded, frozen
    replica: Policy | None  # whole, samples
    clip: object  # rewards.ClipScorer or None
    encoded: dict  # qid -> Group, with --keep_prompts
    halved: bool = False  # whether memory has run out once and config.token_budget is half of what was asked for


def load_samples(config: Config, processor) -> list[Sample]:
    """The stage's data, filtered; whatever is wrong with it is found here, before the run."""
    samples = data.load_samples(config.data, config.image_root, config.split)
    if config.stage == "sft":
        samples = worth_imitating(samples, config, processor, log=print0)
    else:
        data.check_images(samples)
    if config.accuracy_weight > 0 or config.stage == "sample":
        data.require(samples, "answer", config.data)
    if config.keyword_weight > 0:
        data.require(samples, "key_words", config.data)
    return data.drop_long(samples, processor, config.max_prompt, log=print0)


def start(config: Config) -> Run:
    """Load and check everything that a stage needs; nothing of an earlier run is touched yet."""
    device, mesh = start_processes()
    print0(f"{dist.get_world_size()} process(es) on {device.type}, log-probs and loss by {backend(device)}")
    folder, dtype = find_model(config.model), getattr(torch, config.dtype)
    processor = load_processor(folder, config.min_pixels, config.max_pixels)
    note_pixels(folder, config.min_pixels, config.max_pixels, log=print0)
    samples, batches = load_samples(config, processor), []
    if config.stage != "sample":
        batches = data.batches(len(samples), config.questions_per_rollout, config.epochs, config.seed)
        left = config.epochs * len(samples) - len(batches) * config.questions_per_rollout
        print0(f"{len(samples)} questions x {config.epochs} epochs: {len(batches)} steps, {left} left over")
    data.encode_prompt(max(samples, key=lambda sample: len(sample.images)), processor)  # template and processor work
    clip = load_clip(config.clip, device) if config.clip_weight > 0 else None
    run_folder = os.path.join(config.out, FOLDERS[config.stage])
    check_folder(config, run_folder)
    config = fit_plan(config, folder, device)
    policy = ref_policy = replica = None
    if config.stage != "sample":
        policy = Policy.load(folder, device, torch.float32, mesh, dtype)
        policy.model.visual.requires_grad_(not config.freeze_vision)
        if config.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()
    if config.stage != "sft":
        replica = Policy.load(folder, device, dtype).eval()
        if policy and config.kl_coef > 0:
            ref_policy = Policy.load(folder, device, dtype, mesh, dtype, config.ref_offload)
            ref_policy.requires_grad_(False).eval()
    return Run(config, run_folder, device, processor, samples, batches, policy, ref_policy, replica, clip, {})


# -------------------------------------------------------------------------- the three kinds of step


def sft_step(run: Run, optimizer, samples: list[Sample], step: int, steps: int) -> tuple[dict[str, float], list[dict]]:
    """One optimiser step of supervised warm-up: a solution is a group of one response."""
    timer, groups = Timer(step), []
    with timer("encode"):
        for sample in mine(samples):
            group = run.encoded.get(sample.qid)
            if group is None:
                group = data.encode_prompt(sample, run.processor), [data.encode_solution(sample, run.processor)]
            if run.config.keep_prompts:
                run.encoded[sample.qid] = group
            groups.append(group)
    with timer("wait"):
        meet(run.config.patience)
    with timer("update"):
        rate = learning_rate(run.config, step, steps)
        stats = within_memory(run, lambda: update(run.policy, optimizer, groups, solution_loss, rate, 1.0, run.config,
                                                  run.device))
        metrics = update_metrics([stats])
    return metrics | time_metrics(timer.seconds, metrics, []), []


def rl_step(run: Run, optimizer, samples: list[Sample], step: int, steps: int) -> tuple[dict[str, float], list[dict]]:
    """Collect responses to Q questions, then take Q / questions_per_update optimiser steps on them."""
    config, timer = run.config, Timer(step)
    with timer("sync"):
        sync(run.policy, run.replica)
    seeds = [seed_of(config.seed, step, i) for i in mine(range(len(samples)))]
    rollout = collect(run.replica, run.processor, run.clip, mine(samples), seeds, config, timer)
    advantages = group_advantages(rollout.rewards).to(run.device)  # (Q, G)
    with timer("logprobs"):  # before the first update: the ratio is against the policy that sampled
        old_logprobs = within_memory(
            run, lambda: response_logprobs(run.policy, rollout.groups, run.config, run.device))
        ref_logprobs = old_logprobs  # without a KL term there is no reference to load
        if run.ref_policy is not None:
            ref_logprobs = within_memory(
                run, lambda: response_logprobs(run.ref_policy, rollout.groups, run.config, run.device))
    updates, stats = len(samples) // config.questions_per_update, []
    with timer("update"):
        for u in range(updates):  # the same questions whatever the number of ranks
            part = [q for q, i in enumerate(mine(range(len(samples)))) if i // config.questions_per_update == u]
            groups, old, ref = ([values[q] for q in part] for values in (rollout.groups, old_logprobs, ref_logprobs))
            loss = policy_loss(old, ref, advantages[part], config, run.device)
            rate = learning_rate(config, step * updates + u, steps * updates)
            stats.append(within_memory(run, lambda: update(run.policy, optimizer, groups, loss, rate,
                                                           config.temperature, run.config, run.device)))
    rows = gather(records(rollout, advantages))
    metrics = rollout_metrics(rows) | update_metrics(stats) | {"policy/sampler_gap": sampler_gap(rollout, old_logprobs)}
    metrics |= grader_metrics(config.grader)
    return metrics | time_metrics(timer.seconds, metrics, rows), rows


def sample_questions(run: Run):
    """Stage sample: G graded responses to every question, then the three buckets. A second run replaces the first."""
    config, rows = run.config, []
    Q = config.questions_per_rollout
    for first in tqdm(range(0, len(run.samples), Q), "sample", disable=no_bar()):
        samples, timer = mine(run.samples[first : first + Q]), Timer(first // Q)
        seeds = [seed_of(config.seed, "sample", sample.qid) for sample in samples]
        rows += gather(records(collect(run.replica, run.processor, run.clip, samples, seeds, config, timer)))
    late = grader_metrics(config.grader)["grader/timeouts"]
    if is_writer():
        correct = {row["qid"]: sum(response["accuracy"] == 1 for response in row["responses"]) for row in rows}
        sizes = data.write_buckets(run.folder, run.samples, correct, config.group_size)
        write_text(os.path.join(run.folder, "rollouts.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} questions -> {run.folder}: " + ", ".join(f"{size} {name}" for name, size in sizes.items())
              + (f"; {late:g} answers took too long to compare" if late else ""))
        for stage in (stage for name, stage in (("easy", "1"), ("medium", "2")) if not sizes[name]):
            print(f"stage {stage} is left without questions: "
                  "a longer or shorter warm-up, or another --temperature, helps")
    meet()


# ----------------------------------------------------------------------------------------- the loop


def train(run: Run, step_function):
    """The loop of every training stage: batches in; metrics, rollouts, checkpoints and a model out."""
    config, steps = run.config, len(run.batches)
    steps = min(steps, config.max_steps or steps)
    optimizer = make_optimizer(run.policy, config)
    if of_writer(os.path.exists(os.path.join(run.folder, "model"))) and not config.restart:
        print0(f"{run.folder} is complete; --restart runs it again")
        return
    first, skipped = prepare_folder(run), 0
    read_notes(run)
    if run.device.type in REHEARSED:
        rehearse(run, optimizer, update)
    on_every_rank(lambda: load_checkpoint(os.path.join(run.folder, "checkpoints"), run.policy, optimizer))
    for step in tqdm(range(first, steps), f"stage {config.stage}", initial=first, total=steps, disable=no_bar()):
        began = time.perf_counter()
        metrics, rows = step_function(run, optimizer, [run.samples[i] for i in run.batches[step]], step, steps)
        metrics["time/step"] = time.perf_counter() - began
        if is_writer():
            with open(os.path.join(run.folder, "metrics.jsonl"), "a") as f:
                f.write(json.dumps(finite({"step": step, **metrics})) + "\n")
            if rows:
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_text(os.path.join(run.folder, "rollouts", f"step_{step:06d}.jsonl"), lines)
            tqdm.write(console_line(step, steps, metrics))
        meet()  # if rank 0 could not write, nobody goes on
        skipped = skipped + 1 if metrics["opt/skipped"] else 0
        if skipped == 5:
            raise FloatingPointError("5 steps in a row without a finite gradient: "
                                     "look at the last rollouts, lower --lr")
        if config.save_every and (step + 1) % config.save_every == 0:
            save_checkpoint(os.path.join(run.folder, "checkpoints"), step + 1, run.policy, optimizer)
    export(os.path.join(run.folder, "model"), run.policy, run.processor, getattr(torch, config.dtype))
    if is_writer():
        shutil.rmtree(os.path.realpath(run.folder) + ASIDE, ignore_errors=True)
        drop_notes(run.folder)
    print0(f"model -> {run.folder}/model")


def main(argv: list[str] | None = None) -> int:
    """Run one stage; returns the exit code: 0, or 2 after one line about bad input."""
    try:
        with ending_together():
            start_processes()  # first of all: even a flag is read together, and who cannot says so for all
            config = on_every_rank(lambda: read_config(sys.argv[1:] if argv is None else argv, __doc__))
            if config.plan:
                on_every_rank(lambda: print0(table(config, shape_of(config.model), config.gpus, config.gpu_gb * GB)))
                return 0
            run = on_every_rank(lambda: start(config))
            if run.config.stage == "sample":
                sample_questions(run)
            else:
                train(run, sft_step if run.config.stage == "sft" else rl_step)
    except InputError as complaint:  # perhaps on this rank alone: an image that has gone bad, say
        return complain(complaint, is_writer() or not isinstance(complaint, SharedError))
    return 0


if __name__ == "__main__":
    sys.exit(stop_processes(main()))
