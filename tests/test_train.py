"""The training program as a whole: stages, resuming, any number of processes, bad input."""
import json
import os
import shutil
import string
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from conftest import picture
from data import batches, encode_prompt, parse, seed_of
from engine.policy import pack
from plumbing.log import records
from plumbing.processes import Timer
from ranks import ranks


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--dtype", "float32", "--max_prompt", "200", "--max_response", "16", "--min_pixels", "784",
         "--max_pixels", "12544", "--slots", "24", "--no_gradient_checkpointing", "--save_every", "0"]
# an untrained model writes noise: any letter or digit that stands alone in it is a key word found, so rewards differ
RL = ["--group_size", "4", "--questions_per_rollout", "9", "--questions_per_update", "3", "--lr", "1e-3",
      "--clip_weight", "0", "--keyword_weight", "1", "--keyword_scope", "response", "--length_limit", "10"]
HELD_OUT = 5  # of the 12 questions, which training does not take away


def stage_1(tiny_folder, questions, out, *flags):
    """A command line of stage 1: one step of three updates, unless flags ask for more, and a held-out figure."""
    return ["--stage", "1", "--out", str(out), "--model", tiny_folder, "--data", questions, *SMALL, *RL,
            "--eval_data", questions, "--eval_every", "1", "--eval_questions", str(HELD_OUT), *flags]


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """12 RL rows of three image shapes, two of them without an image."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for i in range(12):
        row = dict(qid=f"q{i}", problem=f"How many {i}?", answer=str(i),
                   key_words=list(string.ascii_lowercase + string.digits))
        if i % 6 != 5:
            picture(56 + 28 * (i % 3), 56, i).save(folder / f"{i}.png")
            row["images"] = [f"{i}.png"]
        rows.append(row)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "questions.jsonl")


@pytest.fixture(scope="session")
def warmup(questions, tmp_path_factory):
    """8 sharegpt rows."""
    folder, rows = os.path.dirname(questions), []
    for i in range(8):
        text = f"### Image Description: {i}\n### Rationales: r\n### Step 1: s\n### The final answer is: {i}"
        image = [] if i % 6 == 5 else [os.path.join(folder, f"{i}.png")]
        rows.append(dict(messages=[dict(role="user", content=f"How many {i}?"), dict(role="assistant", content=text)],
                         images=image))
    path = tmp_path_factory.mktemp("warmup") / "warmup.json"
    path.write_text(json.dumps(rows))
    return str(path)


def weights(folder):
    return load_file(os.path.join(folder, "model", "model.safetensors"))


def metrics(folder):
    return [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]


def contents(folder):
    """Every file below a folder with its bytes."""
    paths = (os.path.join(base, name) for base, _, names in os.walk(folder) for name in names)
    return {path: open(path, "rb").read() for path in paths}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def compare_metrics(a, b):
    """Adam's step forgets the scale of the gradient; its norm and the loss do not."""
    for ours, reference in zip(metrics(a), metrics(b), strict=True):
        for name in reference:
            if not name.startswith(("time/", "perf/", "policy/sampler_gap")):
                assert ours[name] == pytest.approx(reference[name], rel=2e-3, abs=1e-5), name


@pytest.fixture(scope="session")
def one_process(tiny_folder, questions, tmp_path_factory):
    """Stage 1 on one process: what every other way to run it must equal."""
    out = str(tmp_path_factory.mktemp("one"))
    assert train.main(stage_1(tiny_folder, questions, out)) == 0
    return os.path.join(out, "stage1")


def warm_up(tiny_folder, warmup, questions, out):
    return ["--stage", "sft", "--model", tiny_folder, "--data", warmup, "--questions_per_rollout", "5",
            "--questions_per_update", "5", "--lr", "1e-2", *SMALL, "--eval_data", questions, "--eval_every", "2",
            "--slots", "0", "--out", str(out)]


