"""The command line of a dataclass: every field is a flag, the comment beside it is its help, every mistake is one line.

    config = Flags(Config, __doc__).read(argv, overrides)     defaults < overrides (a stage's, parity's) < argv

A comment on a line of its own in the dataclass begins a group of flags in --help.
"""
import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys
from importlib.util import find_spec

from transformers import HfArgumentParser

from data import InputError
from plumbing.processes import SharedError, is_main
from plumbing.release import RELEASE

COMMENT = re.compile(r"^    (?:# (\w+)$|(\w+): [^#\n]*#\s*(.+))", re.MULTILINE)  # a heading, or a field's


def comments_of(kind) -> dict[str, tuple[str, str]]:
    """field -> (its group, its comment), read from the source of a dataclass and of those that it extends."""
    found = {}
    for ancestor in kind.__mro__[-2::-1]:  # the first is the class itself, the last is object
        group = "options"
        for heading, field, comment in COMMENT.findall(inspect.getsource(ancestor)):
            group = heading or group
            if field:
                found[field] = found.get(field, (group,))[0], comment
    return found


class Flags(HfArgumentParser):
    """The command-line flags of a dataclass, grouped and explained; every mistake is an InputError."""

    def __init__(self, kind, doc: str):
        self.comments = comments_of(kind)
        commands = "\n\n".join(doc.split("\n\n")[:2])  # of the file's docstring: what it is, and how to call it
        super().__init__(kind, description=commands, usage="%(prog)s [--flag VALUE ..]", allow_abbrev=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                             prog, max_help_position=34, width=118))
        groups = {heading: self.add_argument_group(heading) for heading, _ in self.comments.values()}
        for action in [action for action in self._optionals._group_actions if action.dest in self.comments]:
            heading, comment = self.comments[action.dest]
            self._optionals._group_actions.remove(action)
            groups[heading]._group_actions.append(action)
            action.option_strings = action.option_strings[:1]  # --max_steps is shown; --max-steps works as well
            action.help = f"{comment} (default: %(default)s)"
            if action.nargs == 0:
                action.help = f"the same as --{action.dest} False"
            elif action.metavar is None and action.choices is None:
                action.metavar = type(getattr(kind, action.dest, [])).__name__
        self._action_groups.sort(key=lambda group: group.title in ("memory", "run"))  # what a student skips comes last

    def error(self, message: str):
        raise InputError(message)

    def read(self, argv: list[str], overrides: dict):
        """argv -> the dataclass; overrides replace defaults, argv replaces both. InputError names a near flag."""
        self.set_defaults(**overrides)
        config, rest = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if rest:
            names = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(rest[0].split("=")[0], names, 1)
            raise InputError(f"unknown flag {rest[0]}: " + (f"did you mean {near[0]}?" if near else "--help lists all"))
        return config


RANGES = [  # (low, high, the settings that have to lie there); nan lies nowhere
    (1, 1e9, "group_size max_prompt max_response length_limit questions_per_rollout questions_per_update epochs "
             "token_budget eval_questions clip_ratio_c gpus gpu_gb min_pixels max_pixels"),
    (0, 1e9, "slots max_steps save_every eval_every lr weight_decay kl_coef cutoff lora_rank temperature "
             "clip_ratio_high"),
    (0, 2**31, "seed"),
    (1e-6, 1e9, "max_grad_norm lora_alpha patience grace"),
    (1e-6, 1, "top_p clip_target"),
    (0, 1, "clip_ratio_low warmup_ratio"),
]


