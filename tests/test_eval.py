"""Evaluation: intervals by hand, generation that resumes, two scores, re-scoring, what perception costs, bad input."""
import gzip
import io
import json
import os
from dataclasses import replace

import datasets
import pytest
from PIL import Image

import eval as evaluation
import rewards
import train
from benchmarks import report
from benchmarks.registry import BENCHMARKS, load_items, load_rows
from benchmarks.report import figure, figures, interval, judge_all, markdown, perception, summarize, wilson
from plumbing.run_folder import weights_id
from ranks import ranks


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MATHVISTA = os.path.join(ROOT, "..", "shared", "data", "mathvista")
PUBLISHED = ("bard", "chatgpt_2shot_solution", "instruct_blip2_vicuna_13b", "llava_llama_2_13b", "minigpt4_llama2")
SMALL = ["--dtype", "float32", "--max_response", "8", "--max_prompt", "600"]

needs_mathvista = pytest.mark.skipif(not os.path.isdir(MATHVISTA), reason="MathVista's published problems are not here")


def read(path):
    with open(path) as file:
        return json.load(file) if str(path).endswith(".json") else [json.loads(line) for line in file]


# ---------------------------------------------------------------- intervals and figures of a file of questions


def reply(accuracy, **changes):
    return dict(accuracy=accuracy, format=1.0, finished=True, extracted="1", tokens=10) | changes


def test_the_interval_is_1_96_standard_errors_over_questions():
    """0 0 1 1: mean .5, sample std sqrt(1/3) = .577, error .289, half width .566."""
    assert interval([0.0, 0.0, 1.0, 1.0]) == pytest.approx((0.5, 0.5658), abs=1e-4)
    assert interval([0.3] * 5) == (0.3, 0.0)


@pytest.mark.parametrize("right, n, low, high", [(0, 10, 0, 0.278), (5, 10, 0.237, 0.763), (10, 10, 0.722, 1)])
def test_wilsons_interval_by_table(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize("right, n", [(1, 3), (7, 500), (760, 1000), (999, 1000)])
def test_wilsons_ends_are_the_shares_that_are_just_1_96_of_their_own_errors_away(right, n):
    for end in wilson(right, n):
        assert abs(right / n - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)


def test_a_figure_of_zeros_and_ones_has_wilsons_interval_and_others_have_not():
    assert (figure([1.0] * 10)["low"], figure([1.0] * 10)["high"]) == wilson(10, 10)
    shares = figure([0.5, 1.0, 0.75])
    assert shares["low"] == pytest.approx(0.75 - shares["half_width"])
    assert figure([0.5]) == dict(mean=0.5, half_width=None, low=None, high=None, questions=1)


def test_responses_of_one_question_are_one_draw():
    """Copying each response four times must not make the interval narrower."""
    rows = [dict(responses=[reply(float(i % 2))]) for i in range(10)]
    copied = [dict(responses=row["responses"] * 4) for row in rows]
    assert figures(rows, ["accuracy"])["accuracy"] == figures(copied, ["accuracy"])["accuracy"]


def test_pass_at_n_asks_for_one_right_response():
    rows = [dict(responses=[reply(0.0), reply(1.0)]), dict(responses=[reply(0.0), reply(0.0)])]
    found = figures(rows, ["accuracy"])
    assert found["pass@2"]["mean"] == 0.5 and found["accuracy"]["mean"] == 0.25


def test_truncation_and_missing_answers_are_reported():
    rows = [dict(responses=[reply(0.0, finished=False, extracted=None), reply(1.0)]), dict(responses=[reply(1.0)] * 2)]
    found = figures(rows, ["accuracy"])
    assert [found[name]["mean"] for name in ("truncated", "no answer", "tokens")] == [0.25, 0.25, 10]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(dict(qid=str(i), problem=f"{i}?", answer=str(i))) + "\n" for i in range(5)))
    return str(path)