@pytest.fixture(scope="module", autouse=True)
def beside(request, tiny_folder, questions, warmup, tmp_path_factory):
    """Runs on several processes, which go on beside the tests of one; those that look at them come last.

    beside(5), beside(2): the folder of stage 1 on so many processes; beside("sft"): of the warm-up on two.
    """
    if not any("beside" in item.fixturenames for item in request.session.items if "processes" in item.name):
        yield None
        return
    out = tmp_path_factory.mktemp("beside")
    runs = {n: (n, stage_1(tiny_folder, questions, out / str(n)), out / str(n) / "stage1") for n in (5, 2)}
    runs["sft"] = (2, warm_up(tiny_folder, warmup, questions, out), out / "sft")
    with ThreadPoolExecutor(1) as thread:
        begun = {name: (thread.submit(ranks, n, train.main, argv), folder) for name, (n, argv, folder) in runs.items()}

        def folder_of(name):
            run, folder = begun[name]
            run.result()
            return folder

        yield folder_of


def test_rl_moves_the_weights_and_logs_what_happened(one_process, tiny_folder):
    before = load_file(os.path.join(tiny_folder, "model.safetensors"))
    assert largest_difference(weights(one_process), before) > 1e-3
    logged = metrics(one_process)
    assert [line["step"] for line in logged] == [0]
    assert logged[0]["reward/keyword_std"] > 0 and logged[0]["opt/skipped"] == 0 and logged[0]["policy/kl"] >= 0
    assert logged[0]["policy/ratio_max"] > 1.01  # the second update of a step is off policy: the clip has work
    rows = [json.loads(line) for line in open(os.path.join(one_process, "rollouts", "step_000000.jsonl"))]
    assert len(rows) == 9 and all(len(row["responses"]) == 4 for row in rows)
    rewards = torch.tensor([[r["reward"] for r in row["responses"]] for row in rows])
    advantages = torch.tensor([[r["advantage"] for r in row["responses"]] for row in rows])
    torch.testing.assert_close(advantages, train.group_advantages(rewards), atol=1e-5, rtol=0)
    assert logged[0]["reward/total"] == pytest.approx(float(rewards.mean()))


@pytest.mark.parametrize("budget", ["216", "400"])
def test_the_result_does_not_depend_on_the_micro_batch_size(one_process, tiny_folder, questions, tmp_path, budget):
    assert train.main(stage_1(tiny_folder, questions, tmp_path, "--token_budget", budget)) == 0
    assert largest_difference(weights(tmp_path / "stage1"), weights(one_process)) < 2e-4
    compare_metrics(tmp_path / "stage1", one_process)


def evaluated(config, folder, out):
    """What eval.py says of each question when it asks the model that a run has exported, greedily: qid -> reply."""
    same = [f"--{name}={config[name]}" for name in ("dtype", "max_prompt", "max_response", "min_pixels", "max_pixels",
                                                    "keyword_scope", "length_limit")]
    assert evaluation.main(["--model", f"{folder}/model", "--data", config["eval_data"], "--out", str(out), *same]) == 0
    with open(out / "responses.jsonl") as file:
        return {row["qid"]: row["responses"][0] for row in map(json.loads, file)}


def test_the_held_out_figures_are_those_of_eval_py(one_process, tmp_path):
    """The parts that this stage rewards, and accuracy; the questions are those with the smallest hash."""
    config, [logged] = json.load(open(f"{one_process}/config.json")), metrics(one_process)
    replies = evaluated(config, one_process, tmp_path)
    chosen = sorted(replies, key=lambda qid: seed_of("held out", qid))[:HELD_OUT]
    assert len(replies) == 12 and {name for name in logged if name.startswith("eval/")} == {
        "eval/accuracy", "eval/format", "eval/keyword", "eval/length"}
    for part in ("accuracy", "format", "keyword", "length"):
        mean = sum(replies[qid][part] for qid in chosen) / HELD_OUT
        assert logged[f"eval/{part}"] == pytest.approx(mean, abs=1e-6), part
    assert 0 < logged["eval/keyword"] < 1


