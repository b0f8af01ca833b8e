"""Benchmarks: rows in the hub's columns and types become questions and gold answers; verdicts and means by hand."""
import io
import json
import os
import shutil

import datasets
import huggingface_hub.constants
import pytest
from PIL import Image

from benchmarks.common import gold_letters, listed_options
from benchmarks.registry import BENCHMARKS, chosen, load_items, load_rows, load_samples
from data import InputError, load_image
from ranks import import_from, ranks


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COT = "### Image Description: no dog\n### Rationales: r\n### Step 1: there is no doubt, (B) is not it\n" \
      "### The final answer is: {}"


def as_set(rows: list[dict], **kinds) -> datasets.Dataset:
    """Rows as datasets holds them; kinds: the features of the columns that it could not guess."""
    guessed = datasets.Dataset.from_list([{name: row[name] for name in row if name not in kinds} for row in rows])
    features = datasets.Features(dict(guessed.features) | kinds)
    return datasets.Dataset.from_list(rows, features=features)


def picture(shade=0):
    return Image.new("RGB", (56, 56), (shade, 99, 200))


def metadata(**changes):
    return dict(category="math-targeted-vqa", context="synthetic scene", grade="elementary school", img_height=56,
                img_width=56, language="english", skills=["arithmetic reasoning", "logical reasoning"], source="CLEVR",
                split="testmini", task="visual question answering") | changes


def mathvista_set() -> datasets.Dataset:
    """Four questions in the hub's columns: two choices, an integer with a unit, a decimal; null where it is."""
    kinds = [("multi_choice", "text", ["yes", "no"], None, None, "no"),
             ("free_form", "integer", None, "years", None, "12"),
             ("free_form", "float", None, None, 1.0, "1.5"), ("multi_choice", "text", ["4", "7", "9"], None, None, "7")]
    rows = [dict(pid=str(i), question=f"What is in picture {i}?", image=f"images/{i}.jpg", decoded_image=picture(i),
                 choices=choices, unit=unit, precision=precision, answer=answer, question_type=question_type,
                 answer_type=answer_type, metadata=metadata(), query=f"Hint: h\nQuestion: What is in picture {i}?")
            for i, (question_type, answer_type, choices, unit, precision, answer) in enumerate(kinds, 1)]
    return as_set(rows, decoded_image=datasets.Image(), choices=datasets.List(datasets.Value("string")),
                  precision=datasets.Value("float64"), unit=datasets.Value("string"))


ROWS = {  # one of each data set, with the columns of its card
    "mathvista": dict(pid="1", question="Is it?", image="1.jpg", choices=["yes", "no"], unit=None, precision=None,
                      answer="no", question_type="multi_choice", answer_type="text", metadata=metadata(), query="?"),
    "mathverse": dict(sample_index="1", problem_index="1", problem_version="Text Lite", image="1.png", answer="B",
                      question="Find x.\nChoices:\nA:135°\nB:140°", question_type="multi-choice", query_wo="Find x.",
                      query_cot="Find x.", question_for_eval="Find x.\nChoices:\nA:135°\nB:140°",
                      metadata=dict(split="testmini", source="GeoQA", subject="Plane Geometry", subfield="Angle")),
    "mathvision": dict(id="1", question="How many?\n<image1>", options=["3", "5"], image="images/1.jpg", answer="B",
                       solution=None, level=1, subject="algebra"),
    "mmstar": dict(index=1, question="Which? Options: A: red, B: blue", image="1.jpg", answer="B", category="math",
                   l2_category="geometry", meta_info=dict(source="MathVista", split="testmini", image_path="1.jpg")),
    "ocrbench": dict(dataset="IIIT5K", question="what is written in the image?", image="1.jpg", answer=["CENTRE"],
                     question_type="Regular Text Recognition"),
    "hallusionbench": dict(category="VD", subcategory="chart", visual_input="1", set_id="0", figure_id="0",
                           question_id="0", question="Is it?", gt_answer="1", gt_answer_details="", sample_note="",
                           filename="", image="1.png")}


def items_of(name: str, rows: list[dict]) -> dict:
    return load_items(name, [(f"row {i}", row) for i, row in enumerate(rows, 1)])