def test_every_question_is_asked_and_stored(tiny_folder, questions, tmp_path, capsys):
    out = str(tmp_path / "out")
    argv = ["--model", tiny_folder, "--data", questions, "--out", out, "--group_size", "2", "--temperature", "1",
            *SMALL]
    assert evaluation.main(argv) == 0
    rows = read(f"{out}/responses.jsonl")
    assert [row["qid"] for row in rows] == list("01234") and all(len(row["responses"]) == 2 for row in rows)
    saved = read(f"{out}/report.json")
    assert saved["questions"] == 5 and saved["figures"]["pass@2"]["mean"] == 0 and saved["config"]["temperature"] == 1
    assert "pass@2" in capsys.readouterr().out
    assert evaluation.main(argv) == 0  # again: the same seeds, the same responses
    assert rows == read(f"{out}/responses.jsonl")


# ---------------------------------------------------------------- a benchmark from end to end


N = 7


@pytest.fixture(scope="session")
def tiny_mathvista(tmp_path_factory):
    """Seven questions with pictures in the columns of the hub: a parquet file."""
    def row(i):
        stored = io.BytesIO()
        Image.new("RGB", (56, 56 + 28 * (i % 2)), (30 * i, 99, 200)).save(stored, "PNG")
        choice = i % 2 == 0
        return dict(pid=str(100 - i), question=f"{i}?", image=f"{i}.jpg", choices=["1", "22"] if choice else None,
                    decoded_image=dict(bytes=stored.getvalue(), path=None), unit=None, precision=None,
                    answer="1" if choice else str(i), question_type="multi_choice" if choice else "free_form",
                    answer_type="text" if choice else "integer", query=f"Question: {i}?",
                    metadata=dict(category="c", context="x", grade="g", img_height=56, img_width=56, language="english",
                                  skills=["a", "b"], source="s", split="testmini", task="visual question answering"))
    text, number = datasets.Value("string"), datasets.Value("int64")
    columns = dict.fromkeys("pid question image unit answer question_type answer_type query".split(), text)
    about = dict.fromkeys(("category", "context", "grade", "language", "source", "split", "task"), text)
    features = datasets.Features(columns | dict(
        decoded_image=datasets.Image(), choices=datasets.List(text), precision=datasets.Value("float64"),
        metadata=about | dict(img_height=number, img_width=number, skills=datasets.List(text))))
    path = str(tmp_path_factory.mktemp("mathvista") / "testmini.parquet")
    datasets.Dataset.from_list([row(i) for i in range(N)], features=features).to_parquet(path)
    return path


@pytest.fixture
def argv(tiny_folder, tiny_mathvista, tmp_path):
    out = str(tmp_path / "out")
    return ["--model", tiny_folder, "--benchmark", "mathvista", "--data", tiny_mathvista, "--out", out, *SMALL]


def test_a_benchmark_is_asked_scored_reported_and_scored_again(argv, tiny_mathvista, tmp_path, capsys):
    """The untrained model says nothing that makes sense, and the official figure credits some of it."""
    folder = tmp_path / "out" / "mathvista"
    assert evaluation.main(argv) == 0
    rows, made = read(folder / "responses.jsonl"), read(folder / "report.json")
    assert [row["pid"] for row in rows] == [str(100 - i) for i in range(N)]
    assert made["questions"] == N and made["missing"] == []
    assert made["truncated"] == sum(not row["finished"] for row in rows)
    assert made["figures"]["official"]["mean"] > 0
    assert made["config"]["temperature"] == 0 and made["config"]["max_pixels"]
    assert len(made["prompt_id"]) == 8 and made["extractor"] and made["date"]
    assert sum(made["rules"].values()) == N and made["breakdown"]["strict"]["skills"]["a"]["total"] == N
    text = (folder / "report.md").read_text()
    assert "| official |" in text and "| strict   |" in text and "| official |" in capsys.readouterr().out

    scored = tmp_path / "again" / "mathvista-scored"
    assert evaluation.main(["--benchmark", "mathvista", "--data", tiny_mathvista, "--out", str(tmp_path / "again"),
                            "--score", str(folder / "responses.jsonl")]) == 0
    again = read(scored / "report.json")
    for name in "figures rules breakdown truncated no_answer chance_credit".split():
        assert again[name] == made[name]
    assert read(scored / "responses.jsonl") == rows


