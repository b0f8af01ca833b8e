"""Every setting: one dataclass, one dict of overrides per stage, one strict command line.

Precedence: defaults of Config < STAGES[stage] < command line. A stage is nothing but such a dict: its data, its
initial model (what the stage before it wrote), its reward weights, its sizes.
"""
import argparse
import difflib
import sys

from transformers import HfArgumentParser

from data import InputError


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


def refuse(rules: list[tuple[bool, str]]):
    """Raise the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise InputError(message)


def refuse_outside(config, low: float, high: float, names: str):
    """Raise if one of these numbers is not in [low, high]; nan is in no range."""
    for name in names.split():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InputError(f"--{name} {value} is not in {low:g} .. {high:g}")


def check_sampling(config):
    """What stage sample, the RL stages and eval.py need."""
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


def check_training(config):
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


def complain(error: InputError, aloud: bool) -> int:
    """Say in one line what is wrong with the input; returns the exit code for that."""
    if aloud:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2
