"""What a stage refuses, drops and says of its data; `data.py check`; resuming with other data or another model."""
import json
import os
import runpy
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file

import data
import train
from conftest import picture
from data import InputError, Sample
from grading.equal import correct
from plumbing import check, filters
from plumbing.run_folder import weights_id
from ranks import ROOT, ranks
from test_train import contents, metrics, questions, stage_1, warm_up, warmup, weights

__all__ = ["questions", "warmup"]  # fixtures: rows of stage 1 and of the warm-up


def write(path, rows) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def torn(path) -> str:
    """A JPEG with a whole header and half a body."""
    picture(84, 84, 1).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


# ---- gold answers
@pytest.mark.parametrize("answer, choices, matched", [
    ("B", ("red", "blue"), True), ("blue", ("red", "blue"), True), ("(B)", ("red", "blue"), True),
    ("1", ("red", "blue"), False), ("C", ("red", "blue"), False), ("2", ("1", "2"), True), ("green", ("red",), False),
    ("2", (), True), ("red cube", (), True), (r"\sqrt{2}", (), True), ("(1, 2)", (), True), ("$$", (), False),
    ("x" * 201, (), False), ("B", ("x" * 300, "y" * 300), True)])
def test_a_gold_answer_that_no_response_can_match_is_found(answer, choices, matched):
    sample = Sample("7", "q", answer=answer, choices=choices, where="a.json row 3")
    assert filters.unmatched([sample], correct) == ([] if matched else [sample])
    if matched:
        filters.check_golds([sample], correct, "a.json", log=pytest.fail)
        return
    lines = []
    filters.check_golds([sample, Sample("8", "q", answer="3")], correct, "a.json", lines.append)
    assert lines[0].startswith("note: 1 of 2 gold answers can be matched by no response, the first is a.json row 3: ")
    with pytest.raises(InputError, match="a.json: 1 of 1 gold answers can be matched by no response"):
        filters.check_golds([sample], correct, "a.json")


# ---- images
@pytest.mark.parametrize("broken, total, ends", [(0, 3, False), (1, 20, False), (1, 19, True), (2, 20, True)])
def test_broken_images_cost_their_rows_up_to_one_in_twenty(processor, tmp_path, broken, total, ends):
    (tmp_path / "broken.png").write_text("not an image")
    picture(28, 28, 0).save(tmp_path / "good.png")
    samples = [Sample(str(i), "q", (str(tmp_path / ("broken.png" if i < broken else "good.png")),), where=f"row {i}")
               for i in range(total)]
    if ends:
        with pytest.raises(InputError, match=f"over 5 %: {broken} of {total} rows have a broken image, .* row 0: qid"):
            filters.drop_long(samples, processor, 999)
        return
    lines = []
    assert filters.drop_long(samples, processor, 999, lines.append) == samples[broken:]
    assert [line.split(":")[0] for line in lines] == ["dropped"] * bool(broken)


def test_a_path_that_leads_nowhere_ends_the_warm_up_too(tiny_folder, questions, tmp_path, capsys):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "### The final answer is: 2"}]
    rows = [{"id": i, "messages": turns, "images": [f"images/{i}.png"]} for i in range(6)]
    assert train.main(warm_up(tiny_folder, write(tmp_path / "a.json", rows), questions, tmp_path)) == 2
    line = capsys.readouterr().err
    assert f"{tmp_path}/images/0.png does not exist (6 missing in all); check it or set --image_root" in line


@pytest.mark.parametrize("flags, message", [
    ([], "2 of 12 questions have no images, the first is qid q5"), (["--allow_text", "True"], "noclip"),
    (["--clip_weight", "0"], "")])
def test_a_clip_weight_asks_for_an_image_in_each_row(tiny_folder, questions, tmp_path, capsys, flags, message):
    argv = stage_1(tiny_folder, questions, tmp_path, "--clip_weight", "0.4", "--clip", str(tmp_path / "noclip"), *flags)
    assert train.main(argv) == (2 if message else 0)
    captured = capsys.readouterr()
    assert message in captured.err
    assert f"{questions}: 12 rows, 10 with images, 12 with answer" in captured.out


def questions_with(path, change: dict[str, dict], questions) -> str:
    """The rows of stage 1 with whole image paths, some of them changed."""
    rows = [json.loads(line) for line in open(questions)]
    for row in rows:
        row["images"] = [os.path.join(os.path.dirname(questions), image) for image in row.get("images", [])]
    path.write_text("".join(json.dumps(row | change.get(row["qid"], {})) + "\n" for row in rows))
    return str(path)


def test_a_torn_image_ends_the_run_until_another_is_in_its_place(tiny_folder, questions, tmp_path, capsys):
    bad = questions_with(tmp_path / "bad.jsonl", {"q4": {"images": [torn(tmp_path / "torn.jpg")]}}, questions)
    argv = stage_1(tiny_folder, bad, tmp_path, "--questions_per_rollout", "6", "--save_every", "1", "--eval_data", "",
                   "--eval_every", "0")
    assert train.main(argv) == 2
    assert f"bad.jsonl row 5: qid 'q4': image {tmp_path}/torn.jpg: cannot be read" in capsys.readouterr().err
    picture(84, 84, 1).save(tmp_path / "torn.jpg")
    assert train.main(argv) == 0 and len(metrics(tmp_path / "stage1")) == 2