class Killed(Exception):
    pass


def interrupt_after(monkeypatch, chunks):
    """Dies when so many chunks of two questions have come; returns the list of their pids."""
    asked, judge = [], rewards.judge

    def dying(samples, finished, *rest):
        if len(asked) == chunks:
            raise Killed
        asked.append([samples[q].qid for q, _ in finished])
        return judge(samples, finished, *rest)

    monkeypatch.setattr(train, "CHUNK", 2)
    monkeypatch.setattr(rewards, "judge", dying)
    return asked


def whole_lines(path):
    """Those of a rank's file of responses that are rows."""
    with open(path) as file:
        return [line for line in file if line.endswith("}\n")]


def test_a_killed_run_goes_on_without_losing_or_doubling_an_answer(argv, tmp_path, monkeypatch):
    """Two chunks of two are on disk, and a torn line; the rest is asked by the next run, the same as in one go."""
    folder = tmp_path / "out" / "mathvista"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        first = interrupt_after(patch, 2)
        evaluation.main(argv)
    [shard] = folder.glob("asked-*/responses-0.jsonl")
    with open(shard, "a") as file:
        file.write('{"qid": "96", "respon')
    with monkeypatch.context() as patch:
        second = interrupt_after(patch, 99)
        assert evaluation.main(argv) == 0
    assert sorted(sum(first + second, []), key=int) == [str(100 - i) for i in reversed(range(N))]
    assert evaluation.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    assert read(folder / "responses.jsonl") == read(tmp_path / "whole" / "mathvista" / "responses.jsonl")
    assert len(whole_lines(shard)) == N


def test_two_ranks_finish_what_one_began_and_merge_to_exactly_the_questions(argv, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "mathvista"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt_after(patch, 1)
        evaluation.main(argv)
    ranks(2, evaluation.main, argv)
    shards = [whole_lines(path) for path in sorted(folder.glob("asked-*/*.jsonl"))]
    assert [len(shard) for shard in shards] == [2 + 3, 2]
    assert [row["pid"] for row in read(folder / "responses.jsonl")] == [str(100 - i) for i in range(N)]


def test_another_model_or_setting_asks_anew_and_the_same_command_asks_nothing(argv, tmp_path, monkeypatch):
    """Responses under two settings never mix; those of the first are still there."""
    asked = interrupt_after(monkeypatch, 99)
    other = [*argv, "--temperature", "1", "--seed", "3"]
    for command, questions in ((argv, N), (argv, 0), (other, N), (argv, 0)):
        assert evaluation.main(command) == 0 and sum(map(len, asked)) == questions
        asked.clear()
    assert len(list((tmp_path / "out" / "mathvista").glob("asked-*/responses-0.jsonl"))) == 2


def test_other_weights_under_the_same_name_are_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(4096))
    before = weights_id(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes(4000) + b"\1" + bytes(95))
    assert weights_id(str(tmp_path)) != before


def test_prompts_over_the_limit_are_missing_and_wrong(argv, tmp_path, capsys):
    """The limit is the length of the prompts whose pictures are small."""
    argv = [*argv, "--max_prompt", "1"]
    assert evaluation.main(argv) == 2 and "--max_prompt" in capsys.readouterr().err
    items = load_items("mathvista", load_rows("mathvista", argv[argv.index("--data") + 1], ""))
    responses = {pid: dict(response="1", finished=True) for pid in list(items)[:3]}
    made = summarize("mathvista", items, {"responses": judge_all("mathvista", responses, items)})
    assert made["missing"] == list(items)[3:] and made["rules"]["missing"] == N - 3 and made["questions"] == N
    assert made["figures"]["strict"]["questions"] == N


