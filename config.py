"""Every setting: one dataclass, one dict of overrides per stage, one strict command line.

Precedence: defaults of Config < STAGES[stage] < command line. A stage is nothing but such a dict: its data, its
initial model (what the stage before it wrote), its reward weights, its sizes.
"""
import argparse
import dataclasses
import difflib
import json
import os
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from data import InputError
from grader import check_rule


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


@dataclass(frozen=True)
class EvalConfig(Sampling):
    """Settings of eval.py: greedy by default, prompt and pixels as in training."""

    split: str = ""  # of a hub data set; empty: train, or what is usual for the benchmark
    clip: str = ""  # as in training; empty: the clip part is not computed
    group_size: int = 1  # responses per question; pass@n needs more than one, and a temperature
    temperature: float = 0.0
    top_p: float = 1.0
    out: str = "runs/eval"  # report.json and responses.jsonl go here, of a benchmark into a folder of its name

    benchmark: list[str] = field(default_factory=list)  # names with spaces or commas between, or all
    restart: bool = False  # ask again, instead of going on with the responses that out holds
    blind: bool = False  # a second pass: the same questions without their images
    caption_only: bool = False  # a second pass: the model's own image description instead of the image
    score: str = ""  # score these stored responses: ours, or the output file of MathVista's authors; loads no model
    from_extraction: bool = False  # with score: judge the extractions stored there, instead of reading the responses
    verdicts: str = ""  # with score: write each question's extraction, rule, prediction and verdicts to this .json
    audit: int = 0  # so many questions with response, extraction and verdict, as a sheet for a person to check


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