def judge(name: str, response: str, item):
    """(official, strict)"""
    extraction, rule = BENCHMARKS[name].extract(response, item)
    return BENCHMARKS[name].verdict(response, extraction, rule, item)[1:]


# ---------------------------------------------------------------- loading


def test_a_benchmark_is_the_same_from_parquet_a_folder_and_json(tmp_path):
    made = mathvista_set()
    made.to_parquet(str(tmp_path / "testmini.parquet"))
    os.makedirs(tmp_path / "folder" / "data")
    made.to_parquet(str(tmp_path / "folder" / "data" / "testmini-00000-of-00001.parquet"))
    rows = {row["pid"]: {name: row[name] for name in row if name != "decoded_image"} for row in made}
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    sources = ["testmini.parquet", "folder", "testmini.json"]
    read = [load_items("mathvista", load_rows("mathvista", str(tmp_path / source), "")) for source in sources]
    assert all(items == read[0] for items in read) and list(read[0]) == ["1", "2", "3", "4"]


def test_null_nan_and_arrays_of_a_data_frame_are_what_the_hub_means():
    frame = mathvista_set().remove_columns("decoded_image").to_pandas()
    assert frame.precision.isna().any() and type(frame.choices[0]).__name__ == "ndarray"
    items = items_of("mathvista", frame.to_dict("records"))
    assert items == items_of("mathvista", list(mathvista_set().remove_columns("decoded_image")))
    assert items["3"].precision == 1 and items["2"].choices == ()


def test_an_image_may_be_a_picture_a_path_or_bytes(tmp_path):
    picture(7).save(tmp_path / "7.png")
    stored = io.BytesIO()
    picture(7).save(stored, "PNG")
    rows = [ROWS["ocrbench"] | dict(image=image)
            for image in (picture(7), "7.png", {"bytes": stored.getvalue(), "path": None}, None, "")]
    named = [(f"row {i}", row) for i, row in enumerate(rows)]
    samples = load_samples(load_items("ocrbench", named), named, str(tmp_path))
    assert samples[1].images == (str(tmp_path / "7.png"),) and samples[3].images == samples[4].images == ()
    assert load_image(samples[0].images[0]).tobytes() == load_image(samples[2].images[0]).tobytes()


def test_a_question_that_writes_of_an_image_marks_none():
    named = [("row 1", ROWS["ocrbench"] | dict(question="What does <image> mean in HTML?"))]
    [sample] = load_samples(load_items("ocrbench", named), named, "")
    assert "<image>" not in sample.question


def test_a_folder_may_hold_one_folder_per_benchmark(tmp_path):
    os.makedirs(tmp_path / "mathvista")
    mathvista_set().to_parquet(str(tmp_path / "mathvista" / "testmini.parquet"))
    assert len(load_rows("mathvista", str(tmp_path), "")) == 4


def test_the_only_split_is_taken_and_of_several_one_must_be_named(tmp_path):
    os.makedirs(tmp_path / "data")
    mathvista_set().to_parquet(str(tmp_path / "data" / "validation-00000-of-00001.parquet"))
    assert len(load_rows("mathvista", str(tmp_path), "")) == 4
    mathvista_set().to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    with pytest.raises(InputError, match="no split testmini; it has train, validation"):
        load_rows("mathvista", str(tmp_path), "")
    assert len(load_rows("mathvista", str(tmp_path), "validation")) == 4


def test_a_hub_that_cannot_be_reached_is_one_line_with_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(InputError) as error:
        load_rows("mathvista", "", "")
    line = str(error.value)
    assert "\n" not in line and "AI4Math/MathVista" in line
    assert "hf download" in line and "--data FOLDER" in line and "HF_HOME" in line


