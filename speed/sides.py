"""One side of the whole-step comparison of speed/step.py, in a process of its own: this project's step, or TRL's.

    python speed/sides.py ours FOLDER CASES THREADS        FOLDER: a model with processor; CASES: json, a list of Case
    python speed/sides.py trl FOLDER CASES THREADS         its first case alone: a trainer has one setting

Each line on standard input is the number of a case; the side then takes one GRPO step of it and answers with a line
of json: its seconds, those of the update alone, the lengths of the responses, the peak memory so far. Waiting between
steps lets two sides take turns on one machine. Everything that libraries print goes to standard error.
"""
import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, TrainerCallback

import data
import rewards
import train
from train import Config
from engine.plan import GB, make_optimizer, make_plan, shape_of
from engine.policy import choose_loss
from engine.weights import load_processor
from plumbing.log import peak_memory
from plumbing.processes import ahead, stop_processes

SETTINGS = dict(  # of both sides; Config's names
    temperature=1.0, top_p=1.0, kl_coef=0.01, clip_ratio_low=0.2, clip_ratio_high=0.3, lr=1e-6, weight_decay=0.01,
    max_grad_norm=1.0, keyword_weight=1.0, keyword_scope="response", min_pixels=28 * 28, max_pixels=448 * 448)
KEY_WORDS = tuple(map(str, range(10)))  # an untrained model writes some digits and not others: rewards that differ


@dataclass(frozen=True)
class Case:
    """What one GRPO step works on."""

    name: str
    questions: int  # Q
    tokens: int  # most tokens of a response
    group_size: int = 8  # G
    stop: float = 0.0  # share of the vocabulary that ends a response; 0: all responses have `tokens` tokens
    prompt: int = 368  # tokens
    side: int = 448  # pixels of the square image
    updates: int = 1  # optimiser steps per rollout
    slots: int = 0  # of our sampler; 0: one per response
    dtype: str = "float32"  # master weights are float32 on both sides whatever this is
    micro_batch: int = 8  # TRL's per_device_train_batch_size
    options: dict = field(default_factory=dict, hash=False)  # other settings of our Config, by name


def make_sample(processor, case: Case, seed: int) -> data.Sample:
    """A question with a noise image whose prompt has exactly `case.prompt` tokens."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (case.side, case.side, 3), generator=generator, dtype=torch.uint8)
    sample = data.Sample(f"q{seed}", "", (Image.fromarray(noise.numpy()),), "0", KEY_WORDS)
    short = case.prompt - len(data.encode_prompt(sample, processor).input_ids)
    assert short > 0, f"an image of side {case.side} alone takes more than {case.prompt} tokens"
    sample = dataclasses.replace(sample, question="~" * short)  # one token each: no merges
    length = len(data.encode_prompt(sample, processor).input_ids)
    assert length == case.prompt, f"{length} tokens instead of {case.prompt}"
    return sample


def make_samples(processor, case: Case) -> list[data.Sample]:
    return [make_sample(processor, case, seed) for seed in range(case.questions)]


def end_tokens(processor, case: Case) -> list[int]:
    """The tokenizer's own end token and as many others as make up the share `stop`; none where nothing may stop."""
    count = round(case.stop * len(processor.tokenizer))
    return sorted({processor.tokenizer.eos_token_id, *range(count - 1)}) if count else []


# ----------------------------------------------------------------------------------------- this project


