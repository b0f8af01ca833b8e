"""Which samples a stage works with: what it refuses, what it drops and counts, what it says about the rest.

A path that is wrong ends the run before it begins. An image that is there but broken costs its row, up to one row in
twenty. A gold answer that nothing can match, and a column that a reward needs and few rows have, are named at once:
in training they would cost days, and nothing would show it.
"""
import os
from collections import Counter
from collections.abc import Callable
from itertools import chain
from string import ascii_uppercase

from data import (REFUSED, ImageError, InputError, Sample, batches, encode_solution, image_size, load_samples,
                  prompt_length, seed_of)

MOST_BROKEN = 0.05  # share of rows with a broken image beyond which something else is wrong
SMALLEST = 28  # pixels of a side in the warm-up: one token of Qwen2.5-VL (release: dataset/filter.py)


def check_images(samples: list[Sample]) -> None:
    """InputError when an image file is missing: found before the run, not in its third hour."""
    missing = [f"{sample.name}: image {image}" for sample in samples for image in sample.images
               if isinstance(image, str) and not os.path.isfile(image)]
    if missing:
        raise InputError(f"{missing[0]} does not exist ({len(missing)} missing in all); check it or set --image_root")


def require(samples: list[Sample], name: str, source: str, advice: str = "") -> None:
    """InputError when a sample lacks its answer, key_words or images: that reward would be 0 whatever is said."""
    bare = [sample.qid for sample in samples if not getattr(sample, name)]
    if bare:
        raise InputError(f"{source}: {len(bare)} of {len(samples)} questions have no {name}, the first is qid "
                         f"{bare[0]}; add the column or drop these rows{advice}")


def unmatched(samples: list[Sample], correct: Callable[[str, str, tuple], bool]) -> list[Sample]:
    """Those whose gold answer is right for no response: neither for itself nor, with choices, for a letter of one."""
    return [sample for sample in samples if sample.answer and not any(
        correct(spelling, sample.answer, sample.choices)
        for spelling in [*ascii_uppercase[:len(sample.choices)], *sample.choices] or [sample.answer])]


def check_golds(samples: list[Sample], correct: Callable, source: str, log=print) -> None:
    """Names the gold answers that nothing can match, since the model would be called bad at them; InputError if all."""
    lost = unmatched(samples, correct)
    if lost:
        message = (f"{len(lost)} of {len(samples)} gold answers can be matched by no response, the first is "
                   f"{lost[0].name}: {lost[0].answer!r:.60}; see `python data.py check`")
        if len(lost) == len(samples):
            raise InputError(f"{source}: {message}")
        log(f"note: {message}")


def sft_verdict(sample: Sample, processor, max_response: float) -> str:
    """"kept", or why a warm-up row is dropped (release: dataset/filter.py). Of images only the headers are read."""
    if not sample.solution:
        return "no_solution"
    if "let me rethink it" in sample.solution.lower():
        return "rethink"
    if REFUSED.search(sample.solution):
        return "control_token"
    if processor is None:
        return "kept"
    if any(side < SMALLEST for image in sample.images for side in image_size(image)):
        return "small_image"
    return "kept" if len(encode_solution(sample, processor)) <= max_response else f"over {max_response} tokens"


def worth_imitating(samples: list[Sample], config, processor, log=print) -> list[Sample]:
    """The warm-up rows that `sft_verdict` keeps. How many have which verdict is logged, the most frequent first."""
    most = float("inf") if config.cutoff else config.max_response  # what is cut is never too long
    verdicts = [sft_verdict(sample, processor, most) for sample in samples]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts).most_common())
    log(f"warm-up data: {counts}")
    if "kept" not in verdicts:
        raise InputError(f"{config.data}: no warm-up row is left ({counts}): see --max_response and the row format")
    return [sample for sample, verdict in zip(samples, verdicts) if verdict == "kept"]


def drop_long(samples: list[Sample], processor, max_prompt: int, log=print) -> list[Sample]:
    """Prompts of more than max_prompt tokens are dropped up front, never cut: a cut prompt loses image tokens. Rows
    with an image whose header is broken are dropped as well; InputError where these are more than one in twenty."""
    whole, broken = [], []
    for sample in samples:
        try:
            whole.append((prompt_length(sample, processor), sample))
        except ImageError as error:
            broken.append(f"{sample.name}: {error}")
    if broken:
        first = f"{len(broken)} of {len(samples)} rows have a broken image, the first: {broken[0]}"
        if len(broken) > MOST_BROKEN * len(samples):
            raise InputError(f"over 5 %: {first}")
        log(f"dropped: {first}")
    kept = [sample for length, sample in whole if length <= max_prompt]
    longest = "the longest: qid {1.qid} with {0}".format(*max(whole, key=lambda pair: pair[0]))
    if not kept:
        raise InputError(f"no prompt is within {max_prompt} tokens ({longest}): raise --max_prompt or cut --max_pixels")
    if len(kept) < len(whole):
        log(f"dropped {len(whole) - len(kept)} of {len(whole)} prompts, over {max_prompt} tokens ({longest})")
    return kept


def usable(samples: list[Sample], config, processor, correct: Callable, log=print) -> list[Sample]:
    """The samples that the stage of `config` (train.Config) works with; a line says what they are. InputError: what it
    must refuse. correct: as in grading.equal. Without a processor, what needs one is left out."""
    counts = [f"{sum(bool(getattr(sample, name)) for sample in samples)} with {name}"
              for name in ("images", "answer", "key_words", "choices")]
    log(f"{config.data}: {len(samples)} rows, {', '.join(counts)}")
    if config.stage != "sft" and config.grader == "own":
        check_golds(samples, correct, config.data, log)
    check_images(samples)
    if config.accuracy_weight > 0 or config.stage == "sample":
        require(samples, "answer", config.data)
    if config.keyword_weight > 0:
        require(samples, "key_words", config.data)
    if config.clip_weight > 0 and not config.allow_text:
        require(samples, "images", config.data, ", or keep them with --allow_text True")
    if processor is not None:
        samples = drop_long(samples, processor, config.max_prompt, log)
    if config.stage == "sft":
        samples = worth_imitating(samples, config, processor, log)
    if config.stage == "sample" and config.drop_last:
        whole = sorted(chain(*batches(len(samples), config.questions_per_rollout, 1, config.seed)))
        log(f"left out: {len(samples) - len(whole)} questions that fill no batch of {config.questions_per_rollout}")
        samples = [samples[i] for i in whole]
    return samples


def held_out(config, processor, log=print) -> list[Sample]:
    """The questions of --eval_data that training asks: eval_questions of them, always the same ones."""
    if not config.eval_data:
        return []
    root = "" if "," in config.image_root else config.image_root  # several are those of --data
    samples = load_samples(config.eval_data, root, config.split)
    chosen = sorted(samples, key=lambda sample: seed_of("held out", sample.qid))[: config.eval_questions]
    check_images(chosen)
    require(chosen, "answer", config.eval_data)
    return drop_long(chosen, processor, config.max_prompt, log) if processor else chosen