def test_held_out_questions_change_nothing_else(one_process, tiny_folder, questions, tmp_path):
    without = ["--eval_data", "", "--eval_every", "0"]
    assert train.main(stage_1(tiny_folder, questions, tmp_path, *without)) == 0
    assert largest_difference(weights(tmp_path / "stage1"), weights(one_process)) == 0
    compare_metrics(one_process, tmp_path / "stage1")
    assert not any(name.startswith("eval/") for name in metrics(tmp_path / "stage1")[0])


def test_resuming_continues_bit_for_bit(tiny_folder, questions, tmp_path):
    whole, torn = (stage_1(tiny_folder, questions, tmp_path / name, "--questions_per_rollout", "6", "--epochs", "2",
                           "--max_steps", "3", "--save_every", "1", "--eval_every", "2") for name in ("whole", "torn"))
    assert train.main(whole) == 0

    class Killed(Exception):
        pass

    def killed_in_step_1(run, optimizer, prompts, step, steps):
        if step == 1:
            raise Killed
        return rl_step(run, optimizer, prompts, step, steps)

    rl_step = train.rl_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "rl_step", killed_in_step_1)
        train.main(torn)
    torn_folder, whole_folder = tmp_path / "torn" / "stage1", tmp_path / "whole" / "stage1"
    assert not os.path.exists(torn_folder / "model")
    assert train.main(torn) == 0
    assert largest_difference(weights(torn_folder), weights(whole_folder)) == 0
    resumed, reference = ([{name: value for name, value in line.items() if not name.startswith(("time/", "perf/"))}
                           for line in metrics(folder)] for folder in (torn_folder, whole_folder))
    assert resumed == reference and [line["step"] for line in resumed] == [0, 1, 2]
    assert ["eval/keyword" in line for line in resumed] == [False, True, True]


def test_the_warm_up_resumes_with_its_vision_tower_frozen(tiny_folder, warmup, tmp_path):
    argv = ["--stage", "sft", "--model", tiny_folder, "--data", warmup, "--questions_per_rollout", "4",
            "--questions_per_update", "4", "--lr", "1e-2", *SMALL, "--save_every", "1"]
    assert train.main([*argv, "--out", str(tmp_path)]) == 0
    whole = weights(tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft" / "model")
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / "step-000004")
    assert train.main([*argv, "--out", str(tmp_path)]) == 0
    assert largest_difference(weights(tmp_path / "sft"), whole) == 0


@pytest.mark.parametrize("stage", ["sft", "1"])
def test_the_next_steps_prompts_are_encoded_while_a_step_trains(stage, tiny_folder, questions, warmup, tmp_path,
                                                                monkeypatch):
    """The update of step k waits for the last prompt of step k + 1; no prompt of step k + 2 is begun by then."""
    argv = warm_up(tiny_folder, warmup, questions, tmp_path) if stage == "sft" else [
        *stage_1(tiny_folder, questions, tmp_path), "--questions_per_rollout", "3"]
    n, changed, update, encoded, updates = (5 if stage == "sft" else 3), threading.Condition(), train.update, [], []

    def encode_and_tell(sample, processor):
        prompt = encode_prompt(sample, processor)
        with changed:
            encoded.append(sample.qid)
            changed.notify()
        return prompt

    def wait_and_update(*args):
        updates.append(min(len(updates) + 2, 3) * n)
        with changed:
            assert changed.wait_for(lambda: len(encoded) >= updates[-1], timeout=30)
            assert len(encoded) == updates[-1]
        return update(*args)

    monkeypatch.setattr(train.data, "encode_prompt", encode_and_tell)
    monkeypatch.setattr(train, "update", wait_and_update)
    assert train.main([*argv, "--eval_data", "", "--eval_every", "0", "--max_steps", "3"]) == 0
    assert len(updates) == 3