def refuse(rules: list[tuple[bool, str]]):
    """Raise the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise InputError(message)


def check_sampling(config):
    """What every command needs: numbers in their ranges, and sizes that go together."""
    given = vars(config)
    weights = " ".join(name for name in given if name.endswith("_weight"))
    refuse([(low <= given[name] <= high, f"--{name} {given[name]} is not in {low:g} .. {high:g}")
            for low, high, names in [*RANGES, (0, 1e9, weights)] for name in names.split() if name in given])
    refuse([
        (config.slots == 0 or config.slots >= config.group_size,
         f"--slots {config.slots} cannot hold a group of --group_size {config.group_size}"),
        (config.min_pixels <= config.max_pixels,
         f"--min_pixels {config.min_pixels} is more than --max_pixels {config.max_pixels}"),
    ])


def check_training(config):
    """What the warm-up and the RL stages need."""
    Q, U, most = config.questions_per_rollout, config.questions_per_update, config.max_prompt + config.max_response
    weights = [value for name, value in vars(config).items() if name.endswith("_weight")]
    refuse([
        (config.group_size >= 2, f"--group_size {config.group_size}: a group needs at least 2 responses to compare"),
        (config.temperature > 0, f"--temperature {config.temperature}: sampling for training needs more than 0"),
        (config.stage == "sft" or sum(weights) > 0, "all reward weights are 0: there is nothing to learn"),
        (Q % U == 0, f"--questions_per_rollout {Q} is not a multiple of --questions_per_update {U}"),
        (config.stage != "sft" or Q == U, f"--questions_per_rollout {Q} and --questions_per_update {U} "
         "are the same thing in the warm-up: give the same"),
        (config.token_budget >= most,
         f"--token_budget {config.token_budget} is less than --max_prompt + --max_response = {most}"),
        (config.tracker == "none" or find_spec(config.tracker), f"--tracker {config.tracker}: this package is not "
         f"installed; pip install {config.tracker}, or leave the flag out"),
        (config.cutoff == 0 or config.max_prompt < config.cutoff <= most,
         f"--cutoff {config.cutoff} is not over --max_prompt, or is over --max_prompt + --max_response = {most}"),
        (bool(config.eval_data) == bool(config.eval_every), "--eval_data and --eval_every go together: give both"),
    ])


def read_stage(argv: list[str], doc: str, kind, stages: dict, recipes: dict, folders: dict[str, str]):
    """A training command line as a checked `kind` (train.Config).

    Its defaults < stages[stage] < recipes[recipe] < --parity < argv.
    """
    words = dict(zip(argv, [*argv[1:], ""])) | dict(word.split("=", 1) for word in argv if "=" in word)
    stage = words.get("--stage", "")
    if stage not in stages and not {"-h", "--help"} & set(argv):
        raise InputError(f"--stage {stage or 'is missing'}: give one of {', '.join(stages)}")
    release = RELEASE[stage] if stage in stages and words.get("--parity") == "release" else {}
    settings = stages.get(stage, {}) | recipes.get(words.get("--recipe"), {}) | release
    config = Flags(kind, doc).read(argv, settings)
    given = {name: getattr(config, name).replace("{out}", config.out) for name in ("model", "data")}
    if config.plan and config.model == settings.get("model") and not os.path.exists(given["model"]):
        given["model"] = stages["sft"]["model"]  # a plan needs its shape only, and the stage before has yet to make it
    config = dataclasses.replace(config, **given)
    if not config.plan:
        check_inputs(config, stages, folders)
    check_sampling(config)
    if stage != "sample":
        check_training(config)
    return config


def check_inputs(config, stages: dict[str, dict], folders: dict[str, str]):
    """A stage's default input is what an earlier stage made; if it is missing, say with which command."""
    for name in ("model", "data"):
        default = stages[config.stage][name]
        for maker, folder in folders.items():
            made_here = default.startswith(f"{{out}}/{folder}/")
            path = default.replace("{out}", config.out)
            if made_here and getattr(config, name) == path and not os.path.exists(path):
                raise InputError(f"{path} is missing: make it with `train.py --stage {maker} --out {config.out}`, "
                                 f"or give --{name}")


def complain(error: InputError) -> int:
    """Say in one line what is wrong with the input; returns the exit code for that."""
    if is_main() or not isinstance(error, SharedError):
        print(f"error: {error}" if error.code == 2 else error, file=sys.stderr, flush=True)
    return error.code
