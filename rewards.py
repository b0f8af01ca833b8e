r"""The five rewards of a response, each in [0, 1], and their weighted sum.

    clip      does the description match the image?       min(max(cos(image, description), 0) / 0.4, 1)
    keyword   does it mention what matters?               found key words / key words
    format    are all sections there?                     0 or 1
    length    is it short enough?                         min(512 / tokens, 1)
    accuracy  is the answer right?                        0 or 1

    rewards = sum_k weight_k part_k                       stage 1: .4 clip + .4 keyword + .1 format + .1 length
                                                          stage 2: .9 accuracy + .1 format

`python rewards.py --response FILE --answer 7 ..` says what one response earns, and why (plumbing/playground.py).
The parts are pure. A missing section scores 0 and never raises; a missing CLIP model stops the run before it starts.
CLIP is never trained and runs in fp32. Q questions with G responses each are N = Q G sequences, group-major.
docs/differences.md lists where the rules deviate from the release; rules="release" and grader="release" are exact.
"""
import math
import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from data import ANSWER, DESCRIPTION, RATIONALES, STEP, InputError, Sample, Sections, parse
from engine.sampler import Response
from grading.algebra import process_grader
from grading.equal import characters, cut, same_answer

# ---------------------------------------------------------------- the five parts

def clip_reward(cosine: torch.Tensor, target: float) -> torch.Tensor:
    """min(max(cosine, 0) / target, 1): a cosine of target (0.4) is as good as it gets (PeBR pebr_1.py:62).

        cosine, target   -> reward
        -0.20, 0.4       -> 0.0
        0.10, 0.4        -> 0.25
        0.40, 0.4        -> 1.0
    """
    return (cosine.clamp(min=0) / target).clamp(max=1)


# Thai, Lao, Burmese, Khmer, Japanese, Chinese and Korean
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"


def one_line(text: str) -> str:
    """The spelling in which key words are looked up; of a longer text the part that `cut` leaves."""
    return " ".join(characters(cut(text)).casefold().split())


@lru_cache(maxsize=4096)
def whole_word(word: str) -> re.Pattern:
    """Finds a key word as a whole word. Where a script has no spaces it begins and ends anywhere. A digit beyond a
    point, or three beyond a comma, belong to the same number: neither 3 nor 5 is in 3.5."""
    before = "" if re.match(f"[{UNSPACED}]", word) else rf"(?<![^\W{UNSPACED}])(?<!\d\.)"
    after = "" if re.match(f"[{UNSPACED}]", word[-1]) else rf"(?![^\W{UNSPACED}])(?!\.\d)"
    before += r"(?<!\d,)" if re.match(r"\d{3}(?!\d)", word) else ""
    after += r"(?!,\d{3}(?!\d))" if word[-1].isdigit() else ""
    return re.compile(before + re.escape(word) + after)


def keyword_reward(text: str, key_words: tuple[str, ...]) -> float:
    """Share of the key words that the text holds as whole words, in any case, each once; 0 without key words.

        text, key words                                -> reward
        "A red circle.", ("red", "circle")             -> 1.0
        "A Red CIRCLE, red.", ("red", "square")        -> 0.5
        "rendered in colour", ("red",)                 -> 0.0
        "3.5 (a+b)", ("(a+b)", "5", "3", "3.5")        -> 0.5
    """
    wanted, spaced = {one_line(word) for word in key_words} - {""}, one_line(text)
    found = [word for word in wanted if word in spaced and whole_word(word).search(spaced)]
    return len(found) / max(len(wanted), 1)


def format_reward(sections: Sections) -> float:
    """1 when Image Description, Rationales, Step 1 and The final answer is are all there, else 0.

        response                                                                                       -> reward
        "### Image Description: a ### Rationales: b ### Step 1: c ### The final answer is: 7"          -> 1.0
        "### Image Description: ### Rationales: b ### Step 1: c ### The final answer is: 7"            -> 1.0
        "Image Description: a. Rationales: b. Step 1: c. The final answer is: 7"                       -> 0.0
    """
    return float(None not in vars(sections).values())