def test_a_bad_image_ends_the_run_at_its_own_step(tiny_folder, warmup, questions, tmp_path, capsys):
    """The step before is trained and logged, although the prompt was begun during it."""
    rows = json.load(open(warmup))
    torn = tmp_path / "torn.png"
    torn.write_bytes(open(os.path.join(os.path.dirname(questions), "0.png"), "rb").read()[:3000])
    rows[max(batches(8, 4, 1, 0)[1])]["images"] = [str(torn)]  # in the second of two steps
    (tmp_path / "torn.json").write_text(json.dumps(rows))
    argv = [*warm_up(tiny_folder, warmup, questions, tmp_path), "--data", str(tmp_path / "torn.json"), "--epochs", "1"]
    four = ["--questions_per_rollout", "4", "--questions_per_update", "4"]
    assert train.main([*argv, *four, "--eval_data", "", "--eval_every", "0"]) == 2
    assert "torn.png: cannot be read" in capsys.readouterr().err
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [0]


def test_a_torn_checkpoint_is_named(tiny_folder, warmup, tmp_path, capsys):
    argv = ["--stage", "sft", "--model", tiny_folder, "--data", warmup, "--questions_per_rollout", "4",
            "--questions_per_update", "4", *SMALL, "--save_every", "1", "--out", str(tmp_path)]
    assert train.main(argv) == 0
    shutil.rmtree(tmp_path / "sft" / "model")
    os.remove(tmp_path / "sft" / "checkpoints" / "step-000004" / "__0_0.distcp")
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert "step-000004 cannot be read: delete it" in error and error.count("\n") == 1


def test_long_solutions_are_dropped_and_counted(tiny_folder, warmup, tmp_path, capsys):
    argv = ["--stage", "sft", "--model", tiny_folder, "--data", warmup, "--out", str(tmp_path), *SMALL]
    assert train.main([*argv, "--max_response", "2"]) == 2
    assert "no warm-up row is left" in capsys.readouterr().err
    rows = json.load(open(warmup))
    rows[0]["messages"][1]["content"] *= 9
    (tmp_path / "w.json").write_text(json.dumps(rows))
    small = ["--questions_per_rollout", "7", "--questions_per_update", "7", "--max_steps", "1"]
    assert train.main([*argv, "--data", str(tmp_path / "w.json"), "--max_response", "60", *small]) == 0
    assert "7 kept, 1 over 60 tokens" in capsys.readouterr().out


def test_a_complete_stage_is_not_run_again_unless_told(one_process, tiny_folder, questions, capsys):
    argv = stage_1(tiny_folder, questions, os.path.dirname(one_process))
    before = contents(one_process)
    assert train.main(argv) == 0 and "complete; --restart" in capsys.readouterr().out
    assert train.main([*argv, "--lr", "5e-3"]) == 2
    assert "--lr was 0.001 and is 0.005" in capsys.readouterr().err
    assert contents(one_process) == before


def test_stages_chain_by_their_defaults(tiny_folder, questions, warmup, tmp_path):
    """Each stage finds its model and data where the stage before it wrote them; only the outermost inputs are given."""
    out = ["--out", str(tmp_path)]
    small = [*SMALL, "--group_size", "2", "--questions_per_rollout", "2", "--questions_per_update", "1"]
    one_each = [*small, "--max_steps", "1"]
    assert train.main(["--stage", "sft", *out, "--model", tiny_folder, "--data", warmup, *one_each,
                       "--questions_per_update", "2"]) == 0
    assert train.main(["--stage", "sample", *out, "--data", questions, *small]) == 0
    buckets = {name: [json.loads(line) for line in open(tmp_path / "sample" / f"{name}.jsonl")]
               for name in ("easy", "medium", "hard")}
    assert sorted(row["qid"] for rows in buckets.values() for row in rows) == sorted(f"q{i}" for i in range(12))
    # noise answers nothing: fill the buckets from the hard one
    os.replace(tmp_path / "sample" / "hard.jsonl", tmp_path / "sample" / "easy.jsonl")
    (tmp_path / "sample" / "medium.jsonl").write_bytes((tmp_path / "sample" / "easy.jsonl").read_bytes())
    assert train.main(["--stage", "1", *out, *one_each, "--clip_weight", "0"]) == 0
    assert train.main(["--stage", "2", *out, *one_each]) == 0
    configs = {name: json.load(open(tmp_path / name / "config.json")) for name in ("stage1", "stage2")}
    assert configs["stage1"]["model"] == str(tmp_path / "sft/model")
    assert configs["stage2"]["model"] == str(tmp_path / "stage1/model")
    assert configs["stage2"]["data"] == str(tmp_path / "sample/medium.jsonl")