MISSING = object()
# name, columns changed in a row of its data set; what is said, or "" where it is read; what happened before there were
# tables of columns: "scored" with exit code 0.
CHANGED = [
    ("mathvista", {"question": 7}, "question is 7; expected string; this is no row of mathvista", "scored"),
    ("mathvista", {"choices": 7}, "choices is 7; expected strings or null", "TypeError"),
    ("mathvista", {"choices": "yes, no"}, "choices is 'yes, no'", "scored: each letter was an option"),
    ("mathvista", {"choices": [1, 2]}, "choices is list; expected strings or null", "scored"),
    ("mathvista", {"precision": "one"}, "precision is 'one'; expected 1 or 2 or null", "ValueError"),
    ("mathvista", {"precision": float("inf")}, "precision is inf; expected 1 or 2 or null", "OverflowError"),
    ("mathvista", {"precision": "1"}, "", "read"),
    ("mathvista", {"choices": None}, "a choice without choices; fix or remove the row", "ValueError"),
    ("mathvista", {"question_type": "free_form", "answer_type": "float"}, "a float without precision", "scored 0"),
    ("hallusionbench", {"gt_answer": 1.0}, "", "scored: a yes was a no"),
    ("mathvista", {"answer": {}}, "answer is object; expected string or number", "scored"),
    ("mathvista", {"answer": None}, "answer is null", "scored"),
    ("mathvista", {"answer": float("nan")}, "answer is null", "scored"),
    ("mathvista", {"answer": ["no"]}, "answer is strings", "scored"),
    ("mathvista", {"answer": True}, "answer is bool", "scored"),
    ("mathvista", {"query": 7}, "query is 7", "AttributeError when asked"),
    ("mathvista", {"question_type": "multi-choice"}, "expected multi_choice or free_form", "scored: asked as a text"),
    ("mathvista", {"metadata": None}, "no column metadata.language", "one line"),
    ("mathvista", {"metadata.category": MISSING}, "no column metadata.category", "scored"),
    ("mathvista", {"metadata.skills": "arithmetic"}, "metadata.skills is 'arithmetic'", "scored"),
    ("mathvista", {"question": "Which \ud83d?"}, "", "UnicodeEncodeError"),
    ("mathverse", {"problem_version": MISSING}, "no column problem_version", "scored"),
    ("mathverse", {"answer": ["B"]}, "answer is strings", "scored"),
    ("mathverse", {"answer": {"a": 1}}, "answer is object", "scored"),
    ("mathverse", {"answer": None}, "answer is null", "scored"),
    ("mathverse", {"question_type": "multi_choice"}, "expected multi-choice or free-form", "scored: asked as a text"),
    ("mathverse", {"metadata": "GeoQA"}, "no column metadata.subject", "one line"),
    ("mathverse", {"sample_index": None}, "sample_index is null", "scored"),
    ("mathvision", {"options": 7}, "options is 7; expected strings", "TypeError"),
    ("mathvision", {"options": "3, 5"}, "options is '3, 5'", "scored: each letter was an option"),
    ("mathvision", {"options": MISSING}, "no column options", "scored: asked without options"),
    ("mathvision", {"answer": None}, "answer is null", "scored"),
    ("mathvision", {"options": list("012345678"), "answer": "8"}, "", "IndexError"),
    ("mmstar", {"category": MISSING}, "no column category", "scored"),
    ("mmstar", {"question": 7}, "question is 7", "scored"),
    ("mmstar", {"answer": 1}, "answer is 1; expected string", "scored"),
    ("ocrbench", {"answer": 7}, "answer is 7; expected string or strings", "TypeError"),
    ("ocrbench", {"answer": {"a": 1}}, "answer is object", "scored: the keys were the answers"),
    ("ocrbench", {"answer": None}, "answer is null", "scored"),
    ("ocrbench", {"dataset": MISSING}, "no column dataset", "scored"),
    ("ocrbench", {"answer": "CENTRE"}, "", "read"),
    ("hallusionbench", {"set_id": MISSING}, "no column set_id", "scored: sets merged"),
    ("hallusionbench", {"category": MISSING}, "no column category", "scored: categories merged"),
    ("hallusionbench", {"gt_answer": "2"}, "gt_answer is '2'; expected 1 or 0 or yes or no", "one line"),
    ("hallusionbench", {"gt_answer": True}, "gt_answer is bool", "one line"),
]