def length_reward(num_tokens: int, limit: int) -> float:
    """1 up to limit (512) response tokens, then limit / num_tokens.

        tokens, limit   -> reward
        100, 512        -> 1.0
        640, 512        -> 0.8
        2048, 512       -> 0.25
    """
    return min(limit / max(num_tokens, 1), 1.0)


def accuracy_reward(answer: str | None, sample: Sample) -> float:
    """1 when the final-answer section says what the gold answer says, else 0 (grading/equal.py). None: no such section.

        response, gold answer                                              -> reward
        "### The final answer is: 7", "7"                                  -> 1.0
        "### The final answer is: 7 or 8", "7"                             -> 0.0
        "### Step 1: It is 7, so the final answer is 7", "7"               -> 0.0
    """
    return float(same_answer(answer, sample.answer, sample.choices))


CONTROL = re.compile(r"[<>]|&(?=#?\w)|\[(?:CLS|SEP|PAD|MASK|UNK|BOS|EOS)\]", re.IGNORECASE)


def caption(description: str | None) -> str:
    """What CLIP reads of a description: no control token of any tokenizer, for one such as <end_of_text> would hide
    from CLIP, and from nobody else, what follows it. open_clip's own cleaning comes first: it turns HTML escapes, full
    width and wrongly decoded letters into tokens."""
    from open_clip.tokenizer import basic_clean  # two seconds, and a run that scores captions has it already

    text = basic_clean(basic_clean(" ".join(cut(description or "").split())))
    return " ".join(CONTROL.sub(" ", text).split())


# ---------------------------------------------------------------- the release's rules, exactly (pebr_1.py)

RELEASE_HEADERS = [re.compile(rf"###\s*{name}:", re.IGNORECASE)
                   for name in (DESCRIPTION, RATIONALES, rf"{STEP}\s*1", ANSWER)]
AROUND_SIGNS = re.compile(r"(?:(?<!\s)\s+)?([<>/])\s*")  # a run of spaces is tried once, which takes linear time


def release_caption(response: str) -> str:
    """What stands between the headers of description and rationales; "" without both, and CLIP scores that as well."""
    begin = RELEASE_HEADERS[0].search(response)
    end = begin and RELEASE_HEADERS[1].search(response, begin.end())
    return response[begin.end():end.start()].strip() if end else ""