def our_config(case: Case, folder: str, out: str) -> Config:
    path = f"{out}/{case.name.replace(',', '')}.jsonl"  # a comma would stand between two files
    return Config(stage="1", model=folder, data=path, out=out, clip="", dtype=case.dtype, group_size=case.group_size,
                  max_prompt=case.prompt, max_response=case.tokens,
                  slots=case.slots or case.questions * case.group_size, questions_per_rollout=case.questions,
                  questions_per_update=case.questions // case.updates, **SETTINGS | case.options)


def write_questions(samples: list[data.Sample], config: Config):
    """The samples as the data file that a training run reads."""
    rows = []
    for sample in samples:
        image = f"{config.data}.{sample.qid}.png"
        sample.images[0].save(image)
        rows.append(dict(qid=sample.qid, problem=sample.question, answer=sample.answer, images=[image],
                         key_words=list(sample.key_words)))
    with open(config.data, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def ours(folder: str, cases: list[Case], out: str, commands, answer):
    """train.rl_step on a Run of train.start; other cases swap its questions and settings, not its models."""
    processor = load_processor(folder, SETTINGS["min_pixels"], SETTINGS["max_pixels"])
    configs = [our_config(case, folder, out) for case in cases]
    for case, config in zip(cases, configs):
        write_questions(make_samples(processor, case), config)
    first = train.start(configs[0])
    runs = [dataclasses.replace(first, config=config, samples=data.load_samples(config.data),
                                grpo_loss=choose_loss(train.grpo_loss, config.fused_loss, first.device, log=print))
            for config in configs]
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GB
    plans = [make_plan(config, shape_of(folder), 1, room).peaks for config in configs]
    optimizer = make_optimizer(first.policy, first.config)
    for step, command in enumerate(commands):
        case, run = cases[int(command)], runs[int(command)]
        first.replica.generation_config.eos_token_id = end_tokens(processor, case) or [len(processor.tokenizer)]
        start = time.perf_counter()
        prompts = ahead(data.encode_prompt, run.samples, len(run.samples), processor)
        answered, _, timer = train.rl_step(run, optimizer, prompts, step, step + 1)
        seconds = time.perf_counter() - start
        answer(seconds=seconds, update=timer.seconds["update"], phases=timer.seconds, peak_memory_gb=peak_memory(),
               planned_gb={phase: peak / GB for phase, peak in plans[int(command)].items()},
               lengths=[[len(response.ids) for response in one.responses] for one in answered])
    stop_processes(0)


# -------------------------------------------------------------------------------------------------- TRL


def their_dataset(samples: list[data.Sample]):
    """The same questions as TRL wants them; images stay in memory, so that it need not decode each G times."""
    from datasets import Dataset

    prompts = [[{"role": "user", "content": data.INSTRUCTION + sample.question}] for sample in samples]

    def look_up(batch):
        chosen = [samples[i] for i in batch["row"]]
        return dict(prompt=[prompts[i] for i in batch["row"]], image=[sample.images[0] for sample in chosen],
                    row=batch["row"])

    return Dataset.from_dict(dict(row=list(range(len(samples))))).with_transform(look_up)


def their_config(processor, case: Case, out: str):
    """GRPOConfig with our settings under TRL's names."""
    from trl import GRPOConfig

    tokenizer, rows = processor.tokenizer, case.questions * case.group_size
    forbidden = [tokenizer.convert_tokens_to_ids(token) for token in
                 ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")]  # as in our sampler
    if not case.stop:
        forbidden.append(tokenizer.eos_token_id)
    return GRPOConfig(
        output_dir=out, num_generations=case.group_size, max_completion_length=case.tokens,
        per_device_train_batch_size=case.micro_batch, steps_per_generation=rows // case.micro_batch,
        gradient_accumulation_steps=rows // case.micro_batch // case.updates,
        temperature=SETTINGS["temperature"], top_p=SETTINGS["top_p"], top_k=0,
        generation_kwargs=dict(suppress_tokens=forbidden), beta=SETTINGS["kl_coef"],
        epsilon=SETTINGS["clip_ratio_low"], epsilon_high=SETTINGS["clip_ratio_high"], loss_type="dapo",
        learning_rate=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"], max_grad_norm=SETTINGS["max_grad_norm"],
        lr_scheduler_type="constant",
        gradient_checkpointing=Config.gradient_checkpointing, gradient_checkpointing_kwargs=dict(use_reentrant=False),
        bf16=case.dtype == "bfloat16", model_init_kwargs=dict(dtype=case.dtype),  # the latter is of the reference
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=torch.cuda.is_available(), max_steps=10**6,
        shuffle_dataset=False, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True)


class Turns(TrainerCallback):
    """Starts a step when told to, and says what it took: a GRPO step is `updates` of the trainer's."""

    def __init__(self, case: Case, samples: list[data.Sample], commands, answer):
        self.case, self.samples, self.commands, self.answer = case, samples, commands, answer

    def wait(self, control):
        control.should_training_stop = next(self.commands, None) is None
        self.start = time.perf_counter()

    def on_train_begin(self, args, state, control, **unused):
        self.wait(control)

    def on_step_end(self, args, state, control, **unused):
        if state.global_step % self.case.updates == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            end, G = time.perf_counter(), self.case.group_size
            self.answer(seconds=end - self.start, update=end - self.rewarded, peak_memory_gb=peak_memory(),
                        lengths=[self.lengths[i : i + G] for i in range(0, len(self.lengths), G)])
            self.wait(control)

    def reward(self, completions, completion_ids, row, **unused) -> list[float]:
        """Our reward as TRL calls it, once per rollout: the completions of a question follow one another."""
        self.lengths = [len(ids) for ids in completion_ids]
        texts = [completion[0]["content"] for completion in completions]
        asked = [self.samples[i] for i in row[:: self.case.group_size]]
        total, _ = rewards.score(asked, texts, self.lengths, dict(keyword=SETTINGS["keyword_weight"]), None,
                                 keyword_scope=SETTINGS["keyword_scope"])
        self.rewarded = time.perf_counter()  # what follows is the update: log-probs came before
        return total.tolist()


def theirs(folder: str, cases: list[Case], out: str, commands, answer):
    """GRPOTrainer.train(), held in its callback between steps."""
    from trl import GRPOTrainer

    case = cases[0]
    processor = load_processor(folder, SETTINGS["min_pixels"], SETTINGS["max_pixels"])
    samples = make_samples(processor, case)
    for sample in samples:  # TRL makes the prompt from a conversation, we from its text
        text = data.INSTRUCTION + sample.question
        content = [dict(type="image", image=sample.images[0]), dict(type="text", text=text)]
        ids = processor.apply_chat_template([[dict(role="user", content=content)]], add_generation_prompt=True,
                                            tokenize=True, return_dict=True)["input_ids"]
        assert list(ids[0]) == data.encode_prompt(sample, processor).input_ids, "the prompts differ"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = end_tokens(processor, case) or processor.tokenizer.eos_token_id
    turns = Turns(case, samples, commands, answer)

    GRPOTrainer(model, turns.reward, their_config(processor, case, out), their_dataset(samples),
                processing_class=processor, callbacks=[turns]).train()


def main():
    which, folder, cases, threads = sys.argv[1:]
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    torch.set_num_threads(int(threads))

    def answer(**figures):
        print(json.dumps(figures), file=channel, flush=True)

    side = dict(ours=ours, trl=theirs)[which]
    cases = [Case(**case) for case in json.loads(cases)]
    with tempfile.TemporaryDirectory() as out:
        side(folder, cases, out, (line for line in sys.stdin if line.strip()), answer)


if __name__ == "__main__":
    main()