# ---- resuming with something else under the same path
def test_a_run_is_not_resumed_with_other_rows_another_prompt_or_other_weights(tiny_folder, questions, tmp_path, capsys,
                                                                              monkeypatch):
    rows, model = questions_with(tmp_path / "rows.jsonl", {}, questions), str(tmp_path / "model")
    shutil.copytree(tiny_folder, model)
    argv = stage_1(model, rows, tmp_path)
    assert train.main(argv) == 0
    before = contents(tmp_path / "stage1")
    kept = open(rows).read()

    def refused(message):
        capsys.readouterr()
        assert train.main(argv) == 2
        assert message in capsys.readouterr().err and contents(tmp_path / "stage1") == before

    for change in ({"answer": "4"}, {"problem": "?"}, {"key_words": ["z"]}, {"qid": "x"}):
        questions_with(tmp_path / "rows.jsonl", {"q3": change}, questions)
        refused("holds a run with other settings (the rows of --data changed)")
    (tmp_path / "rows.jsonl").write_text(kept[: kept.rindex("\n", 0, -1) + 1])
    refused("the rows of --data changed")
    (tmp_path / "rows.jsonl").write_text(kept)
    with monkeypatch.context() as patched:
        patched.setattr(data, "INSTRUCTION", data.INSTRUCTION + " ")
        refused("the prompt template changed")
    stored = os.path.join(model, "model.safetensors")
    save_file({name: value * 1.001 for name, value in load_file(stored).items()}, stored)
    refused("the weights of --model changed")
    shutil.copy(os.path.join(tiny_folder, "model.safetensors"), model)
    assert train.main(argv) == 0 and "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 1_500_000, 2_999_999])
def test_a_model_is_known_by_the_beginning_middle_and_end_of_its_files(tmp_path, place):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3_000_000))
    before = weights_id(str(tmp_path))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(place)
        file.write(b"1")
    assert weights_id(str(tmp_path)) != before


def test_a_run_of_an_older_version_has_no_fingerprints_and_goes_on(tiny_folder, questions, tmp_path):
    argv = stage_1(tiny_folder, questions, tmp_path)
    assert train.main(argv) == 0
    found = json.load(open(tmp_path / "stage1" / "config.json"))
    assert set(found.pop("fingerprints")) == {"rows of --data", "prompt template", "weights of --model"}
    (tmp_path / "stage1" / "config.json").write_text(json.dumps(found))
    assert train.main(argv) == 0 and weights(tmp_path / "stage1")


# ---- python data.py check
def test_check_tells_what_a_file_holds(tiny_folder, tmp_path, capsys):
    picture(56, 56, 0).save(tmp_path / "a.png")
    torn(tmp_path / "torn.jpg")
    good = {"problem": "How many?", "answer": "B", "choices": ["1", "2"], "images": ["a.png"], "key_words": ["a", "b"]}
    rows = [good, good | {"answer": "0", "choices": ["x", "y"]}, good | {"images": ["absent.png"]},
            good | {"images": ["torn.jpg"], "answer": "yes", "choices": []}, {"problem": "no answer"},
            good | {"answer": "x^2+1", "choices": [], "source": "web"}]
    path = write(tmp_path / "a.json", rows)
    assert check.main(["check", path, "--stage", "1", "--model", tiny_folder]) == 2
    captured = capsys.readouterr()
    for line in ("a.json: 6 rows", "column problem: in 5 rows\n", "column source: in 1 rows, not read",
                 "rows that are refused: 1", "row 5: no answer; it has: problem",
                 "gold answers that no response can match: 1", "row 2: qid '2': '0', choices ('x', 'y')",
                 "images missing or broken: 2", f"{path} row 3: qid '3': image {tmp_path}/absent.png: cannot be read",
                 f"{path} row 4: qid '4': image {tmp_path}/torn.jpg: cannot be read"):
        assert line in captured.out, line
    assert captured.err.startswith(f"error: {path} row 5: no answer") and captured.err.count("\n") == 1
    assert len(os.listdir(tmp_path)) == 3  # nothing is written


SOLVED = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "### a"}], "id": i}
          for i in range(128)]


@pytest.mark.parametrize("rows, flags, code, message", [
    ([{"problem": f"q{i}", "answer": "2"} for i in range(9)], [], 0, "stage sample would start with this data, as far"),
    (SOLVED, ["--stage", "sft"], 0, "stage sft would start with this data"),
    (SOLVED, [], 2, "128 of 128 questions have no answer"), (SOLVED, ["--stages", "sft"], 2, "--stage"),
    (SOLVED[:9], ["--stage", "sft"], 2, "do not fill one batch of 128"),
    ([{"problem": "q", "answer": "2"}], ["--stage", "2"], 2, "do not fill one batch of 512"),
    ([{"problem": "q", "answer": "2", "images": ["a.png"]}], [], 2, "a.png does not exist (1 missing in all)"),
    ([{"problem": "q", "answer": "2"}] * 600, ["--stage", "1"], 2, "600 of 600 questions have no key_words"),
    ([{"problem": "q", "answer": "2", "key_words": ["a"]}] * 600, ["--stage", "1"], 2, "no images, the first is qid 1"),
    ([{"problem": "q", "answer": "2", "qid": 1}] * 2, [], 2, "is also that of"), ([], [], 2, "no rows"),
    ([{"problem": "q", "answer": "$$"}], [], 2, "can be matched by no response")])
def test_check_ends_as_the_stage_would(tmp_path, capsys, rows, flags, code, message):
    assert check.main(["check", write(tmp_path / "a.json", rows), *flags]) == code
    captured = capsys.readouterr()
    assert message in (captured.err if code else captured.out)


def run_data_py(*argv):
    sys.argv = ["data.py", *argv]
    runpy.run_path(os.path.join(ROOT, "data.py"), run_name="__main__")


def test_check_is_a_command_of_data_py(tmp_path):
    path = write(tmp_path / "a.json", [{"problem": "q\x1b[2J", "answer": "2"}])
    [only] = ranks(1, run_data_py, "check", path)
    assert only.stderr == "" and "stage sample would start" in only.stdout
    assert "\x1b" not in only.stdout