def test_a_second_sampling_replaces_the_first(tiny_folder, questions, tmp_path):
    argv = ["--stage", "sample", "--out", str(tmp_path), "--model", tiny_folder, "--data", questions, *SMALL,
            "--group_size", "2"]
    for seed in ("0", "1"):
        assert train.main([*argv, "--seed", seed]) == 0
        rows = [json.loads(line) for name in ("easy", "medium", "hard")
                for line in open(tmp_path / "sample" / f"{name}.jsonl")]
        assert sorted(row["qid"] for row in rows) == sorted(f"q{i}" for i in range(12))


def test_the_first_updates_own_logprobs_are_the_old_ones(tiny_folder, questions, tmp_path, monkeypatch):
    """As if a pass before had scored them: the same weights, and each ratio is exactly 1. One update a step has no
    other old log-probs, so no pass is made."""
    one_update = ["--questions_per_update", "9", "--eval_data", "", "--eval_every", "0"]
    assert train.main(stage_1(tiny_folder, questions, tmp_path / "own", *one_update, "--kl_coef", "0")) == 0
    assert metrics(tmp_path / "own" / "stage1")[0]["policy/ratio_max"] == 1
    update = train.update

    def scored_before(policy, optimizer, batches, loss_fn, lr, temperature, *rest):
        with torch.no_grad():
            for batch in batches:
                assert batch.old_logprobs is None
                batch.old_logprobs, _ = policy(pack(batch.groups), temperature)
        return update(policy, optimizer, batches, loss_fn, lr, temperature, *rest)

    monkeypatch.setattr(train, "update", scored_before)
    assert train.main(stage_1(tiny_folder, questions, tmp_path / "scored", *one_update, "--kl_coef", "0")) == 0
    assert largest_difference(weights(tmp_path / "own" / "stage1"), weights(tmp_path / "scored" / "stage1")) < 1e-6


def test_rows_say_what_the_parser_read(replica, processor, samples, prompts, monkeypatch):
    """Chunks of two questions, as they end; texts, tokens and what the parser read of a group stay together."""
    monkeypatch.setattr(train, "CHUNK", 2)
    config = train.Config(group_size=2, max_response=5, slots=4, temperature=1.0)
    parts = list(train.collect(replica, processor, None, samples, prompts, list(range(5)), config, Timer("a test")))
    assert [len(part) for part in parts] == [2, 2, 1]
    answered = sorted(sum(parts, []))
    rows = records(answered)
    assert [row["qid"] for row in rows] == list("abcde")
    for one, row in zip(answered, rows):
        assert len(row["responses"]) == len(one.responses) == 2
        for shown, response in zip(row["responses"], one.responses):
            assert shown["text"] == processor.tokenizer.decode(response.ids, skip_special_tokens=True)
            assert shown["extracted"] == parse(shown["text"]).answer
            assert shown["tokens"] == len(response.ids)