def test_a_split_without_gold_answers_has_predictions_and_no_report(argv, tiny_mathvista, tmp_path, capsys):
    rows = datasets.Dataset.from_parquet(tiny_mathvista).map(lambda row: {"answer": ""})
    rows.to_parquet(str(tmp_path / "test.parquet"))
    argv[argv.index("--data") + 1] = str(tmp_path / "test.parquet")
    assert evaluation.main(argv) == 0
    made = read(tmp_path / "out" / "mathvista" / "responses.jsonl")
    assert [row["pid"] for row in made] == [str(100 - i) for i in range(N)] and "prediction" in made[2]
    assert not os.path.exists(tmp_path / "out" / "mathvista" / "report.json")
    assert "no gold answers" in capsys.readouterr().out


# ---------------------------------------------------------------- what perception costs


def test_blind_and_caption_only_are_passes_over_the_same_questions(argv, tmp_path, monkeypatch):
    """Half of the responses get a description; what the model is asked then holds it, and no image."""
    asked, judge = [], rewards.judge

    def describing(samples, finished, *rest):
        asked.extend(samples[q] for q, _ in finished)
        return [replace(one, texts=[f"### Image Description: <image>{one.sample.qid}<|image_pad|>\n### Rationales: r"
                                    if int(one.sample.qid) % 2 else ""]) for one in judge(samples, finished, *rest)]

    monkeypatch.setattr(rewards, "judge", describing)
    assert evaluation.main([*argv, "--blind", "--caption_only"]) == 0
    first, second, third = (sorted(part, key=lambda sample: -int(sample.qid))  # they come as they are finished
                            for part in (asked[:N], asked[N:-N], asked[-N:]))
    assert all(len(sample.images) == 1 for sample in first) and not any(s.images for s in second + third)
    assert [s.question for s in second] == [f"Image Description: {100 - i}\nQuestion: {i}?" for i in (1, 3, 5)]
    assert [sample.question for sample in third] == [sample.question for sample in first]
    made = read(tmp_path / "out" / "mathvista" / "report.json")["figures"]
    assert list(made)[::2] == ["official", "strict from its own description", "strict without the image"]
    assert made["strict without the image"]["questions"] == N


def strict(text):
    return {str(i): dict(strict=letter == "1", rule="") for i, letter in enumerate(text)}


def test_the_error_is_split_by_hand():
    """8 questions: full 11100000, from the description 11011000, blind 10010000. Of 5 wrong answers 2 are right from
    the description, 1 is right blind."""
    made = perception(dict(responses=strict("11100000"), caption_only=strict("11011000"), blind=strict("10010000")))
    assert [(part["mean"], part["questions"]) for part in made.values()] == [(0.5, 8), (0.4, 5), (0.25, 8), (0.2, 5)]
    first = made["wrong, but right from its own description"]
    assert (first["low"], first["high"]) == wilson(2, 5)


def test_no_wrong_answer_has_nothing_to_split():
    made = perception(dict(responses=strict("11"), caption_only=strict("11")))
    assert list(made) == ["strict from its own description"]


# ---------------------------------------------------------------- stored responses of others


def score(tmp_path, *argv, benchmark="mathvista"):
    data = os.path.join(MATHVISTA, "testmini.json.gz")
    code = evaluation.main(["--benchmark", benchmark, "--data", data, "--out", str(tmp_path), *argv])
    return code, tmp_path / f"{benchmark}-scored"


@needs_mathvista
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_extractions_have_the_published_verdicts(name):
    """The stored verdicts are older than int(float(..)), which makes 1 of the extraction 1.5."""
    rows = load_rows("mathvista", os.path.join(MATHVISTA, "testmini.json.gz"), "")
    items = load_items("mathvista", rows)
    with gzip.open(os.path.join(MATHVISTA, f"output_{name}.json.gz")) as opened:
        stored = json.load(opened)
    flips = [pid for pid, item in items.items()
             if BENCHMARKS["mathvista"].verdict("", str(stored[pid].get("extraction") or ""), "stored", item).official
             is not stored[pid]["true_false"]]
    assert flips == (["917"] if name == "instruct_blip2_vicuna_13b" else [])


