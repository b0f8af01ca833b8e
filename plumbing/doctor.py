"""Why does it not learn? Plain words from the last steps' metrics, each with its number and what to try.

    doctor = Doctor(config)
    for line in doctor.look(metrics):  print(line)      after each step: what has not been said yet in this stage
    doctor.said                                         all of it, for the end of the run and for view.py

It knows the metrics alone, and changes nothing. A limit is set so that a healthy run of the demo hears nothing.
"""
from collections import deque
from collections.abc import Iterator

WINDOW = 10  # steps that a judgement looks back on


class Doctor:
    """Looks at each step of an RL stage; of a warm-up it says nothing. config: has the names of train.Config."""

    def __init__(self, config):
        self.weights = {name.removesuffix("_weight"): weight for name, weight in vars(config).items()
                        if name.endswith("_weight") and config.stage in ("1", "2")}
        self.learns = config.lr > 0 and config.kl_coef > 0
        self.first, self.last = [], deque(maxlen=WINDOW)  # metrics of the first and of the last steps
        self.held_out = []  # eval/accuracy so far
        self.said = {}  # symptom -> line

    def look(self, metrics: dict) -> list[str]:
        """Lines about what the step that has just ended shows for the first time; none while the run is too young."""
        self.last.append(metrics)
        self.held_out += [metrics["eval/accuracy"]] if metrics.get("eval/accuracy") is not None else []
        if len(self.first) < WINDOW // 2:
            self.first.append(metrics)
        if len(self.last) < WINDOW or not self.weights:  # a warm-up may and should become sure of itself
            return []
        new = {name: line for name, shows, line in self.symptoms() if shows and name not in self.said}
        self.said |= new
        return list(new.values())

    def mean(self, name: str, rows=None) -> float:
        """Over the last steps (or these) that have the metric; nan where none has, which is above no limit."""
        values = [row[name] for row in (self.last if rows is None else rows) if row.get(name) is not None]
        return sum(values) / len(values) if values else float("nan")

    def symptoms(self) -> Iterator[tuple[str, bool, str]]:
        """(name, whether it shows, what is then said) of each."""
        equal, kl, gap, cut, reward, entropy = map(self.mean, (
            "adv/zero_std_groups", "policy/kl", "policy/sampler_gap", "response/truncated", "reward/total",
            "policy/entropy"))
        reward_before, entropy_before = (self.mean(name, self.first) for name in ("reward/total", "policy/entropy"))
        held_out = self.held_out or [float("nan")]
        yield "equal", equal > 0.7, (
            f"{equal:.0%} of the groups have equal rewards and teach nothing (adv/zero_std_groups): ask questions that "
            "are answered right sometimes (medium.jsonl), or raise --temperature")
        for part, weight in self.weights.items():
            mean, spread = self.mean(f"reward/{part}"), self.mean(f"reward/{part}_std")
            yield part, weight >= 0.2 and spread < 1e-3 and (mean < 0.99 or part == "clip"), (
                f"the {part} part is {mean:.3f} nearly everywhere (reward/{part}_std {spread:.1g}): read responses "
                "beside their answers and key_words in rollouts/; does --clip_target fit the --clip folder?")
        yield "still", self.learns and kl < 1e-7, (
            f"the learning rate has no effect (policy/kl {kl:.1g}): raise --lr; is everything frozen?")
        yield "kl", kl > 1, (
            f"the policy is far from its reference (policy/kl {kl:.2g}): lower --lr or raise --kl_coef")
        yield "gap", gap > 0.05, (
            f"sampler and trainer differ by {gap:.2g} in a token's log-prob (policy/sampler_gap): a bug or too low a "
            "precision, never the data; try --dtype float32 on a few steps")
        yield "cut", cut > 0.2, (
            f"{cut:.0%} of the responses are cut off (response/truncated): raise --max_response, or teach the end "
            "token by a longer warm-up")
        yield "entropy", entropy < 0.1 * entropy_before, (
            f"the entropy has fallen from {entropy_before:.2g} to {entropy:.2g} (policy/entropy): the policy repeats "
            "itself; lower --lr, raise --kl_coef or --temperature")
        yield "held out", held_out[-1] < held_out[0] - 0.03 and reward > reward_before, (
            f"the reward rises ({reward_before:.2f} to {reward:.2f}) while held-out accuracy falls ({held_out[0]:.2f} "
            f"to {held_out[-1]:.2f}, eval/accuracy): the reward is being gamed, or the data learned by heart; stop "
            "earlier, raise --kl_coef, read the rollouts")