def test_bad_input_is_one_line_exit_code_2_and_changes_nothing(one_process, tiny_folder, questions, tmp_path, capsys):
    before = contents(one_process)
    good = stage_1(tiny_folder, questions, os.path.dirname(one_process))
    rows = [json.loads(line) for line in open(questions)]
    bad_rows = {
        "twice.jsonl": ([rows[5], rows[5]], "qid 'q5'"),
        "nowords.jsonl": ([{k: v for k, v in rows[5].items() if k != "key_words"}], "no key_words"),
        "noimage.jsonl": ([rows[5] | {"images": ["absent.png"]}], "absent.png"),
        "broken.jsonl": ([rows[5] | {"images": [os.path.join(ROOT, "train.py")]}], "cannot be read"),
        "marker.jsonl": ([rows[5] | {"problem": "<image> what?"}], "1 <image> markers for 0 images"),
        "empty.jsonl": ([], "no rows"),
        "blank.jsonl": ([rows[5] | {"problem": "<image> "}], "the question is empty"),
        "surrogate.jsonl": ([rows[5] | {"problem": "\ud800?"}], "half a surrogate pair"),
    }
    for name in ("bare", "torn", "other"):
        shutil.copytree(tiny_folder, tmp_path / name)
    os.remove(tmp_path / "bare" / "tokenizer.json")
    with open(tmp_path / "torn" / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    config = json.load(open(tmp_path / "other" / "config.json"))
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"image_token_id": 5}))
    cases = [
        ([*good, "--model", str(tmp_path / "bare"), "--out", str(tmp_path / "out")], "tokenizer"),
        ([*good, "--model", str(tmp_path / "torn"), "--out", str(tmp_path / "out")], "its weights cannot be read"),
        ([*good, "--model", str(tmp_path / "other"), "--out", str(tmp_path / "out")], "is not that of its config.json"),
        ([*good, "--model", str(tmp_path / "no")], "neither a folder nor"),
        ([*good, "--data", str(tmp_path / "no.jsonl")], "no.jsonl"),
        ([*good, "--group_size", "1"], "--group_size 1"),
        ([*good, "--questions_per_update", "4"], "not a multiple of --questions_per_update 4"),
        ([*good, "--questions_per_rollout", "600", "--questions_per_update", "300"], "do not fill one batch of 600"),
        ([*good, "--max_prompt", "5"], "within 5 tokens"),
        ([*good, "--stage", "3"], "--stage 3"),
        ([*good, "--group_sise", "4"], "did you mean --group_size?"),
        ([*good, "--lr", "fast"], "fast"),
        ([*good, "--clip_weight", "0.4"], "2 of 12 questions have no images"),
        ([*good, "--clip_weight", "0.4", "--allow_text", "True", "--clip", str(tmp_path / "noclip")], "noclip"),
        ([*good, "--seed", "7"], "--seed was 0 and is 7"),
        ([*good, "--eval_every", "0"], "--eval_data and --eval_every go together"),
        ([*good, "--eval_data", ""], "--eval_data and --eval_every go together"),
        ([*good, "--eval_questions", "0"], "--eval_questions 0 is not in"),
        ([*good, "--eval_data", str(tmp_path / "no.jsonl")], "no.jsonl"),
        ([*good, "--eval_data", str(tmp_path / "noanswer.jsonl"), "--out", str(tmp_path / "out")], "no answer"),
        ([*good, "--eval_data", str(tmp_path / "noimage.jsonl"), "--out", str(tmp_path / "out")], "absent.png"),
        ([*good, "--lr", "nan"], "--lr nan is not in"),
        ([*good, "--max_steps", "-1"], "--max_steps -1 is not in"),
        ([*good, "--keyword_weight", "0", "--length_weight", "0", "--format_weight", "0"], "all reward weights are 0"),
        ([*good, "--out", questions], "no folder can be made"),
        ([*good, "--out", os.path.dirname(questions), "--restart", "--model", os.path.join(one_process, "model")],
         "stage1 has no readable config.json"),
        ([*good, "--restart", "--model", os.path.join(one_process, "model")], "which this run replaces"),
    ]
    precious = os.path.join(os.path.dirname(questions), "stage1", "precious")  # somebody's, not ours
    os.makedirs(precious, exist_ok=True)
    open(os.path.join(precious, "notes.txt"), "w").close()
    for name, (content, message) in bad_rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        cases.append(([*good, "--data", str(tmp_path / name)], message))
    (tmp_path / "noanswer.jsonl").write_text(json.dumps({k: v for k, v in rows[5].items() if k != "answer"}))
    capsys.readouterr()
    for argv, message in cases:
        assert train.main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert contents(one_process) == before and not os.path.exists(tmp_path / "out" / "stage1")