@needs_mathvista
def test_an_empty_model_scores_16_8_officially_and_0_strictly(tmp_path, capsys):
    path = tmp_path / "empty.json"
    with gzip.open(os.path.join(MATHVISTA, "testmini.json.gz")) as opened:
        path.write_text(json.dumps({pid: {"response": ""} for pid in json.load(opened)}))
    code, folder = score(tmp_path, "--score", str(path))
    made = read(folder / "report.json")
    assert [made["figures"][kind]["mean"] for kind in ("official", "strict")] == [0.168, 0] and code == 0
    assert made["chance_credit"] == 168 and "| official | 16.80 | " in (folder / "report.md").read_text()
    for text in (capsys.readouterr().out, (folder / "report.md").read_text()):
        assert "warning: 168 of the right ones" in text


@needs_mathvista
def test_responses_that_are_missing_or_strange_are_said(tmp_path, capsys):
    path = tmp_path / "some.jsonl"
    path.write_text('{"pid": "5", "response": "(A)"}\n{"pid": 7000, "response": "(A)"}\n')
    code, folder = score(tmp_path, "--score", str(path))
    out = capsys.readouterr().out
    assert code == 0 and "999 questions have no response" in out
    assert read(folder / "report.json")["figures"]["strict"]["mean"] == 0.001  # 97, the first option
    path.write_text('{"pid": "x", "response": "(A)"}\n')
    assert score(tmp_path, "--score", str(path))[0] == 2


def test_nothing_is_not_right_where_the_gold_answer_is_withheld():
    rows = [dict(id=str(i), question="q", options=[], answer=answer, subject="s", level=1)
            for i, answer in enumerate(("7", ""))]
    items = load_items("mathvision", [(f"row {i}", row) for i, row in enumerate(rows)])
    verdicts = judge_all("mathvision", {pid: dict(response="") for pid in items}, items)
    assert not any(verdict["official"] or verdict["strict"] for verdict in verdicts.values())


def test_a_verdict_has_the_question_and_the_gold_answer(tiny_mathvista):
    """So view.py can show a benchmark's responses from its folder alone."""
    items = load_items("mathvista", load_rows("mathvista", tiny_mathvista, ""))
    for pid, verdict in judge_all("mathvista", {}, items).items():
        assert (verdict["question"], verdict["gold"]) == (items[pid].question, items[pid].answer)


def test_a_score_without_warnings_warns_of_nothing():
    items = load_items("ocrbench", [("row 1", dict(question="q", answer=["a"], question_type="t", dataset="d"))])
    responses = {"1": dict(response="a", finished=True)}
    made = summarize("ocrbench", items, dict(responses=judge_all("ocrbench", responses, items)))
    assert report.warnings(made) == [] and "warning" not in markdown(made | dict(model="m", prompt_id="p"))
    assert made["means"]["strict"] == {"score": 1.0}


ONE = {"pid": "100", "response": "(A)"}
# A file of responses; what is said, or how many have no response where it is read; what happened before
# there was a table of its columns: "scored" with exit code 0.
STORED = [
    ([{"pid": "100", "prediction": "(A)"}], "no row has response, the last has pid, prediction: r", "scored 0 %"),
    ({"100": {"error": "timeout"}}, "no row has response, the last has pid, error: rename the", "scored 0 %"),
    ([ONE, {"pid": "99", "error": "timeout"}], N - 1, "scored as if it had a response"),
    ([ONE, {"pid": "99", "response": None}], N - 1, "scored as if it had a response"),
    ([ONE, {"pid": "99", "response": float("nan")}], N - 1, "one line"),
    ([ONE | {"tokens": None, "finished": None}], N - 1, "scored: null counted as finished"),
    ([ONE | {"tokens": "many"}], "r.json row 1: tokens is 'many'; expected number or null", "one line"),
    ([ONE | {"tokens": True}], "row 1: tokens is bool", "scored: as 1 token"),
    ([ONE | {"finished": "no"}], "row 1: finished is 'no'; expected true or false or null", "scored: as finished"),
    ([{"pid": "100", "response": "(A) \ud83d"}], N - 1, "UnicodeEncodeError"),
    ([ONE, {"pid": "\ud83d", "response": "(A)"}], N - 1, "UnicodeEncodeError"),
    ([ONE, {"pid": None, "response": "(A)"}], "row 2: pid is null; expected string or number", "scored"),
    ([{"pid": [1], "response": "(A)"}], "row 1: pid is list", "one line"),
    ([{"index": 100, "response": "(A)"}], "row 1: no column pid", "one line"),
    ([ONE, ONE], N - 1, "one line"),
    ({"100": {"response": 7}}, "row 100: response is 7; expected string or null", "one line"),
    (ONE, "row pid: it is no object with columns", "one line"),
    ([1], "row 1: it is no object with columns", "one line"),
    ([], "no row has response, the last has nothing", "one line"),
    (b"{", "line 1: not valid JSON", "one line"),
    (b"\xef\xbb\xbf" + json.dumps([ONE]).encode(), N - 1, "read"),
    (json.dumps([ONE]).encode("utf-16"), "cannot be read", "one line"),
]