def release_parts(samples: list[Sample], responses: list[str], clip, target: float) -> dict[str, torch.Tensor]:
    """clip, keyword and format of N responses: a cosine below 0 pays less than nothing, and a key word may stand
    anywhere in the response, also within a word; one that is listed twice counts twice."""
    texts, G = [AROUND_SIGNS.sub(r"\1", response) for response in responses], len(responses) // max(len(samples), 1)
    cosines, shares = torch.zeros(len(texts)), []
    if clip is not None:
        cosines = clip.score([sample.images[:1] for sample in samples], list(map(release_caption, texts)), empty=True)
    for i, text in enumerate(map(str.lower, texts)):
        key_words = samples[i // G].key_words
        shares.append(sum(word.lower() in text for word in key_words) / max(len(key_words), 1))
    forms = [float(all(header.search(text) for header in RELEASE_HEADERS)) for text in texts]
    return {"clip": (cosines / target).clamp(max=1), "keyword": torch.tensor(shares), "format": torch.tensor(forms)}


# ---------------------------------------------------------------- the weighted sum, and a question with its responses

def score(samples: list[Sample], responses: list[str], lengths: list[int], weights: dict[str, float], clip,
          clip_target: float = 0.4, length_limit: int = 512, keyword_scope: str = "description", grader: str = "own",
          rules: str = "own") -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Raw rewards (N,) = sum_k weight_k part_k, and the parts, each (N,), of Q samples and N = Q G responses.

    All parts are computed whatever their weight; without a scorer (engine.clip) clip is 0. lengths are response tokens.
    keyword_scope "response" looks for the key words in the whole response, as the release does, but as whole words.
    grader "release" hands the whole response to the release's own accuracy rule, rules "release" to its others.
    """
    Q, N = len(samples), len(responses)
    G = N // max(Q, 1)  # a process may have no question
    assert Q * G == N == len(lengths), f"{N=} not a multiple of {Q=}, or not {len(lengths)=}"
    assert clip is not None or not weights.get("clip"), "clip has a weight but there is no scorer"
    samples_of = [sample for sample in samples for _ in range(G)]  # of each response
    sections = [parse(response) for response in responses]
    if grader == "release":
        equal = process_grader("release").equal
        accuracies = [float(equal(text, sample.answer)) for text, sample in zip(responses, samples_of)]
    else:
        accuracies = [accuracy_reward(section.answer, sample) for section, sample in zip(sections, samples_of)]
    if rules == "release":
        parts = release_parts(samples, responses, clip, clip_target)
    else:
        descriptions, cosines = [section.description for section in sections], torch.zeros(N)
        if clip is not None:
            cosines = clip.score([sample.images for sample in samples], [caption(text) for text in descriptions])
        texts = responses if keyword_scope == "response" else [description or "" for description in descriptions]
        found = [keyword_reward(text, sample.key_words) for text, sample in zip(texts, samples_of)]
        parts = {"clip": clip_reward(cosines, clip_target), "keyword": torch.tensor(found),
                 "format": torch.tensor([format_reward(section) for section in sections])}
    parts |= {
        "length": torch.tensor([length_reward(length, length_limit) for length in lengths]),
        "accuracy": torch.tensor(accuracies),
    }
    return sum((weight * parts[part] for part, weight in weights.items()), torch.zeros(N)), parts


@dataclass(order=True)
class Answered:
    """A question, G responses to it, and what they earned."""
    number: int  # of the question among those that were asked: they are finished in another order
    sample: Sample  # without images that are no paths, which are heavy
    responses: list[Response]  # G
    texts: list[str]  # G
    earned: dict[str, list[float]]  # G numbers of each part, and of the reward; in training of the advantage as well


def judge(samples: list[Sample], finished: list[tuple[int, list[Response]]], tokenizer, clip, config) -> list[Answered]:
    """Score what `engine.sampler.stream` yields, (number of a sample, G responses), of one sample or more. config: has
    train.Sampling's settings of rewards; a part without a weight there has none in the sum."""
    weights = {name.removesuffix("_weight"): value for name, value in vars(config).items() if name.endswith("_weight")}
    asked, responses = [samples[q] for q, _ in finished], [response for _, group in finished for response in group]
    texts = [tokenizer.decode(response.ids, skip_special_tokens=True) for response in responses]
    total, parts = score(asked, texts, [len(response.ids) for response in responses], weights, clip,
                         config.clip_target, config.length_limit, config.keyword_scope, config.grader, config.rules)
    G = len(responses) // len(asked)
    for k, response in enumerate(responses):
        if not all(map(math.isfinite, [total[k], *response.logprobs])):
            raise InputError(f"qid {asked[k // G].qid}: a reward or log-prob is not finite; look for inf and nan in "
                             "the model, the CLIP and the images")
    earned = {name: values.view(-1, G).tolist() for name, values in (parts | {"reward": total}).items()}
    paths = [tuple(image for image in sample.images if isinstance(image, str)) for sample in asked]
    return [Answered(q, replace(samples[q], images=paths[k]), group, texts[k * G : (k + 1) * G],
                     {name: values[k] for name, values in earned.items()}) for k, (q, group) in enumerate(finished)]


if __name__ == "__main__":
    from plumbing.playground import main

    sys.exit(main())