@pytest.mark.parametrize("name, changes, said, before", CHANGED)
def test_a_row_with_another_column_is_one_line_or_read_properly(name, changes, said, before):
    row = ROWS[name] | ({"metadata": dict(ROWS[name]["metadata"])} if "metadata" in ROWS[name] else {})
    for column, value in changes.items():
        holder, column = (row["metadata"], column[9:]) if column.startswith("metadata.") else (row, column)
        holder[column] = value
        if value is MISSING:
            del holder[column]
    named = [("f.json row 1", ROWS[name]), ("f.json row 2", row | {"pid": "2", "id": "2", "sample_index": row.get(
        "sample_index") and "2", "index": 2})]
    if not said:
        assert len(load_items(name, named)) == 2
        return
    with pytest.raises(InputError) as error:
        load_items(name, named)
    line = str(error.value)
    assert line.startswith("f.json row 2: ") and said in line and "\n" not in line and len(line) < 300


@pytest.mark.parametrize("asked", BENCHMARKS)
@pytest.mark.parametrize("given", BENCHMARKS)
def test_rows_of_another_benchmark_are_refused_by_its_name(asked, given):
    """Before, MathVista's rows were scored as MathVerse's, and any rows as MATH-Vision's, MMStar's or OCRBench's."""
    named = [("f.json row 1", ROWS[given])]
    if asked == given:
        assert len(load_items(asked, named)) == 1
    else:
        with pytest.raises(InputError, match=f"^f.json row 1: no column .*; this is a row of {given}: give --bench"):
            load_items(asked, named)


def test_two_rows_with_one_pid_are_refused():
    with pytest.raises(InputError, match="row 2: pid 1 is there twice"):
        items_of("mmstar", [ROWS["mmstar"]] * 2)


def test_a_name_counts_once_and_all_is_all():
    assert chosen(["mathvista", "mmstar", "ocrbench", "mmstar"]) == ["mathvista", "mmstar", "ocrbench"]
    assert chosen(["all"]) == list(BENCHMARKS) and chosen([]) == []
    with pytest.raises(InputError, match="give one or several of"):
        chosen(["mathvsita"])


PLANTED = """
from benchmarks.common import Benchmark, Item, Verdict, text_of

def item_from_row(row, number):
    return Item(str(number), text_of(row, "q"), "integer", answer=text_of(row, "a"), query=text_of(row, "q"))

def judge(response, extraction, item):
    return Verdict(extraction, extraction == item.answer, extraction == item.answer)

BENCHMARK = Benchmark("me/mine", "test", {"q": "string", "a": "number"}, (), item_from_row, judge, official="equal",
                      strict="equal, and an answer")
"""


def judge_planted(folder):
    import_from(folder)
    os.chdir(folder)
    from benchmarks import registry, report

    [name] = registry.chosen(["mine"])
    items = registry.load_items(name, registry.load_rows(name, "rows.jsonl", ""))
    print(report.judge_all(name, {"1": {"response": "The answer is 2."}}, items)["1"]["strict"])


def test_a_new_benchmark_is_one_new_file(tmp_path):
    """In a copy of the project: found by name, read, judged and reported."""
    for folder in ("benchmarks", "grading", "plumbing"):
        shutil.copytree(os.path.join(ROOT, folder), tmp_path / folder)
    shutil.copy(os.path.join(ROOT, "data.py"), tmp_path)
    (tmp_path / "benchmarks" / "mine.py").write_text(PLANTED)
    (tmp_path / "rows.jsonl").write_text('{"q": "1 + 1?", "a": 2}\n')
    assert ranks(1, judge_planted, str(tmp_path))[0].stdout == "True\n"


# ---------------------------------------------------------------- MathVerse, MATH-Vision, MMStar


@pytest.mark.parametrize("question, options", [
    ("Find x. In A: no.\nChoices:\nA:135°\nB:140°\nC:145°", ("135°", "140°", "145°")),
    ("Find x.\nChoice:\nA:5 cm\nB:5 m", ("5 cm", "5 m")),  # MathVerse has the singular as well
    ("Where? Options: A: left, B: right of it, C: up", ("left", "right of it", "up")),  # the three spellings of MMStar
    ("Hint: the letter, e.g., A, B, C, D.\nQuestion: Is (A) up?\nChoices:\n(A) yes\n(B) no", ("yes", "no")),
    ("Which is it?\n(A) red (B) blue\n(C) neither", ("red", "blue", "neither")),
    ("What is in it? Options: A: vitamin B. only, B: fat", ("vitamin B. only", "fat")),  # the first mark's spelling
    ("Which? Choices: A:1 B:2 C:3 D:4 E:5 F:6 G:7 H:8", tuple("12345678")),
    ("Which? Choices: A:1 B:2 C:3 D:4 E:5 F:6 G:7 H:8 or A:9", (*"1234567", "8 or A:9")),
    ("Which one?", ("A", "B", "C", "D")), ("Is angle (A) equal to f(B)?", ("A", "B", "C", "D")),
])
def test_options_are_read_from_the_question(question, options):
    assert listed_options(question) == options