class Flags(HfArgumentParser):
    """The command-line flags of a dataclass; every mistake is one line."""

    def __init__(self, kind, doc: str):
        super().__init__(kind, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        for action in self._actions:
            action.help = action.help or "default: %(default)s"

    def error(self, message: str):
        raise InputError(message)

    def read(self, argv: list[str], overrides: dict):
        """argv -> the dataclass; overrides replace defaults, argv replaces both."""
        self.set_defaults(**overrides)
        config, rest = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if rest:
            names = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(rest[0].split("=")[0], names, 1)
            raise InputError(f"unknown flag {rest[0]}: " + (f"did you mean {near[0]}?" if near else "--help lists all"))
        return config


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


def refuse(rules: list[tuple[bool, str]]):
    """Raise the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise InputError(message)


def refuse_outside(config: Sampling, low: float, high: float, names: str):
    """Raise if one of these numbers is not in [low, high]; nan is in no range."""
    for name in names.split():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InputError(f"--{name} {value} is not in {low:g} .. {high:g}")


def check_sampling(config: Sampling):
    """What stage sample, the RL stages and eval.py need."""
    check_rule(config.grader)
    refuse_outside(config, 1, 1e9, "group_size max_prompt max_response min_pixels max_pixels length_limit")
    refuse_outside(config, 0, 1e9, "slots")
    refuse_outside(config, 0, 2**31, "seed")
    refuse_outside(config, 0, 100, "temperature")
    refuse_outside(config, 0.01, 1e6, "patience")
    refuse_outside(config, 1e-6, 1, "top_p clip_target")
    refuse([
        (config.slots == 0 or config.slots >= config.group_size,
         f"--slots {config.slots} cannot hold a group of --group_size {config.group_size}"),
        (config.min_pixels <= config.max_pixels,
         f"--min_pixels {config.min_pixels} is more than --max_pixels {config.max_pixels}"),
        (config.group_size == 1 or config.temperature > 0,
         f"--group_size {config.group_size} with --temperature 0 is as many times the same response"),
        (config.dtype in ("bfloat16", "float32"), f"--dtype {config.dtype}: give bfloat16 or float32"),
        (config.keyword_scope in ("description", "response"),
         f"--keyword_scope {config.keyword_scope}: give description or response"),
    ])


def check_evaluation(config: EvalConfig):
    """What eval.py needs: questions, a model or stored responses, and flags that go together."""
    check_sampling(config)
    only_with = "--{} goes with --{}: give that too, or leave it out"
    alone = [(name, "benchmark", config.benchmark) for name in ("restart", "blind", "caption_only", "score", "audit")]
    pairs = [*alone, ("from_extraction", "score", config.score), ("verdicts", "score", config.score)]
    refuse([(bool(other) or not getattr(config, name), only_with.format(name, flag)) for name, flag, other in pairs])
    refuse_outside(config, 0, 1e6, "audit")
    passes = [name for name in ("restart", "blind", "caption_only", "model") if getattr(config, name)]
    refuse([
        (bool(config.model or config.score), "--model is missing"),
        (bool(config.data or config.benchmark), "--data is missing (or --benchmark)"),
        (not config.score or not passes, f"--score asks no model: leave --{(passes or [''])[0]} out"),
        (not config.benchmark or config.group_size == 1, f"--group_size {config.group_size}: a benchmark counts one "
         "response to each question; run it again with another --seed and --out, or give its questions as --data"),
        (not config.benchmark or not config.clip, "--clip is a part of the reward: leave it out with --benchmark"),
    ])


def check_training(config: Config):
    """What the warm-up and the RL stages need."""
    Q, U, most = config.questions_per_rollout, config.questions_per_update, config.max_prompt + config.max_response
    weights = [getattr(config, name) for name in vars(config) if name.endswith("_weight")]
    refuse_outside(config, 1, 1e9, "questions_per_rollout questions_per_update epochs token_budget")
    refuse_outside(config, 0, 1e9, "max_steps save_every lr weight_decay kl_coef")
    refuse_outside(config, 0, 1e9, "clip_weight keyword_weight format_weight length_weight accuracy_weight")
    refuse_outside(config, 1e-9, 1e9, "max_grad_norm")
    refuse_outside(config, 0, 1, "clip_low warmup_ratio")
    refuse_outside(config, 0, 100, "clip_high")
    refuse_outside(config, 1, 1e9, "clip_dual")
    refuse([
        (config.group_size >= 2, f"--group_size {config.group_size}: a group needs at least 2 responses to compare"),
        (config.temperature > 0, f"--temperature {config.temperature}: sampling for training needs more than 0"),
        (config.stage == "sft" or sum(weights) > 0, "all reward weights are 0: there is nothing to learn"),
        (Q % U == 0, f"--questions_per_rollout {Q} is not a multiple of --questions_per_update {U}"),
        (config.stage != "sft" or Q == U, f"--questions_per_rollout {Q} and --questions_per_update {U} "
         "are the same thing in the warm-up: give the same"),
        (config.token_budget >= most,
         f"--token_budget {config.token_budget} is less than --max_prompt + --max_response = {most}"),
        (config.lr_decay in ("constant", "cosine"), f"--lr_decay {config.lr_decay}: give constant or cosine"),
        (config.adam_dtype in ("float32", "bfloat16"), f"--adam_dtype {config.adam_dtype}: give float32 or bfloat16"),
    ])


SAME_RESULT = {"restart", "token_budget", "slots", "cuda_graphs", "save_every", "keep_prompts",
               "gradient_checkpointing", "ref_offload", "patience", "plan", "gpus", "gpu_gb"}


def settings(config: Config) -> dict:
    """What config.json holds."""
    return dataclasses.asdict(config)


def inside(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def check_folder(config: Config, folder: str):
    """Refuse to mix this run with what lies in its folder, and to write over its own input."""
    for name in ("model", "data"):
        if inside(getattr(config, name), folder) and (config.restart or config.stage == "sample"):
            raise InputError(f"--{name} {getattr(config, name)} lies in {folder}, which this run replaces: "
                             "give another --out")
    try:
        os.makedirs(config.out or ".", exist_ok=True)
        writable = os.access(config.out or ".", os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise InputError(f"--out {config.out}: no folder can be made or written there")
    path = os.path.join(folder, "config.json")
    if config.stage == "sample" or not os.path.isdir(folder) or not os.listdir(folder):
        return
    try:
        with open(path) as f:
            found = dict(json.load(f))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} has no readable config.json, so it is no run to resume or replace: move it away, "
                         "or give another --out") from error
    changed = [f"--{name} was {found.get(name)} and is {value}" for name, value in settings(config).items()
               if found.get(name) != value and name not in SAME_RESULT]
    if changed and not config.restart:
        raise InputError(f"{folder} holds a run with other settings ({', '.join(changed)}): "
                         "give another --out, or --restart to replace it")


def complain(error: InputError, aloud: bool) -> int:
    """Say in one line what is wrong with the input; returns the exit code for that."""
    if aloud:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