def test_a_restart_that_fails_leaves_the_old_run_beside_it(tiny_folder, questions, tmp_path):
    """A picture whose header is whole and whose body is not is found only when it is decoded."""
    argv = stage_1(tiny_folder, questions, tmp_path)
    assert train.main(argv) == 0
    finished = set(contents(tmp_path / "stage1"))
    rows = [json.loads(line) for line in open(questions)]
    torn = tmp_path / "torn.png"
    torn.write_bytes(open(os.path.join(os.path.dirname(questions), "0.png"), "rb").read()[:3000])
    rows = [row | ({"images": [os.path.join(os.path.dirname(questions), row["images"][0])]} if "images" in row else {})
            for row in rows]
    rows[9]["images"] = [str(torn)]
    (tmp_path / "torn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.main([*argv, "--data", str(tmp_path / "torn.jsonl"), "--restart"]) == 2
    aside = contents(tmp_path / "stage1.before-restart")
    assert {path.replace("stage1.before-restart", "stage1") for path in aside} == finished
    assert train.main([*argv, "--restart"]) == 0  # of the two runs that are replaced, the complete one stays
    assert set(contents(tmp_path / "stage1")) == finished
    assert contents(tmp_path / "stage1.before-restart").keys() == aside.keys()


def test_a_restart_replaces_the_old_run_although_torchrun_has_begun_it_twice(tiny_folder, questions, tmp_path,
                                                                              monkeypatch):
    """The first attempt died before it had set anything aside: what lies there was begun by another command."""
    argv = stage_1(tiny_folder, questions, tmp_path)
    assert train.main([*argv, "--save_every", "1"]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main([*argv, "--restart", "--lr", "5e-3", "--epochs", "2"]) == 0
    assert [line["opt/lr"] for line in metrics(tmp_path / "stage1")] == [5e-3, 5e-3]


def test_a_missing_default_input_names_the_command_that_makes_it(tmp_path, capsys):
    assert train.main(["--stage", "2", "--out", str(tmp_path)]) == 2
    assert f"train.py --stage 1 --out {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("n", [2, 5])
def test_n_processes_equal_one(one_process, beside, n):
    """Five processes share updates of three questions: two ranks or more have none, and some hold no image."""
    ours = beside(n)
    assert largest_difference(weights(ours), weights(one_process)) < 2e-4
    compare_metrics(ours, one_process)


def test_two_processes_equal_one_in_the_warm_up(tiny_folder, warmup, questions, beside, tmp_path):
    """Three steps; the vision tower is frozen and stays as it was. Held-out questions come after every second step and
    after the last."""
    assert train.main(warm_up(tiny_folder, warmup, questions, tmp_path)) == 0
    ours, theirs = tmp_path / "sft", beside("sft")
    one, two = weights(ours), weights(theirs)
    assert largest_difference(one, two) < 2e-4
    compare_metrics(ours, theirs)
    before = load_file(os.path.join(tiny_folder, "model.safetensors"))
    for name, tensor in one.items():
        assert torch.equal(tensor, before[name]) == name.startswith("visual."), name
    logged = metrics(ours)
    assert len(logged) == 3 and logged[-1]["opt/loss"] < logged[0]["opt/loss"]
    figures = [{name for name in line if name.startswith("eval/")} for line in logged]
    assert figures == [set(), {"eval/accuracy", "eval/format"}, {"eval/accuracy", "eval/format"}]  # it has no rewards
