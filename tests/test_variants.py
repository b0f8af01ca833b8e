"""Each patch of variants/ applies to a copy, takes a step of RL there, and computes what its head says, by hand."""
import importlib.util
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, picture
from data import Prompt, Sample, seed_of

if not shutil.which("git"):
    pytest.skip("git, which applies the patches, is not installed", allow_module_level=True)


def load(name, path, **others):
    """A file as a module of this name; `others` stand in for modules that it imports."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for other, stand_in in {name: module, **others}.items():
            patch.setitem(sys.modules, other, stand_in)
        spec.loader.exec_module(module)
    return module


trial = load("trial", os.path.join(ROOT, "variants", "try.py"))
PATCHES = {name: trial.read(name) for name in trial.NAMES}
with open(os.path.join(ROOT, "docs", "variants.md"), encoding="utf-8") as page:
    PAGE = page.read()
CLIPS = (0.2, 0.3, 3.0)
EXAMPLE = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # rewards of one group: mean .25, standard deviation .5


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """variant(name): the patched copy's train, rewards and flags, as modules; what else they import comes from here."""
    made = {}

    def patched(name):
        if name not in made:
            folder = os.path.realpath(tmp_path_factory.mktemp(name))
            for path in ("train.py", "rewards.py", "plumbing/flags.py"):
                os.makedirs(os.path.dirname(os.path.join(folder, path)), exist_ok=True)
                shutil.copy(os.path.join(ROOT, path), os.path.join(folder, path))
            done = trial.apply(folder, name)
            assert done.returncode == 0, done.stderr
            flags = load("plumbing.flags", os.path.join(folder, "plumbing/flags.py"))
            rewards = load("rewards", os.path.join(folder, "rewards.py"))
            modules = {"rewards": rewards, "plumbing.flags": flags}
            train = load("train", os.path.join(folder, "train.py"), **modules)
            made[name] = SimpleNamespace(train=train, rewards=rewards, flags=flags)
        return made[name]

    return patched


# ------------------------------------------------------------------------------------- all patches


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_one_idea_of_at_most_25_lines_and_says_what_and_why(name):
    head, diff = PATCHES[name].split("diff --git", 1)
    assert head.startswith(f"{name}: ") and max(map(len, head.split("\n"))) <= 120
    words = re.findall(r"^(\w+) {2,}\S", head, re.MULTILINE)
    assert words == ["What", "Equation", "Source", "When", "Mind", "GPU", "Breaks"]
    assert set(re.findall(r"^\+\+\+ b/(.*)", diff, re.MULTILINE)) <= {"train.py", "rewards.py", "plumbing/flags.py"}
    lines = len(re.findall(r"^[+-](?!\+\+ |-- ) *\S", diff, re.MULTILINE))
    assert 0 < lines <= 25 and f"[{name}](../variants/{name}.patch) | {lines} |" in PAGE
    for test in trial.broken_tests(name):  # a prefix of a test that is there
        file, prefix = test.split("::")
        with open(os.path.join(ROOT, "tests", file), encoding="utf-8") as source:
            assert f"def {prefix}" in source.read()


def test_try_copies_what_git_knows_and_refuses_an_unknown_name(tmp_path, capsys):
    trial.copy_files(str(tmp_path))
    assert (tmp_path / "kernels" / "grpo.py").exists() and not (tmp_path / "runs").exists()
    assert trial.apply(str(tmp_path), "gspo").returncode == 0 and trial.apply(str(tmp_path), "gspo").returncode == 1
    assert "def sequence_old" in (tmp_path / "train.py").read_text()
    assert trial.main([]) == 0 and "gspo: the ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        trial.main(["gspi"])
    assert "there is no variant gspi" in capsys.readouterr().err


# ------------------------------------------------------------------------- one step on the tiny model


@pytest.fixture(scope="module")
def rows():
    """Eight questions, the last of them without an image."""
    samples = [Sample(f"q{i}", f"How many {i}?", (picture(56 + 28 * (i % 3), 56, i),), str(i), tuple("abcdeinorst123"))
               for i in range(7)]
    return [*samples, Sample("q7", "How many 7?", (), "7", tuple("abcdeinorst123"))]


@pytest.fixture(scope="module")
def models(tiny_folder, processes):
    """Policy, reference and replica, made once; `step` puts back the weights of the first."""
    from engine.policy import Policy

    device, mesh = processes
    policy, reference = (Policy.load(tiny_folder, device, torch.float32, mesh, torch.float32) for _ in range(2))
    return policy, reference.requires_grad_(False), Policy.load(tiny_folder, device, torch.float32).eval()