@pytest.mark.parametrize("content, said, before", STORED)
def test_a_file_of_responses_is_one_line_or_read(tmp_path, capsys, tiny_mathvista, content, said, before):
    path, out = tmp_path / "r.json", tmp_path / "out"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    argv = ["--benchmark", "mathvista", "--data", tiny_mathvista, "--out", str(out), "--score", str(path)]
    code, error = evaluation.main(argv), capsys.readouterr().err
    if isinstance(said, int):
        assert code == 0 and len(read(out / "mathvista-scored" / "report.json")["missing"]) == said
    else:
        assert code == 2 and said in error and error.count("\n") == 1 and len(error) < 300 and not os.path.exists(out)


def test_a_question_that_is_only_its_picture_is_asked(tiny_folder, tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "1.jpg")
    row = dict(id="1", question="<image1>", options=list("ABCDE"), answer="D", level=1, subject="logic", image="1.jpg")
    (tmp_path / "test.json").write_text(json.dumps([row]))
    argv = ["--model", tiny_folder, "--benchmark", "mathvision", "--out", str(tmp_path / "out"), *SMALL]
    assert evaluation.main([*argv, "--data", str(tmp_path / "test.json")]) == 0
    assert read(tmp_path / "out" / "mathvision" / "report.json")["missing"] == []


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("change, message", [
    (["--model", ""], "--model is missing"),
    (["--data", ""], "--data is missing"),
    (["--data", "absent.jsonl"], "absent.jsonl"),
    (["--lr", "1"], "unknown flag --lr"),
    (["--benchmrk", "mathvista"], "did you mean --benchmark"),
    (["--group_size", "0"], "--group_size 0"),
    (["--temperature", "-1"], "--temperature -1.0"),
    (["--benchmark", "mathvsita"], "--benchmark mathvsita: give one or several of"),
    (["--benchmark", "mathvista", "--group_size", "2", "--temperature", "1"], "--group_size 2"),
    (["--benchmark", "mathvista", "--clip", "x"], "--clip"),
    (["--benchmark", "mathvista", "--score", "r.json"], "leave --model, "),
    (["--benchmark", "mathvista", "mmstar", "--score", "r.json", "--model", ""], "one name"),
    (["--benchmark", "mathvista", "--score", "absent.json", "--model", ""], "absent.json"),
    (["--blind"], "--caption_only go with --benchmark"),
    (["--score", "r.json"], "--score, --blind and --caption_only go with"),
])
def test_bad_input_is_one_line_and_exit_code_2(tiny_folder, questions, tmp_path, capsys, change, message):
    out = str(tmp_path / "out")
    assert evaluation.main(["--model", tiny_folder, "--data", questions, "--out", out, *SMALL, *change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not os.path.exists(out)


def test_every_benchmark_says_what_its_two_figures_count():
    assert all(b.official and b.strict and b.official != b.strict for b in BENCHMARKS.values())