@pytest.mark.parametrize("gold, choices, letters", [
    ("C", (), "C"), ("(C)", (), "C"), ("C\nD", (), "CD"), ("(A), (B)", (), "AB"), ("blue", ("red", "blue"), "B"),
    ("GAD", ("ADG", "GAD"), "B"), ("A", ("B", "A"), "A"), ("purple", ("red", "blue"), "purple"), ("", ("red",), "")])
def test_gold_letters_in_any_spelling(gold, choices, letters):
    assert gold_letters(gold, choices) == letters


def mathverse_row(index, version, question_type="multi-choice", answer="B", **changes):
    full = "Find x.\nChoices:\nA:135°\nB:140°"
    return dict(sample_index=str(index), problem_index="1", problem_version=version, answer=answer,
                question="" if version == "Vision Only" else full, question_for_eval=full,
                query_wo="Answer the question in the image.", question_type=question_type,
                metadata=dict(split="testmini", source="GeoQA", subject="Plane Geometry", subfield="Angle")) | changes


def test_mathverse_means_are_per_version():
    """Text Lite 1 of 2, Vision Only 0 of 1: mean of the versions 25."""
    rows = [mathverse_row(1, "Text Lite"), mathverse_row(2, "Text Lite"), mathverse_row(3, "Vision Only")]
    items = items_of("mathverse", rows)
    assert items["3"].query == "Answer the question in the image." and items["1"].choices == ("135°", "140°")
    right = {pid: judge("mathverse", COT.format(answer), items[pid])[1] for pid, answer in zip("123", ("B", "A", "A"))}
    assert right == {"1": True, "2": False, "3": False}
    means = BENCHMARKS["mathverse"].means(right, items)
    assert means == {"mean of the versions": 25.0}


def test_mathverse_gold_answers_that_are_no_numbers_are_told_apart():
    """They are under-credited: no judge reads "domain: x > 0" here."""
    rows = [mathverse_row(i, "Text Lite", "free-form", answer) for i, answer in enumerate(("7 cm", "domain: x>0"), 1)]
    items = items_of("mathverse", rows + [mathverse_row(3, "Text Lite")])
    assert [item.labels["gold"] for item in items.values()] == [("number",), ("other",), ("letter",)]
    assert judge("mathverse", COT.format("7"), items["1"]) == (False, True)  # equal, but not the same text
    assert judge("mathverse", COT.format("domain: x>0"), items["2"]) == (True, True)


@pytest.mark.parametrize("gold, response, right", [
    ("(C)", "C", True), ("(C)", "(C)", True), ("(C)", "B", False), ("145°", "C", True),
    ("C\nD", "C, D", True), ("C\nD", "C and D", True), ("C\nD", "CD", True), ("C\nD", "C", False),
    ("C\nD", "C, B", False)])
def test_mathverse_golds_of_options(gold, response, right):
    question = "Find x.\nChoice:\nA:135°\nB:140°\nC:145°\nD:150°"
    row = mathverse_row(1, "Text Lite", answer=gold, question=question, question_for_eval=question)
    assert judge("mathverse", COT.format(response), items_of("mathverse", [row])["1"]) == (right, right)


def test_a_mathvision_question_may_be_nothing_but_its_picture():
    row = ROWS["mathvision"] | dict(question="<image1>", options=list("ABCDE"), image="1.jpg")
    items = items_of("mathvision", [row])
    [sample] = load_samples(items, [("row 1", row)], "/x")
    assert items["1"].query == "" and sample.question == "" and sample.images == ("/x/1.jpg",)
    assert items_of("mathvision", [row | dict(options=["3", "5"])])["1"].query == "(A) 3\n(B) 5"