@pytest.fixture
def step(variant, models, rows, processor, processes):
    """step(name, flags): the second of two steps of stage 1, on 4 questions with 2 updates, in the patched copy.

    Returns what rl_step does, the micro-batches of each update, what grpo_loss was called with (log-probs now and old),
    and the largest change of a weight.
    """
    policy, reference, replica = models
    before = {name: value.detach().clone() for name, value in policy.named_parameters()}

    def take(name, rows=rows, **flags):
        train = variant(name).train
        settings = dict(stage="1", dtype="float32", group_size=4, questions_per_rollout=4, questions_per_update=2,
                        max_response=12, slots=16, keyword_weight=1.0, length_weight=0.5, keyword_scope="response",
                        length_limit=9, max_prompt=200, token_budget=400)
        config = train.Config(**(settings | flags))
        batches, calls = [[4, 5, 6, 7], [0, 1, 2, 3]], []

        def grpo_loss(logprobs, old, *others):
            calls.append((logprobs.detach(), old))
            return train.grpo_loss(logprobs, old, *others)

        run = SimpleNamespace(config=config, device=processes[0], processor=processor, samples=rows, batches=batches,
                              policy=policy, ref_policy=reference, replica=replica, clip=None,
                              grpo_loss=grpo_loss)
        updates, update = [], train.update
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "rewards", variant(name).rewards)  # where pickle looks for what ranks exchange
            patch.setattr(train, "update", lambda *args: updates.append(args[2]) or update(*args))
            prompts = [train.data.encode_prompt(rows[i], processor) for i in batches[1]]
            optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
            answered, stats, _ = train.rl_step(run, optimizer, iter(prompts), 1, 2)
        with torch.no_grad():
            moved = max(float((value - before[name]).abs().max()) for name, value in policy.named_parameters())
            for name, value in policy.named_parameters():
                value.copy_(before[name])
        return SimpleNamespace(answered=answered, stats=stats, updates=updates, calls=calls, moved=moved)

    return take


def test_patches_of_different_functions_go_together(tmp_path):
    trial.copy_files(str(tmp_path))
    for name in ("gdpo", "gspo", "papo", "keyword_f1", "mixed_stage"):
        assert trial.apply(str(tmp_path), name).returncode == 0, name


@pytest.mark.parametrize("name", PATCHES)
def test_a_step_of_rl_runs_and_moves_the_weights(name, step):
    flags = {"lr": 1e-3} | (dict(keyword_weight=0.2, length_weight=0.05) if name == "mixed_stage" else {})
    taken = step(name, **flags)
    assert len(taken.answered) == 4 and len(taken.stats) == 2 and taken.moved > 1e-4
    for stats in taken.stats:
        assert stats["skipped"] == 0 and stats["grad_norm"] > 0 and all(map(math.isfinite, stats.values()))
    by_question = torch.tensor([one.earned["advantage"] for one in taken.answered]).double()
    torch.testing.assert_close(by_question.sum(-1), torch.zeros(4).double(), atol=1e-4, rtol=0)  # of any variant here


def tokens_of(batch):
    """How many tokens each response of a micro-batch has."""
    return [len(ids) for _, responses in batch.groups for ids in responses]


# -------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("name, rewards, expected", [
    ("dr_grpo", [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),  # R - .25
    ("dr_grpo", [1, 0, 0, 0, 0, 0, 0, 0], [0.875] + [-0.125] * 7),
    ("rloo", [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),  # 1 - 0; 0 - (1 + 0 + 0) / 3
    ("maxrl", [1, 0, 0, 0], [3, -1, -1, -1]),  # .75 / .25, -.25 / .25
    ("maxrl", [1, 1, 1, 1, 1, 1, 1, 0], [1 / 7] * 7 + [-1]),  # .125 / .875
    ("maxrl", [0, 0, 0, 0], [0, 0, 0, 0]),
    ("dr_grpo", [0.7] * 8, [0.0] * 8),
])
def test_advantages_of_a_group(variant, name, rewards, expected):
    got = variant(name).train.group_advantages(torch.tensor([rewards], dtype=torch.float32))
    torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float32), atol=1e-4, rtol=0)


