"""Why does it not learn? Plain words from the last steps' metrics, each with its number and what to try.

    doctor = Doctor(config)
    for line in doctor.look(metrics):  print(line)      after each step: what has not been said yet in this stage
    doctor.said                                         all of it, for the end of the run and for view.py

It knows the metrics alone, and changes nothing. A limit is set so that a healthy run of the demo hears nothing.
"""
from collections import deque
from collections.abc import Iterator

WINDOW = 10  # steps that a judgement looks back on
ADVICE = {  # what to look at when a part of the reward is the same for all responses to a question
    "clip": "check that --clip is the right folder and that --clip_target lies between the cosines of bad and good "
            "descriptions",
    "keyword": "read some descriptions beside their key_words in rollouts/: other words, or another language?",
    "accuracy": "read some answers beside their gold in rollouts/: too hard, or golds that nothing can match?",
}


class Doctor:
    """Looks at each step of one stage. config: a train.Config, or an object with its names."""

    def __init__(self, config):
        self.weights = {name.removesuffix("_weight"): weight for name, weight in vars(config).items()
                        if name.endswith("_weight") and weight > 0}
        self.lr, self.kl_coef, self.rl = config.lr, config.kl_coef, config.stage in ("1", "2")
        self.first, self.last = [], deque(maxlen=WINDOW)  # metrics of the first and of the last steps
        self.held_out, self.steps = [], 0  # eval/accuracy so far
        self.said = {}  # symptom -> line

    def look(self, metrics: dict) -> list[str]:
        """Lines about what the step that has just ended shows for the first time; none while the run is too young."""
        self.last.append(metrics)
        self.steps += 1
        self.held_out += [metrics["eval/accuracy"]] if metrics.get("eval/accuracy") is not None else []
        if len(self.first) < WINDOW // 2:
            self.first.append(metrics)
        if len(self.last) < WINDOW:
            return []
        new = {name: line for name, line in self.symptoms() if name not in self.said}
        self.said |= new
        return list(new.values())

    def mean(self, name: str, rows=None) -> float:
        """Over the last steps (or these) that have the metric; nan where none has, which is above no limit."""
        values = [row[name] for row in (self.last if rows is None else rows) if row.get(name) is not None]
        return sum(values) / len(values) if values else float("nan")

    def symptoms(self) -> Iterator[tuple[str, str]]:
        kl, gap, loss = (self.mean(name) for name in ("policy/kl", "policy/sampler_gap", "opt/loss"))
        begun = self.mean("opt/loss", self.first)
        still = kl < 1e-7 and self.kl_coef > 0 if self.rl else loss > 0.999 * begun and self.steps >= 3 * WINDOW
        if self.lr > 0 and still:
            number = f"policy/kl {kl:.1g}" if self.rl else f"opt/loss {begun:.4g}, then {loss:.4g}"
            yield "still", f"the learning rate has no effect ({number}): raise --lr; is everything frozen?"
        if kl > 1:
            yield "kl", f"the policy is far from its reference (policy/kl {kl:.2g}): lower --lr or raise --kl_coef"
        if gap > 0.05:
            yield "gap", (f"sampler and trainer differ by {gap:.2g} in a token's log-prob (policy/sampler_gap): a bug "
                          "or too low a precision, never the data; try --dtype float32 on a few steps")
        if self.rl:
            yield from self.of_responses()

    def of_responses(self) -> Iterator[tuple[str, str]]:
        equal, cut, entropy = map(self.mean, ("adv/zero_std_groups", "response/truncated", "policy/entropy"))
        if equal > 0.7:
            yield "equal", (f"{equal:.0%} of the groups have equal rewards and teach nothing (adv/zero_std_groups): "
                            "ask questions that are answered right sometimes (medium.jsonl), or raise --temperature")
        for part, weight in self.weights.items():
            mean, spread = self.mean(f"reward/{part}"), self.mean(f"reward/{part}_std")
            if weight >= 0.2 and spread < 1e-3 and (mean < 0.99 or part == "clip"):
                yield part, (f"the {part} part is {mean:.3f} nearly everywhere (reward/{part}_std {spread:.1g}): "
                             f"{ADVICE.get(part, 'it teaches nothing')}")
        if cut > 0.2:
            yield "cut", (f"{cut:.0%} of the responses are cut off (response/truncated): raise --max_response, or "
                          "teach the end token by a longer warm-up")
        before = self.mean("policy/entropy", self.first)
        if entropy < 0.1 * before:
            yield "entropy", (f"the entropy has fallen from {before:.2g} to {entropy:.2g} (policy/entropy): the policy "
                              "repeats itself; lower --lr, raise --kl_coef or --temperature")
        reward, before, held_out = self.mean("reward/total"), self.mean("reward/total", self.first), self.held_out
        if not -1.01 < reward < 1.01:
            yield "reward", f"the mean reward is {reward:.3g} (reward/total), outside of -1 .. 1: check its parts"
        if len(held_out) > 1 and held_out[-1] < held_out[0] - 0.03 and reward > before:
            yield "held out", (f"the reward rises ({before:.2f} to {reward:.2f}) while held-out accuracy falls "
                               f"({held_out[0]:.2f} to {held_out[-1]:.2f}, eval/accuracy): the reward is being gamed, "
                               "or the data learned by heart; stop earlier, raise --kl_coef, read the rollouts")