@pytest.mark.parametrize("options, gold, letter", [(["AB", "BC"], "BC", "B"), (list("012345678"), "8", "I")])
def test_a_mathvision_gold_that_is_the_text_of_an_option(options, gold, letter):
    """BC is part of ABCDE but no letter; the ninth option has one that letters up to H do not reach."""
    row = ROWS["mathvision"] | dict(options=options, answer=gold)
    assert items_of("mathvision", [row])["1"].answer == letter


def test_mathvision_options_that_are_letters_stand_in_the_picture():
    rows = [dict(id="1", question="Which? <image1>", options=list("ABCDE"), answer="D", subject="algebra", level=2),
            dict(id="2", question="How many?\n<image1>", options=["3", "5"], answer="B", subject="algebra", level=1),
            dict(id="3", question="How long?", options=[], answer="2.5", subject="algebra", level=1)]
    items = items_of("mathvision", rows)
    assert items["1"].query == "Which?" and items["2"].query == "How many?\n(A) 3\n(B) 5"
    for answer in ("D", "(D)", "**D**", "Option D"):
        assert judge("mathvision", COT.format(answer), items["1"]) == (True, True)
    assert judge("mathvision", COT.format("E"), items["1"]) == (False, False)
    assert judge("mathvision", COT.format("5"), items["2"]) == (True, True)  # the option's text
    assert judge("mathvision", COT.format("5/2"), items["3"]) == (True, True)
    assert judge("mathvision", "### Rationales: it is 2.5", items["3"])[1] is False


def test_symbolic_answers_are_compared_by_value():
    row = dict(id="1", question="How long?", options=[], answer=r"2\sqrt{2}", subject="algebra", level=5)
    item = items_of("mathvision", [row])["1"]
    assert judge("mathvision", COT.format(r"\sqrt{8}"), item) == (False, True)
    assert judge("mathvision", COT.format(r"\sqrt{6}"), item) == (False, False)


def test_mathvision_answers_are_never_run_as_code(tmp_path):
    item = items_of("mathvision", [dict(id="1", question="q", options=[], answer="2", subject="s", level=1)])["1"]
    trap = f"__import__('os').mkdir({str(tmp_path / 'x')!r}) or 2"
    assert judge("mathvision", COT.format(trap), item) == (False, False) and not os.path.exists(tmp_path / "x")


def test_mmstar_is_the_mean_of_its_categories():
    """math 2 of 2, logical 0 of 1: 50, where the plain accuracy is 67."""
    rows = [dict(index=i, question="q? Options: A: red, B: blue", answer="B", category=category, l2_category="x")
            for i, category in enumerate(("math", "math", "logical reasoning"))]
    items = items_of("mmstar", rows)
    assert items["0"].query.endswith("B: blue\nPlease select the correct answer from the options above.")
    verdicts = {pid: judge("mmstar", COT.format(answer), items[pid]) for pid, answer in zip("012", ("B", "(B)", "A"))}
    assert BENCHMARKS["mmstar"].means({pid: strict for pid, (_, strict) in verdicts.items()}, items) == {
        "mean of the categories": 50.0}
    assert verdicts["0"] == (True, True)


# ---------------------------------------------------------------- HallusionBench


def hallusionbench_rows() -> list[dict]:
    """Two sets of two figures with three questions each: 12 rows."""
    return [dict(category="VD", subcategory="chart", visual_input="1", set_id=str(s), figure_id=str(f),
                 question_id=str(q), question=f"Is it {q}?", gt_answer=str(int(q == f)), gt_answer_details="",
                 sample_note="", filename="")
            for s in range(2) for f in range(2) for q in range(3)]


def test_hallusionbench_means_by_hand():
    """12 answers, rows 0 (set 0, figure 0, question 0) and 7 (set 1, figure 0, question 1) wrong: aAcc 10/12.
    Figures: 00 wrong, 01 right, 10 wrong, 11 right: 2/4. Questions, over both figures of a set: 00 wrong, 01 and 02
    right, 10 right, 11 wrong, 12 right: 4/6."""
    items = items_of("hallusionbench", hallusionbench_rows())
    right = {pid: pid not in ("1", "8") for pid in items}
    means = BENCHMARKS["hallusionbench"].means(right, items)
    assert [means[name] for name in ("aAcc", "fAcc", "qAcc")] == pytest.approx([1000 / 12, 50, 400 / 6])
    assert means["mean of the three"] == pytest.approx((1000 / 12 + 50 + 400 / 6) / 3)