def test_gdpo_compares_each_part_within_its_group_before_they_are_added(variant):
    """Two groups of 2. Group a has parts (0, 1), (0, 1), group b (0, 1), (0, 0); both weights 1. Each part that differs
    gives -+.7071, so the sums are -+1.4142 in a and -+.7071 in b, where GRPO on the totals has -+.7071 twice. Their
    mean is 0, their standard deviation sqrt((2 x 2 + 2 x .5) / 3) = 1.2910."""
    parts = {"keyword": torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "length": torch.tensor([[0.0, 1.0], [0.0, 0.0]])}
    got = variant("gdpo").train.gdpo_advantages(parts, {"keyword": 1.0, "length": 1.0})
    expected = torch.tensor([[-1.095445, 1.095445], [-0.547723, 0.547723]])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    equal = variant("gdpo").train.gdpo_advantages({"length": torch.full((2, 4), 0.7)}, {"length": 1.0})
    assert torch.equal(equal, torch.zeros(2, 4))


def test_gdpo_weighs_spreads(variant):
    """One group of 4: accuracy (1, 0, 0, 0) weighs .9 and has advantages (1.5, -.5, -.5, -.5); clip (.50, .52, .50,
    .48) weighs .1 and has (0, 1.2247, 0, -1.2247). Sums: 1.35, -.3275, -.45, -.5725, of standard deviation .9056."""
    parts = {"accuracy": EXAMPLE, "clip": torch.tensor([[0.50, 0.52, 0.50, 0.48]])}
    got = variant("gdpo").train.gdpo_advantages(parts, {"accuracy": 0.9, "clip": 0.1})
    expected = torch.tensor([[1.4908, -0.3617, -0.4969, -0.6322]])
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------- losses of tokens


def loss_of(loss_fn, changes, advantages, weight=1.0, logprobs=None):
    """Loss and slopes in the log-probs of tokens whose log-probs have changed so much since sampling; no KL."""
    changes = torch.tensor(changes)
    now = (torch.tensor(logprobs) if logprobs else torch.full_like(changes, -1.0)).requires_grad_()
    loss, _ = loss_fn(now, now.detach() - changes, now.detach(), torch.tensor(advantages).expand(len(changes)),
                      torch.full_like(changes, weight), *CLIPS, 0.0)
    loss.backward()
    return loss.item(), now.grad.tolist()


def log(*ratios):
    return [float(torch.tensor(ratio).log()) for ratio in ratios]


@pytest.mark.parametrize("name, changes, advantage, weight, logprobs, loss, slopes", [
    # cispo: -w min(r, 5) A l. r 6 and .5, l -1 and -2: -.5 (5 x -1 + .5 x -2) = 3; slopes -.5 x 5, -.5 x .5
    ("cispo", log(6.0, 0.5), 1.0, 0.5, [-1.0, -2.0], 3.0, [-2.5, -0.25]),
    ("cispo", log(6.0, 0.5), -1.0, 0.5, [-1.0, -2.0], -3.0, [2.5, 0.25]),
    # sapo: r 1: 4/tau sigmoid(0) = 2/tau. r 2, tau 1: 4 x .731059; slope 2 x 4 x .731059 x .268941
    ("sapo", [0.0], 1.0, 1.0, None, -2.0, [-1.0]),
    ("sapo", [0.0], -1.0, 1.0, None, 1.904762, [1.0]),
    ("sapo", log(2.0), 1.0, 1.0, None, -2.924234, [-1.572895]),
    ("sapo", log(2.0), -1.0, 1.0, None, 2.822, [1.53622]),
    # rloo: ratio A, never clipped
    ("rloo", log(6.0, 0.5), 1.0, 0.5, None, -3.25, [-3.0, -0.25]),
    ("rloo", log(6.0, 0.5), -1.0, 0.5, None, 3.25, [3.0, 0.25]),
])
def test_loss_and_slopes_of_tokens(variant, name, changes, advantage, weight, logprobs, loss, slopes):
    got = loss_of(variant(name).train.grpo_loss, changes, advantage, weight, logprobs)
    assert got[0] == pytest.approx(loss, abs=1e-4) and got[1] == pytest.approx(slopes, abs=1e-4)


@pytest.mark.parametrize("name", PATCHES)
def test_at_ratio_1_every_variant_is_plain_policy_gradient(variant, name):
    """The slope of a token is -w A before the first update, whatever bounds the later ones."""
    for advantage in (2.0, -2.0):
        assert loss_of(variant(name).train.grpo_loss, [0.0], advantage, 0.5)[1] == pytest.approx([-0.5 * advantage])


@pytest.mark.parametrize("changes, advantage, loss, slopes", [
    # one response of two tokens, w 1/2; the mean of .4 and -.4 is 0, so s = 1 and nothing is clipped
    ([0.4, -0.4], 1.0, -1.0, [-0.5, -0.5]),
    # the mean of .002 and -.001 is .0005, beyond 4e-4: s = 1.0005, clipped for A > 0, not for A < 0
    ([0.002, -0.001], 1.0, -1.0004, [0.0, 0.0]),
    ([0.002, -0.001], -1.0, 1.0005, [0.50025, 0.50025]),
])
def test_gspo_has_one_ratio_for_all_tokens_of_a_response(variant, changes, advantage, loss, slopes):
    train = variant("gspo").train
    now = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(groups=[(None, [[1, 2]])], old_logprobs=now.detach() - torch.tensor(changes).double())
    old = train.sequence_old(now.detach(), batch)
    ratio = (now.detach() - old).exp()
    assert ratio[0].item() == pytest.approx(ratio[1].item(), abs=1e-12)
    config = train.Config()
    got, _ = train.grpo_loss(now, old, now.detach(), torch.full((2,), advantage), torch.full((2,), 0.5),
                             config.clip_ratio_low, config.clip_ratio_high, 3.0, 0.0)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6) and now.grad.tolist() == pytest.approx(slopes, abs=1e-6)


# ------------------------------------------------------------------------- what a step does with it


def check_equal_responses(taken):
    """Weights are 1 / (N |y|): those of a response add up to 1/N. Two questions with four responses: N = 8."""
    for batches in taken.updates:
        sums = [share.sum() for batch in batches for share in batch.weights.split(tokens_of(batch))]
        torch.testing.assert_close(torch.stack(sums), torch.full((8,), 1 / 8))


def test_gspo_in_a_step_shares_the_ratio_within_each_response_and_weighs_responses_alike(step):
    taken = step("gspo", lr=1e-3)
    check_equal_responses(taken)
    batches = taken.updates[1]  # the second update, for which the policy has moved
    means = []
    for batch, (logprobs, old) in zip(batches, taken.calls[-len(batches):]):
        for ratios in (logprobs - old).exp().split(tokens_of(batch)):
            torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), atol=2e-6, rtol=0)
            means.append(ratios[0].item())
    assert len(set(means)) == 8 and max(abs(mean - 1) for mean in means) > 1e-4


def test_sapo_weighs_responses_alike(step):
    check_equal_responses(step("sapo", lr=1e-3))


@pytest.mark.parametrize("name, weight", [("dr_grpo", 1 / (8 * 12)), ("rloo", 1 / 8)])
def test_a_token_weighs_the_same_in_short_and_long_responses(step, name, weight):
    """Dr.GRPO: 1 / (N L_max) with 8 responses of at most 12 tokens. RLOO: 1 / N."""
    for batches in step(name).updates:
        weights = torch.cat([batch.weights for batch in batches])
        torch.testing.assert_close(weights, torch.full_like(weights, weight))


def test_gdpo_in_a_step_takes_the_parts_and_their_weights(step, variant):
    """A question's advantages are not those of its summed reward: those of key words and length are added."""
    taken = step("gdpo")
    parts = {part: torch.tensor([one.earned[part] for one in taken.answered]) for part in ("keyword", "length")}
    expected = variant("gdpo").train.gdpo_advantages(parts, {"keyword": 1.0, "length": 0.5})
    torch.testing.assert_close(torch.tensor([one.earned["advantage"] for one in taken.answered]), expected)


def test_dapo_replaces_a_question_without_spread_by_one_of_the_next_step(step, rows):
    """q1 has no key words: all its responses earn 0. In its place the next step, which is the first again, has q5."""
    flat = [Sample(row.qid, row.question, row.images, row.answer, () if row.qid == "q1" else row.key_words)
            for row in rows]
    taken = step("dapo", rows=flat, length_weight=0.0)
    asked = [one.sample.qid for one in taken.answered]
    assert asked == ["q0", "q5", "q2", "q3"] and [one.number for one in taken.answered] == [0, 1, 2, 3]
    assert any(taken.answered[1].earned["advantage"])
    trained = [{prompt.sample.qid for batch in batches for prompt, _ in batch.groups} for batches in taken.updates]
    assert trained == [{"q0", "q5"}, {"q2", "q3"}]
    again = step("dapo", rows=flat, length_weight=0.0)  # a function of the step: a resume asks the same
    assert again.answered[1].texts == taken.answered[1].texts


def test_dapo_lets_the_length_part_fade_out(variant):
    """L_max 2048 and a cache of 512: 1 + R_len is 1, .5 and 0 at 1536, 1792 and 2048 tokens."""
    length_reward = variant("dapo").rewards.length_reward
    assert [length_reward(n, 1536) for n in (1, 1536, 1792, 2048, 4096)] == pytest.approx([1, 1, 0.5, 0, 0])