def test_hallusionbench_groups_are_within_a_category():
    """VD and VS both have a set 0 of ocr: two figures and two questions, as the authors count them."""
    rows = [ROWS["hallusionbench"] | dict(category=category, subcategory="ocr") for category in ("VD", "VS")]
    means = BENCHMARKS["hallusionbench"].means({"1": True, "2": False}, items_of("hallusionbench", rows))
    assert [means[name] for name in ("aAcc", "fAcc", "qAcc")] == [50, 50, 50]


def test_yes_or_no_counts_in_the_final_section_only():
    """The reasoning of COT says "no" twice; the published rule on all of it would find both words."""
    item = items_of("hallusionbench", hallusionbench_rows()[:1])["1"]  # question 0 of figure 0: yes
    assert item.query == "Is it 0? Please answer yes or no."
    assert judge("hallusionbench", COT.format("Yes"), item) == (True, True)
    assert judge("hallusionbench", COT.format("No"), item) == (False, False)
    assert judge("hallusionbench", COT.format("yes and no"), item)[0] is False
    assert judge("hallusionbench", "Yes.", item) == (True, True)


@pytest.mark.parametrize("gold, meant", [("1", "Yes"), ("0", "No"), (1, "Yes"), ("yes", "Yes"), ("No", "No")])
def test_hallusionbench_gold_answers_in_either_spelling(gold, meant):
    rows = [hallusionbench_rows()[0] | {"gt_answer": gold}]
    assert items_of("hallusionbench", rows)["1"].answer == meant


# ---------------------------------------------------------------- OCRBench


def ocr(answers, dataset="IIIT5K"):
    row = ROWS["ocrbench"] | dict(dataset=dataset, answer=answers)
    return items_of("ocrbench", [row])["1"]


def test_ocrbench_asks_whether_a_gold_answer_is_contained():
    item = ocr(["CENTRE", "Center"])
    assert judge("ocrbench", COT.format("the centre"), item) == (True, True)
    assert judge("ocrbench", COT.format("cent"), item) == (False, False)
    assert judge("ocrbench", "Center", item) == (True, True)  # short: nothing but an answer
    assert judge("ocrbench", COT.format("two\nlines"), ocr(["two lines"])) == (True, True)


def test_ocrbench_strict_ignores_what_only_the_reasoning_says():
    item = ocr(["doubt"])  # a word of COT's first step
    assert judge("ocrbench", COT.format("7"), item) == (True, False)
    assert judge("ocrbench", "### Step 1: doubt, cut off", item) == (True, True)  # short, no section
    assert judge("ocrbench", "### Step 1: doubt" + 200 * " and", item) == (True, False)


def test_ocrbench_handwritten_formulas_keep_case_and_lose_spaces():
    item = ocr(["\\frac { A } { b }"], dataset="HME100k")
    assert judge("ocrbench", COT.format("\\frac{A}{b}"), item) == (True, True)
    assert judge("ocrbench", COT.format("\\frac{a}{b}"), item) == (False, False)


@pytest.mark.parametrize("gold, response, dataset, right", [
    ("A（1）", "a(1)", "ReCTS", True), ("A(1)", "Ａ（１）", "ReCTS", True), ("a b", "a　b", "ReCTS", True),
    ("②", "2", "ReCTS", False), ("x²", "x2", "ReCTS", False), ("(1)", "（1）", "HME100k", False)])
def test_ocrbench_folds_full_width_ascii_and_nothing_else(gold, response, dataset, right):
    """As lmms-eval does: no circled numbers, no superscripts, and no formulas."""
    assert judge("ocrbench", COT.format(response), ocr([gold], dataset=dataset)) == (right, right)


def test_ocrbench_an_empty_gold_answer_is_part_of_no_response():
    assert judge("ocrbench", COT.format("7"), ocr(["", "CENTRE"])) == (False, False)
    assert judge("ocrbench", COT.format("centre"), ocr(["", "CENTRE"])) == (True, True)


def test_ocrbench_counts_points():
    assert BENCHMARKS["ocrbench"].means({"1": True}, {"1": ocr(["a"])}) == {"score": 1.0}