def test_keyword_f1_takes_from_a_description_that_lists_everything(variant):
    """Recall is 1 both times; of red, circle, blue and square 2 of 4 words belong: 2 x .5 x 1 / 1.5."""
    keyword_reward = variant("keyword_f1").rewards.keyword_reward
    assert keyword_reward("red circle", ("red circle",)) == 1
    assert keyword_reward("red circle, blue square", ("red circle",)) == pytest.approx(2 / 3)
    assert keyword_reward("", ("red",)) == keyword_reward("red", ()) == 0


def test_papo_blackens_60_percent_of_the_patches(variant, processor):
    """A black patch is what the processor makes of a black image."""
    def pixels(image):
        return processor.image_processor(image, return_tensors="pt")["pixel_values"]

    image = picture(112, 112, 0)
    seen, black = pixels(image), pixels(image.point(lambda value: 0))[0]
    group = Prompt(None, [], None, seen.repeat(20, 1), None), [[1]]
    masked, responses = variant("papo").train.blacken(group, processor, 1)
    hidden = torch.isclose(masked.pixel_values, black, atol=1e-5).all(-1)
    assert responses == [[1]] and hidden.float().mean().item() == pytest.approx(0.6, abs=0.05)
    assert torch.equal(masked.pixel_values[~hidden], group[0].pixel_values[~hidden])
    torch.testing.assert_close(masked.pixel_values[hidden], black.expand(int(hidden.sum()), -1))


def test_papo_rewards_the_distance_from_blind_log_probs_and_holds_the_entropy_down(variant, processes):
    """l = ln .5, m = ln .25: k = .5 + .693147 - 1 = .193147, its slope 1 - .5; -.01 of it, and .03 of the entropy."""
    train, slopes = variant("papo").train, []
    values = torch.nn.Parameter(torch.tensor([0.5, 1.0]).log())  # the log-prob of one token, and its entropy, 0

    def policy(packed, temperature, loss_fn):
        return (loss_fn(values[:1], values[1:], slice(0, 1)),)

    policy.parameters = lambda: [values]
    optimizer = SimpleNamespace(param_groups=[], step=lambda: slopes.append(values.grad.tolist()),
                                zero_grad=lambda: None)
    batch = train.MicroBatch([train.dummy_group()], torch.ones(1), torch.zeros(1), torch.zeros(1))
    batch.blind_logprobs = torch.tensor([0.25]).log()
    stats = train.update(policy, optimizer, [batch], lambda logprobs, *_: (0 * logprobs.sum(), {}), 0.0, 1.0, 9.0,
                         "cpu")
    assert slopes == [pytest.approx([-0.005, 0.03])]
    assert stats["loss"] == pytest.approx(-0.01 * 0.193147)  # the entropy is ln 1 = 0


def test_mixed_stage_weighs_all_five_parts_and_needs_both_buckets(variant, tmp_path):
    train = variant("mixed_stage").train
    stage = train.STAGES["2"]
    weights = {name: value for name, value in stage.items() if name.endswith("_weight")}
    assert weights == dict(clip_weight=0.2, keyword_weight=0.2, format_weight=0.1, length_weight=0.05,
                           accuracy_weight=0.45) and sum(weights.values()) == pytest.approx(1)
    for path in ("sft/model", "sample"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "sample" / "easy.jsonl").touch()
    with pytest.raises(train.InputError, match="medium.jsonl is missing: make "):
        train.read_config(["--stage", "2", "--out", str(tmp_path)])
    (tmp_path / "sample" / "medium.jsonl").touch()
    config = train.read_config(["--stage", "2", "--out", str(tmp_path)])
    assert [os.path.basename(path) for path in config.data.split(",")] == ["easy.jsonl", "medium.jsonl"]


def test_random_rewards_are_a_coin_of_seed_and_step(step):
    """The parts stay what they are; the reward that trains knows nothing of them."""
    taken = step("reward_random")
    for i, one in enumerate(taken.answered):
        coin = torch.Generator().manual_seed(seed_of(seed_of(0, 1, i), "coin"))  # of seed 0, step 1, question i
        assert one.earned["reward"] == torch.randint(2, (4,), generator=coin).tolist()
    assert any(0 < part < 1 for one in taken.answered for part in one.earned["keyword"])


def test_kl_free_is_a_default(variant):
    assert variant("kl_free").train.Config().kl_coef == 0
