"""data.py: rows in, samples out, prompts as the model wants them. One property per test, numbers worked by hand."""
import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from types import SimpleNamespace

import datasets
import numpy
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2_5_VLProcessor
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

import data
from data import InputError, Sample
from engine.weights import load_processor
from plumbing import filters
from plumbing.run_folder import replaced_folder

pytestmark = pytest.mark.fast
MIN_PIXELS, MAX_PIXELS = 576, 802816               # release: pebr_stage1.yaml
EXTRA_TOKENS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else %}{{ part['text'] }}"
    "{%- endif %}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}")


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level BPE with a handful of merges."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([data.INSTRUCTION, "user\nassistant\nHow many red circles are there?"] * 4, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]],
                          unk_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
                          extra_special_tokens=EXTRA_TOKENS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    processor = Qwen2_5_VLProcessor(image_processor=Qwen2VLImageProcessor(size=size), tokenizer=make_tokenizer(),
                                    video_processor=Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
    folder = tmp_path_factory.mktemp("model")
    processor.save_pretrained(folder)
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    Qwen2_5_VLConfig(image_token_id=image_token).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def processor(model_folder):
    return load_processor(model_folder, MIN_PIXELS, MAX_PIXELS)


def write(path, content) -> str:
    """content: text as it is, anything else as json."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def picture(path, width=60, height=40, colour="red") -> str:
    Image.new("RGB", (width, height), colour).save(path)
    return str(path)


def rotated(path, width, height) -> str:
    """A JPEG that EXIF tells viewers to turn by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (width, height)).save(path, exif=exif)
    return str(path)


# ---- rows
def test_rl_row_fields(tmp_path):
    row = {"problem": "<image>How many?", "answer": 3, "images": ["a/1.png"], "qid": 7,
           "key_words": ["red circle", " "], "choices": ["2", 3], "solution": " ### "}
    (sample,) = data.load_samples(write(tmp_path / "rows.json", [row]))
    assert sample == Sample(qid="7", question="<image>How many?", images=(str(tmp_path / "a/1.png"),), answer="3",
                            key_words=("red circle",), choices=("2", "3"), solution="###")
    assert sample.where == f"{tmp_path}/rows.json row 1"


@pytest.mark.parametrize("name", ["key_words", "key_word", "keywords"])
def test_key_words_under_each_name_as_list_or_text(tmp_path, name):
    rows = [{"question": "q", "answer": "a", name: words} for words in (["red", "two cups"], "red, two cups,")]
    assert [s.key_words for s in data.load_samples(write(tmp_path / "rows.json", rows))] == [("red", "two cups")] * 2


def test_list_object_and_lines_give_the_same_samples(tmp_path):
    first, second = {"problem": "one", "answer": 0.5}, {"problem": "two", "answer": "b", "image": "x.png"}
    expected = [Sample(qid="1", question="one", answer="0.5"),
                Sample(qid="2", question="two", answer="b", images=(str(tmp_path / "x.png"),))]
    contents = {"list.json": [first, second], "object.json": {"1": first, "2": second},
                "lines.jsonl": f"{json.dumps(first)}\n{json.dumps(second)}\n\n"}
    for name, content in contents.items():
        assert data.load_samples(write(tmp_path / name, content)) == expected


def test_missing_qid_is_the_row_number_or_the_line_or_the_key(tmp_path):
    row = {"problem": "q", "answer": "a"}
    assert [s.qid for s in data.load_samples(write(tmp_path / "a.json", [row, row]))] == ["1", "2"]
    keyed = data.load_samples(write(tmp_path / "a.json", {"x": row, "y": row | {"id": 5}}))
    assert [s.qid for s in keyed] == ["x", "5"]
    lines = data.load_samples(write(tmp_path / "a.jsonl", f"{json.dumps(row)}\n\n{json.dumps(row)}"))
    assert [s.qid for s in lines] == ["1", "3"] and lines[1].where.endswith("a.jsonl row 3")


def test_image_paths_are_relative_to_the_file_or_to_image_root(tmp_path):
    source = write(tmp_path / "a.json", [{"problem": "q", "answer": "a", "images": ["../i/1.png", "/abs/2.png"]}])
    assert data.load_samples(source)[0].images == (str(tmp_path.parent / "i/1.png"), "/abs/2.png")
    assert data.load_samples(source, image_root="/root/x")[0].images == ("/root/i/1.png", "/abs/2.png")


def test_null_columns_count_as_absent(tmp_path):
    row = {"problem": None, "question": "q", "answer": 0, "images": None, "key_words": None, "messages": None}
    assert data.load_samples(write(tmp_path / "a.json", [row])) == [Sample(qid="1", question="q", answer="0")]


MULBERRY = ("Generate an image description. Finish with: 'The final answer is: xxx'.\n### Image Description:\n"
            "### Rationales:\n### Let's think step by step.\n### Step 1:\n...\n### The final answer is:\n\n")


@pytest.mark.parametrize("turn, question", [
    ("<image>How many?", "<image>How many?"),
    ("<image>" + MULBERRY + "How many?\n(A) 2", "<image>How many?\n(A) 2"),
    (" <image>\n<image>" + MULBERRY + "How many in <image>?", "<image><image>How many in <image>?"),
    (MULBERRY + "How many?", "How many?"),
    (data.INSTRUCTION + "How many?", "How many?")])
def test_sharegpt_instruction_in_front_of_the_question_is_removed(tmp_path, turn, question):
    solution = "### Image Description: two cups. ### The final answer is: 2"
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": turn},
                        {"role": "assistant", "content": solution + "\n"}, {"role": "user", "content": "again"}],
           "images": ["1.png"]}
    (sample,) = data.load_samples(write(tmp_path / "a.json", [row]))
    assert (sample.question, sample.solution) == (question, solution)


def test_sharegpt_conversations_with_from_and_value(tmp_path):
    row = {"id": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert data.load_samples(write(tmp_path / "a.json", [row])) == [Sample(qid="x", question="q", solution="a")]


GOOD = {"problem": "q", "answer": "a"}


@pytest.mark.parametrize("name, content, message", [
    ("a.json", "", "a.json line 1: not valid JSON"),
    ("a.json", '[{"problem": "q",\n "answer" 3}]', "a.json line 2: not valid JSON"),
    ("a.jsonl", json.dumps(GOOD) + '\n\n{"problem": \n', "a.jsonl line 3: not valid JSON"),
    ("a.jsonl", "\n", "a.jsonl: no rows"),
    ("a.json", [], "a.json: no rows"),
    ("a.json", "3", "a.json: has type int; expected a list or an object"),
    ("a.json", [GOOD, "text"], "a.json row 2: has type str; expected an object"),
    ("a.json", [{"prompt": "q", "answer": "a"}], "a.json row 1: no problem or question; it has: prompt, answer"),
    ("a.json", [GOOD, {"problem": "q", "answer": None}], "a.json row 2: no answer; it has: problem"),
    ("a.json", [GOOD | {"problem": ["q"]}], "a.json row 1: problem has type list; expected str"),
    ("a.json", [GOOD | {"answer": ["a"]}], "a.json row 1: answer has type list; expected str"),
    ("a.json", [GOOD | {"images": 3}], "a.json row 1: images has type int; expected str or list"),
    ("a.json", [GOOD | {"images": [3]}], "a.json row 1: an image has type int; expected a path"),
    ("a.json", [GOOD | {"images": [{"bytes": None, "path": None}]}], "an image has type NoneType; expected a path"),
    ("a.json", [GOOD | {"key_words": 3}], "a.json row 1: key_words has type int; expected str or list"),
    ("a.json", [GOOD | {"key_words": [None]}], "a.json row 1: key_words has an item of type NoneType; expected texts"),
    ("a.json", [GOOD | {"choices": 3}], "a.json row 1: choices has type int; expected str or list"),
    ("a.json", [GOOD | {"qid": 4}, GOOD, GOOD | {"id": "4"}], "a.json row 3: qid '4' is also that of"),
    ("a.json", [GOOD | {"messages": "q"}], "a.json row 1: messages has type str; expected list"),
    ("a.json", [{"messages": [{"role": "assistant", "content": "a"}]}], "no user or human; it has: assistant"),
    ("a.json", [{"messages": [{"role": "user", "content": MULBERRY}]}], "row 1: the question is empty"),
])
def test_bad_rows_are_one_line_that_names_file_and_row(tmp_path, name, content, message):
    with pytest.raises(InputError) as error:
        data.load_samples(write(tmp_path / name, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(InputError, match="none.json.*check the path"):
        data.load_samples(str(tmp_path / "none.json"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="binary.jsonl.*cannot be read"):
        data.load_samples(str(tmp_path / "binary.jsonl"))


# ---- what people's files really hold
NAN = float("nan")


@pytest.mark.parametrize("empty", [None, NAN, "", " \n", []])
def test_an_empty_column_is_absent_and_hides_none_with_another_name(tmp_path, empty):
    row = {"problem": empty, "question": "q", "answer": 3, "images": empty, "image": "1.png", "key_words": empty,
           "key_word": empty, "keywords": ["red"], "choices": empty, "solution": empty, "messages": empty,
           "conversations": empty, "qid": empty, "id": "x"}
    [sample] = data.load_samples(write(tmp_path / "a.json", [row]))
    assert sample == Sample("x", "q", (str(tmp_path / "1.png"),), "3", ("red",))
    for name in ("question", "answer"):
        with pytest.raises(InputError, match=rf"a.json row 1: no .*{name}; it has"):
            data.load_samples(write(tmp_path / "a.json", [row | {name: empty}]))
    turns = [{"role": "user", "content": empty}, {"role": "assistant", "content": "a"}]
    with pytest.raises(InputError, match="no user or human"):
        data.load_samples(write(tmp_path / "a.json", [{"messages": turns}]))


@pytest.mark.parametrize("change, message", [
    ({"answer": True}, "answer has type bool"), ({"problem": False}, "problem has type bool"),
    ({"choices": [True]}, "choices has an item of type bool"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": True}]}, "content has type bool"),
])
def test_what_is_no_text_is_refused_in_one_short_line(tmp_path, change, message):
    with pytest.raises(InputError) as error:
        data.load_samples(write(tmp_path / "a.json", [GOOD | change]))
    assert "a.json row 1: " in str(error.value) and message in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize("written, read", [
    ("['red circle', 'blue square']", ("red circle", "blue square")), ('["it\'s", "d"]', ("it's", "d")),
    ("1,000, 2", ("1,000", "2")),
    ("[red, blue]", ("red", "blue")), ("1,2,3", ("1", "2", "3")), ("[]", ()), (" , ;", ()), ("red", ("red",)),
    ("red，blue;green|white\nblack、grey", ("red", "blue", "green", "white", "black", "grey"))])
def test_key_words_written_as_a_text(tmp_path, written, read):
    [sample] = data.load_samples(write(tmp_path / "a.json", [GOOD | {"key_words": written}]))
    assert sample.key_words == read


def test_choices_keep_their_places_and_their_primes(tmp_path):
    """Gold B is the second choice also where the first is empty; 5' is five feet."""
    [sample] = data.load_samples(write(tmp_path / "a.json", [GOOD | {"choices": ["", "5'", " f' "]}]))
    assert sample.choices == ("", "5'", "f'")


@pytest.mark.parametrize("answer, gold", [
    ("<answer>D</answer>", "D"), ("think <ANSWER> 4 </ANSWER>", "4"), ("2 + 2 = 4\n#### 4", "4"), (" 2 ", "2")])
def test_what_stands_around_a_gold_answer_is_taken_off(tmp_path, answer, gold):
    [sample] = data.load_samples(write(tmp_path / "a.json", [GOOD | {"answer": answer}]))
    assert sample.answer == gold


def test_a_message_is_one_line_whatever_it_quotes(tmp_path):
    """The name of a column may hold a line end and a terminal code that would paint a second error; so may a qid."""
    words = "7\n\x1b[31merror: all is well\u2028\u202e\ud800"
    with pytest.raises(InputError) as error:
        data.load_samples(write(tmp_path / "a.json", [{"problem": "q", words: 3}]))
    assert str(error.value).isprintable() and r"7\n\x1b[31merror" in str(error.value)
    [sample] = data.load_samples(write(tmp_path / "a.json", [GOOD | {"qid": words}]))
    assert sample.qid.isprintable()
    long = InputError("begin " + "x" * 9999 + " end")
    assert len(str(long)) == 300 and str(long).startswith("begin") and str(long).endswith("x end")


def test_every_kind_of_file_gives_the_same_samples(tmp_path):
    rows = [{"qid": "x", "problem": "q", "answer": "1.50", "image": "1.png", "key_words": "['red', 'blue']"},
            {"qid": "y", "problem": "q, \"r\"", "answer": "007", "image": "2.png", "key_words": None}]
    expected = data.load_samples(write(tmp_path / "rows.json", rows))
    shutil.copy(tmp_path / "rows.json", tmp_path / "ROWS.JSON")
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    shutil.copy(tmp_path / "rows.parquet", tmp_path / "rows.PARQUET")
    for name in ("ROWS.JSON", "rows.parquet", "rows.PARQUET"):
        assert data.load_samples(str(tmp_path / name)) == expected, name
    for kind in ("json", "parquet"):
        (tmp_path / kind).mkdir()
        shutil.copy(tmp_path / f"rows.{kind}", tmp_path / kind)
        assert data.load_samples(str(tmp_path / kind), image_root=str(tmp_path)) == expected, kind


@pytest.mark.parametrize("name, content, message", [
    ("a.parquet", "not parquet", "a.parquet: cannot be read"), ("a.parquet", "", "a.parquet: cannot be read"),
    ("a.txt", "q", "a.txt: only .json"), ("a.tar", "q", "a.tar: only .json")])
def test_a_file_that_is_none_of_these_is_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        data.load_samples(write(tmp_path / name, content))
    with pytest.raises(InputError, match=name.replace("a.", "none.")):
        data.load_samples(str(tmp_path / name.replace("a.", "none.")))


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/part-*.parquet\n---\n"


def test_empty_names_are_no_files(tmp_path):
    assert len(data.load_samples(write(tmp_path / "a.json", [GOOD]) + ",")) == 1
    with pytest.raises(InputError, match="names 0 sets"):
        data.load_samples("")


def test_a_file_of_several_without_rows_is_named(tmp_path):
    both = write(tmp_path / "a.json", [GOOD]) + "," + write(tmp_path / "b.json", [])
    with pytest.raises(InputError, match=r"b\.json: no rows"):
        data.load_samples(both)


def test_as_many_image_roots_as_files_or_one(tmp_path):
    both = ",".join(write(tmp_path / f"{name}.json", [GOOD | {"image": "1.png"}]) for name in "ab")
    assert [sample.images for sample in data.load_samples(both, "/r,/s")] == [("/r/1.png",), ("/s/1.png",)]
    with pytest.raises(InputError, match="names 2 sets, --image_root 3 folders"):
        data.load_samples(both, "/r,/s,/t")


@pytest.mark.parametrize("text, items", [
    (json.dumps(["红圆", "π"]), ("红圆", "π")), ('["2, 3", "4, 5"]', ("2, 3", "4, 5")), ("['a', 'b']", ("a", "b"))])
def test_a_list_that_is_one_text_is_read_as_json_first(text, items):
    assert data.texts({"choices": text}, "row 1", "choices") == items


def test_turns_that_are_no_objects_are_one_line():
    with pytest.raises(InputError, match="row 1: a turn has"):
        data.sample_from_row({"messages": ["hi", "there"]}, "row 1", "1", ".")


def test_a_picture_that_was_given_stays_open(tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png")
    assert data.image_size(picture) == data.load_image(picture).size == (60, 60)


def test_folders_of_one_name_are_read_as_they_are_now(tmp_path, monkeypatch):
    """datasets knows such a folder by its last name: it gives the first one's rows for all, and for changed files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def made(place, text):
        os.makedirs(tmp_path / place / "pebr" / "data", exist_ok=True)
        write(tmp_path / place / "pebr" / "README.md", CARD)
        rows = [GOOD | {"problem": text}]
        datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / place / "pebr" / "data" / "part-0.parquet"))
        return data.load_samples(str(tmp_path / place / "pebr"))[0].question

    for place, text in (("a", "one"), ("b", "two"), ("a", "three"), ("b", "four")):
        assert made(place, text) == text


@pytest.mark.parametrize("files, split, rows", [
    ({"train.jsonl": 1, "test.jsonl": 2}, "test", 2), ({"train.jsonl": 1, "test.jsonl": 2}, "train", 1),
    ({"data/train-00000-of-00002.jsonl": 1, "data/train-00001-of-00002.jsonl": 2}, "train", 3),
    ({"val/a.json": 1, "train/a.json": 2}, "validation", 1),
    ({"data/testmini-00000-of-00001-ab12.json": 2, "data/test-00000-of-00001.json": 1}, "testmini", 2),
    ({"pebr_grpo.json": 3, ".cache/x.json": 9}, "train", 3),
    ({"latest/contest.json": 2}, "train", 2), ({"a.json": 1, "table.csv": 0}, "train", 1)])
def test_the_files_of_a_split_in_a_folder(tmp_path, files, split, rows):
    for name, count in files.items():
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        write(tmp_path / name, "".join(json.dumps(GOOD) + "\n" for _ in range(count)) if name.endswith("l") else
              [GOOD] * count)
    assert len(data.load_samples(str(tmp_path), split=split)) == rows


def test_files_of_one_folder_may_have_different_columns(tmp_path):
    write(tmp_path / "a.json", [{"problem": "one", "answer": 1}])
    write(tmp_path / "b.json", [{"question": "two", "answer": "b", "choices": ["a", "b"]}])
    assert [sample.question for sample in data.load_samples(str(tmp_path))] == ["one", "two"]


def test_several_files_have_a_root_and_a_number_each(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.json", [GOOD | {"id": 1, "image": f"{name}.png"}, GOOD])
    both = f"{tmp_path}/a/rows.json,{tmp_path}/b/rows.json"
    samples = data.load_samples(both)
    assert [sample.qid for sample in samples] == ["1/1", "1/2", "2/1", "2/2"]
    assert [sample.images for sample in samples[::2]] == [(f"{tmp_path}/{name}/{name}.png",) for name in "ab"]
    assert [sample.images for sample in data.load_samples(both, "/r,/s")[::2]] == [("/r/a.png",), ("/s/b.png",)]
    assert data.load_samples(both, "/r")[2].images == ("/r/b.png",)


# ---- hub sets
def test_dataset_folder_is_read_with_its_images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "set"
    folder.mkdir()
    picture(folder / "1.png", 60, 40)
    write(folder / "metadata.jsonl", {"file_name": "1.png", "problem": "q", "answer": "3", "qid": "x"})
    (sample,) = data.load_samples(str(folder))
    assert (sample.qid, sample.question, sample.answer) == ("x", "q", "3")
    assert sample.images == (str(folder / "1.png"),) and data.image_size(sample.images[0]) == (60, 40)
    with pytest.raises(InputError, match="no split nosuch; it has train: give one"):
        data.load_samples(str(folder), split="nosuch")


def png(width, height, colour="blue") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["one", "list", "struct"])
def test_pictures_of_a_set_stay_bytes_until_they_are_needed(tmp_path, monkeypatch, processor, kind):
    """Whether the set calls them pictures, a list of these, or nothing at all: a broken one harms no other row."""
    stored = [{"bytes": png(30, 50), "path": "1.png"}, {"bytes": b"nonsense", "path": None},
              {"bytes": None, "path": picture(tmp_path / "2.png")}]
    feature = {"one": datasets.Image(), "list": datasets.List(datasets.Image()), "struct": None}[kind]
    rows = [GOOD | {"images": [each] if kind == "list" else each} for each in stored]
    made = datasets.Dataset.from_list(rows)
    made = made.cast_column("images", feature) if feature else made
    monkeypatch.setattr(datasets, "load_dataset", lambda source, config: datasets.DatasetDict(train=made))
    made.to_parquet(str(tmp_path / "a.parquet"))
    for source in ("org/name", str(tmp_path / "a.parquet")):
        first, second, third = data.load_samples(source)
        assert first.images == (stored[0]["bytes"],) and data.image_size(first.images[0]) == (30, 50)
        assert third.images == (str(tmp_path / "2.png"),) and third.where == f"{source} row 3"
        with pytest.raises(data.ImageError, match="row 2: qid '2': image of 8 bytes: cannot be read"):
            data.encode_prompt(second, processor)


def test_questions_are_the_same_from_a_file_packed_or_not_and_from_parquet(tmp_path):
    rows = [GOOD | {"qid": "x", "choices": ["1", "2"]}, GOOD | {"qid": "y", "choices": ["3", "4"]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    with gzip.open(tmp_path / "rows.json.gz", "wt") as file:
        json.dump(rows, file)
    expected = data.load_samples(write(tmp_path / "rows.json", rows))
    for name in ("rows.parquet", "rows.json.gz"):
        assert data.load_samples(str(tmp_path / name)) == expected and len(expected) == 2


def test_unreachable_hub_name_says_what_to_do(monkeypatch):
    def unreachable(source, config):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub\nmore lines")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match="'org/name': cannot .*Couldn't reach.*download it first") as error:
        data.load_samples("org/name")
    assert "\n" not in str(error.value)


# ---- filters
def test_check_images_names_the_first_missing_and_counts(tmp_path):
    rows = [GOOD | {"images": [picture(tmp_path / "1.png")]}, GOOD | {"images": ["2.png", "3.png"]}]
    samples = data.load_samples(write(tmp_path / "a.json", rows))
    filters.check_images(samples[:1])
    with pytest.raises(InputError, match=r"a.json row 2: qid '2': image .*/2.png does not exist \(2 missing in all\)"):
        filters.check_images(samples)


def test_worth_imitating_counts_each_reason(processor, tmp_path):
    good, small = picture(tmp_path / "good.png", 28, 28), picture(tmp_path / "small.png", 400, 27)
    cases = [("kept", "fine", (good,)), ("kept", "text alone", ()), ("no_solution", "", (good,)),
             ("rethink", "So 4. Let me ReThink it. 5", (good,)), ("control_token", "a <|image_pad|> b", (good,)),
             ("small_image", "fine", (good, small)), ("control_token", "half a pair: \ud800", (good,)),
             ("over 40 tokens", "fine " * 41, (good,))]
    samples = [Sample(qid=str(i), question="q", images=images, solution=solution)
               for i, (_, solution, images) in enumerate(cases)]
    lines = []
    config = SimpleNamespace(data="a.json", max_response=40, cutoff=0)
    assert filters.worth_imitating(samples, config, processor, lines.append) == samples[:2]
    assert lines == ["warm-up data: 2 kept, 2 control_token, 1 no_solution, 1 rethink, 1 small_image, "
                     "1 over 40 tokens"]
    with pytest.raises(InputError, match=r"a.json: no warm-up row is left \(2 control_token, .*see --max_response"):
        filters.worth_imitating(samples[2:], config, processor, lines.append)


# ---- images
def test_load_image_turns_by_exif(tmp_path):
    image = data.load_image(rotated(tmp_path / "a.jpg", 80, 30))
    assert image.size == (30, 80) and image.mode == "RGB"


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 100, (100, 100, 100)), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 1, (255, 255, 255)),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)), ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
    ("LA", (0, 0), (255, 255, 255))])
def test_load_image_gives_rgb_on_white(tmp_path, mode, colour, expected):
    Image.new(mode, (4, 4), colour).save(tmp_path / "a.png")
    image = data.load_image(str(tmp_path / "a.png"))
    assert image.mode == "RGB" and image.getpixel((2, 2)) == expected


def test_load_image_palette_and_pil(tmp_path):
    palette = Image.new("RGB", (4, 4), (255, 0, 0)).convert("P")
    assert data.load_image(palette).getpixel((0, 0)) == (255, 0, 0)
    palette.save(tmp_path / "a.png", transparency=palette.getpixel((0, 0)))
    assert data.load_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)


def test_unreadable_images_are_named(processor, tmp_path):
    pixels = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:4000])
    write(tmp_path / "text.png", "not an image")
    for name in ("cut.png", "text.png", "none.png"):
        with pytest.raises(InputError, match=f"image {tmp_path}/{name}: cannot be read"):
            data.load_image(str(tmp_path / name))
    with pytest.raises(data.ImageError, match="thin.png: cannot be read .*aspect ratio must be smaller than 200"):
        data.prompt_length(Sample("q", "?", (picture(tmp_path / "thin.png", 2010, 10),)), processor)


@pytest.mark.parametrize("mode, suffix", [("I", "tif"), ("I;16", "png"), ("I;16B", "tif"), ("F", "tif")])
def test_pictures_of_more_than_8_bits_are_refused_by_their_header_and_when_they_are_read(tmp_path, mode, suffix):
    """Pillow would make them white or black, nearly all."""
    Image.new(mode, (30, 30)).save(tmp_path / f"a.{suffix}")
    for read in (data.image_size, data.load_image):
        with pytest.raises(data.ImageError, match=f"a.{suffix}: cannot be read .*more than 8 bits"):
            read(str(tmp_path / f"a.{suffix}"))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"P7\n", b"", b"GIF89a",
                                     b"II*\0\x08\0\0\0\xff\xff", b"BM" + bytes(60), b"\x89PNG\r\n\x1a\n" + bytes(30),
                                     b"RIFF\0\0\0\0WEBPVP8 ", b"\xff\xd8\xff\xe0" + bytes(20)])
def test_what_is_no_picture_is_one_line_and_starts_no_program(tmp_path, content, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path / "a.png").write_bytes(content)
    for read in (data.load_image, data.image_size):
        with pytest.raises(data.ImageError, match="a.png: cannot be read"):
            read(str(tmp_path / "a.png"))


def test_a_picture_too_large_to_decode_is_refused_by_its_header():
    """20000 x 20000 pixels, in a file of 68 bytes."""
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(data.ImageError, match="image of 57 bytes: cannot be read .*decompression bomb"):
        data.image_size(content)


def test_animated_pictures_are_closed_again(tmp_path):
    Image.new("P", (30, 30)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", (30, 30), 5)])
    before = len(os.listdir("/proc/self/fd"))
    kept = [(data.image_size(str(tmp_path / "a.gif")), data.load_image(str(tmp_path / "a.gif"))) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 20


def test_an_image_that_breaks_later_is_named_with_its_row(processor, tmp_path):
    """A JPEG cut in half has a whole header."""
    noise = numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    images = (str(tmp_path / "whole.jpg"), str(tmp_path / "cut.jpg"))
    sample = Sample("q7", "<image>or <image>?", images, where="a row 3")
    data.prompt_length(sample, processor)
    with pytest.raises(data.ImageError, match="a row 3: qid 'q7': image .*cut.jpg: cannot be read"):
        data.encode_prompt(sample, processor)


# ---- processor
def test_load_processor_sets_limits_and_leaves_class_defaults(model_folder):
    before = dict(Qwen2VLImageProcessor.size), dict(Qwen2VLVideoProcessor.size)
    processor = load_processor(model_folder, 576, 100_000)
    assert dict(processor.image_processor.size) == {"shortest_edge": 576, "longest_edge": 100_000}
    assert (dict(Qwen2VLImageProcessor.size), dict(Qwen2VLVideoProcessor.size)) == before


def test_load_processor_overrides_min_pixels_of_hub_configs(model_folder, tmp_path):
    processor = load_processor(model_folder, 576, 100_000)
    processor.save_pretrained(tmp_path)
    shutil.copy(os.path.join(model_folder, "config.json"), tmp_path)
    os.remove(tmp_path / "processor_config.json")          # Qwen's own folders have this instead:
    write(tmp_path / "preprocessor_config.json",
          {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
           "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"})
    before = dict(Qwen2VLImageProcessor.size), dict(Qwen2VLVideoProcessor.size)
    processor = load_processor(str(tmp_path), 576, 802816)
    assert dict(processor.image_processor.size) == {"shortest_edge": 576, "longest_edge": 802816}
    assert (dict(Qwen2VLImageProcessor.size), dict(Qwen2VLVideoProcessor.size)) == before


def test_bad_model_folders(model_folder, tmp_path):
    with pytest.raises(InputError, match="has no config.json"):
        load_processor(str(tmp_path), 576, 802816)
    shutil.copy(os.path.join(model_folder, "config.json"), tmp_path)
    with pytest.raises(InputError, match="no processor found") as error:
        load_processor(str(tmp_path), 576, 802816)
    assert "\n" not in str(error.value)
    make_tokenizer().save_pretrained(tmp_path)             # a language model's folder
    with pytest.raises(InputError, match="no processor found"):
        load_processor(str(tmp_path), 576, 802816)


# ---- prompts
def test_instruction_lists_the_headers_of_the_format_one_a_line():
    assert data.INSTRUCTION.split("\n")[1:] == [
        "### Image Description:", "### Rationales:", "### Let's think step by step.", "### Step 1:", "### Step 2:",
        "...", "### The final answer is:", "", ""]


PAD = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("question, images, user_turn", [
    ("How many?", 0, data.INSTRUCTION + "How many?"),
    ("How many?", 2, PAD + PAD + data.INSTRUCTION + "How many?"),
    ("<image>\nHow many?", 1, PAD + data.INSTRUCTION + "How many?"),
    ("<image><image>Both?", 2, PAD + PAD + data.INSTRUCTION + "Both?"),
    ("<image>Like <image>?", 2, PAD + data.INSTRUCTION + f"Like {PAD}?"),
    ("Is <image> in <image>", 2, data.INSTRUCTION + f"Is {PAD} in {PAD}")])
def test_leading_images_come_before_the_instruction_others_stay(processor, question, images, user_turn):
    text = data.chat_text(Sample(qid="1", question=question, images=("x.png",) * images), processor)
    assert text == f"<|im_start|>user\n{user_turn}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("question, images", [("<image>q", 0), ("<image><image>q", 1), ("<image>q", 2)])
def test_markers_must_match_images(processor, question, images):
    sample = Sample(qid="q7", question=question, images=("x.png",) * images, where="a.json row 3")
    markers = question.count("<image>")
    with pytest.raises(InputError, match=f"a.json row 3: qid 'q7' has {markers} <image> markers for {images} images"):
        data.encode_prompt(sample, processor)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
def test_control_tokens_in_texts_are_refused(processor, token):
    sample = Sample(qid="q7", question=f"What is {token}?", solution=f"It is {token}")
    assert filters.sft_verdict(sample, processor, 99) == "control_token"
    for encode in (data.encode_prompt, data.prompt_length):
        with pytest.raises(InputError, match="qid 'q7' has the control token") as error:
            encode(sample, processor)
        assert token in str(error.value)


@pytest.mark.parametrize("sides, question", [((), "2 + 2?"), ([(60, 90)], "How many?"), (
    [(60, 90), (28, 28), (200, 40)], "Is <image> like <image>, or <image>?")])
def test_encode_prompt_is_the_processors_own_call(processor, sides, question):
    images = tuple(Image.effect_noise(side, 50).convert("RGB") for side in sides)
    sample = Sample(qid="1", question=question, images=images)
    found, text = data.encode_prompt(sample, processor), data.chat_text(sample, processor)
    expected = processor(text=[text], images=list(images) or None, return_tensors="pt")
    assert found.input_ids == expected["input_ids"][0].tolist()
    for ours, theirs in ((found.pixel_values, "pixel_values"), (found.grid_thw, "image_grid_thw")):
        assert torch.equal(ours, expected[theirs]) if images else ours is None


def test_encode_prompt_by_hand(processor, tmp_path):
    """480 x 640: 480 / 28 = 17.14 -> 17 x 28 = 476, 640 / 28 = 22.86 -> 23 x 28 = 644; 476 x 644 <= 802816.
    476 / 14 = 34 and 644 / 14 = 46 patches: 34 x 46 = 1564; four are a token: 17 x 23 = 391."""
    sample = Sample(qid="1", question="How many?", images=(picture(tmp_path / "a.png", 640, 480),))
    prompt = data.encode_prompt(sample, processor)
    assert prompt.grid_thw.tolist() == [[1, 34, 46]] and prompt.input_ids.count(processor.image_token_id) == 391
    assert prompt.pixel_values.shape == (1564, 3 * 2 * 14 * 14) and prompt.pixel_values.dtype == torch.float32
    assert prompt.position_ids.shape == (3, len(prompt.input_ids)) and prompt.sample is sample
    assert processor.tokenizer.decode(prompt.input_ids).endswith("How many?<|im_end|>\n<|im_start|>assistant\n")


def test_text_prompt_has_no_image(processor):
    prompt = data.encode_prompt(Sample(qid="1", question="2 + 2?"), processor)
    assert prompt.pixel_values is None and prompt.grid_thw is None
    assert prompt.position_ids.tolist() == [list(range(len(prompt.input_ids)))] * 3


def test_mrope_positions_by_hand():
    """Two texts around 4 x 6 patches, merged to 2 rows x 3 columns: from 2 on, 3 long, so text goes on at 5."""
    positions = data.mrope_positions([1, 1, 9, 9, 9, 9, 9, 9, 1, 1], torch.tensor([[1, 4, 6]]), 9, 2)
    assert positions.tolist() == [[0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
                                  [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
                                  [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("grids", [[], [[1, 4, 6]], [[1, 2, 2]], [[1, 6, 2], [1, 2, 8], [1, 34, 46]]])
def test_mrope_positions_equal_transformers(grids):
    with torch.device("meta"):
        model = Qwen2_5_VLModel(Qwen2_5_VLConfig(
            text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                             intermediate_size=16, vocab_size=16),
            vision_config=dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=16)))
    input_ids = [1, 2, 3]
    for _, height, width in grids:
        input_ids += [4] + [9] * (height * width // 4) + [5, 6]
    grid_thw = torch.tensor(grids) if grids else None
    ids = torch.tensor([input_ids])
    expected, _ = model.get_rope_index(ids, mm_token_type_ids=(ids == 9).int(), image_grid_thw=grid_thw)
    assert torch.equal(data.mrope_positions(input_ids, grid_thw, 9, 2), expected[:, 0])


@pytest.mark.parametrize("question, sizes", [
    ("How many?", []), ("How many?", [(640, 480)]), ("<image>How many?", [(1, 1)]), ("How many?", [(29, 3000)]),
    ("<image>Is <image> or <image>?", [(41, 43), (3000, 2000), (70, 14)])])
def test_prompt_length_equals_the_encoded_length(processor, tmp_path, question, sizes):
    images = tuple(picture(tmp_path / f"{i}.png", *size) for i, size in enumerate(sizes))
    sample = Sample(qid="1", question=question, images=images)
    assert data.prompt_length(sample, processor) == len(data.encode_prompt(sample, processor).input_ids)


def test_prompt_length_of_turned_and_of_pil_images(processor, tmp_path):
    for image in (rotated(tmp_path / "a.jpg", 301, 77), Image.new("L", (301, 77))):
        sample = Sample(qid="1", question="q", images=(image,))
        assert data.prompt_length(sample, processor) == len(data.encode_prompt(sample, processor).input_ids)


def test_prompt_length_reads_only_the_header(processor, tmp_path):
    """56 x 56 is 2 x 2 tokens, and the file ends after its header."""
    whole = picture(tmp_path / "whole.png", 56, 56)
    (tmp_path / "cut.png").write_bytes(open(whole, "rb").read()[:50])
    lengths = [data.prompt_length(Sample(qid="1", question="q", images=images), processor)
               for images in [(), (str(tmp_path / "cut.png"),)]]
    assert lengths[1] - lengths[0] == 4 + len(["<|vision_start|>", "<|vision_end|>"])


def test_drop_long_counts_and_names_the_longest(processor, tmp_path):
    """Each image of n x 28 by 28 pixels adds n tokens and its two brackets."""
    samples = [Sample(qid=f"q{n}", question="q", images=(picture(tmp_path / f"{n}.png", 28 * n, 28),))
               for n in (3, 50, 9, 60)]
    base = data.prompt_length(Sample(qid="", question="q"), processor) + 2
    lines = []
    assert filters.drop_long(samples, processor, base + 9, lines.append) == [samples[0], samples[2]]
    assert lines == [f"dropped 2 of 4 prompts, over {base + 9} tokens (the longest: qid q60 with {base + 60})"]
    with pytest.raises(InputError, match="no prompt is within 10 tokens .*q60.* raise --max_prompt "):
        filters.drop_long(samples, processor, 10, lines.append)


def test_solution_ends_with_the_end_token(processor):
    ids = data.encode_solution(Sample(qid="1", question="q", solution="### Step 1: two."), processor)
    assert processor.tokenizer.decode(ids) == "### Step 1: two.<|im_end|>"
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


# ---- buckets and batches
def numbered(count: int) -> list[Sample]:
    return [Sample(qid=f"q{i}", question=f"question {i}", answer=str(i)) for i in range(count)]


def bucket_qids(folder) -> dict:
    return {name: [json.loads(line)["qid"] for line in open(folder / f"{name}.jsonl")]
            for name in ("easy", "medium", "hard")}


def test_each_question_is_in_exactly_one_bucket(tmp_path):
    counts = {"q0": 8, "q1": 0, "q2": 1, "q3": 7, "q4": 8}
    assert data.write_buckets(str(tmp_path), numbered(5), counts, 8) == {"easy": 2, "medium": 2, "hard": 1}
    assert bucket_qids(tmp_path) == {"easy": ["q0", "q4"], "medium": ["q2", "q3"], "hard": ["q1"]}
    assert [json.loads(line)["correct"] for line in open(tmp_path / "medium.jsonl")] == [1, 7]


def test_second_run_replaces_the_first(tmp_path):
    data.write_buckets(str(tmp_path), numbered(2), {"q0": 4, "q1": 0}, 4)
    data.write_buckets(str(tmp_path), numbered(2), {"q0": 0, "q1": 2}, 4)
    assert bucket_qids(tmp_path) == {"easy": [], "medium": ["q1"], "hard": ["q0"]}
    assert sorted(os.listdir(tmp_path)) == ["easy.jsonl", "hard.jsonl", "medium.jsonl"]


def test_interrupted_run_leaves_the_old_buckets(tmp_path, monkeypatch):
    """One rename replaces all three."""
    def write_buckets(counts):
        with replaced_folder(str(folder)) as writing:
            data.write_buckets(writing, numbered(2), counts, 4)

    calls, folder = [], tmp_path / "sample"
    write_buckets({"q0": 4, "q1": 0})

    def full_disk(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("No space left on device")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        write_buckets({"q0": 0, "q1": 2})
    assert bucket_qids(folder) == {"easy": ["q0"], "medium": [], "hard": ["q1"]}
    monkeypatch.undo()
    write_buckets({"q0": 4, "q1": 4})      # what the other run left does not get in
    assert bucket_qids(folder) == {"easy": ["q0", "q1"], "medium": [], "hard": []}


def test_buckets_round_trip_to_equal_samples(tmp_path):
    source = tmp_path / "data" / "train.json"
    source.parent.mkdir()
    write(source, [GOOD | {"qid": "x", "images": ["i/1.png", "/abs/2.png"], "key_words": ["red", "é"],
                           "choices": ["2", "3"]},
                   {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "### s"}],
                    "answer": "s", "image": "../3.png"}])
    samples = data.load_samples(str(source))
    data.write_buckets(str(tmp_path / "run" / "sample"), samples, {"x": 1, "2": 1}, 2)
    assert data.load_samples(str(tmp_path / "run" / "sample" / "medium.jsonl")) == samples
    first = json.loads(open(tmp_path / "run" / "sample" / "medium.jsonl").readline())
    assert first["images"][0] == "../../data/i/1.png"


def test_images_of_hub_sets_become_files_beside_the_buckets(tmp_path):
    image = png(8, 9)
    samples = [Sample(qid="a/b", question="q", answer="a", images=(image, image)),
               Sample(qid="2", question="q", answer="a", images=(image,))]
    data.write_buckets(str(tmp_path), samples, {"a/b": 2, "2": 2}, 2)
    first, second = data.load_samples(str(tmp_path / "easy.jsonl"))
    assert first.images == second.images * 2 and len(os.listdir(tmp_path / "images")) == 1
    assert data.load_image(first.images[0]).tobytes() == data.load_image(image).tobytes()


def test_batches_cover_each_epoch_and_drop_the_last_partial_one():
    """10 samples x 2 epochs = 20 indices: 6 batches of 3, and 2 left over."""
    result = data.batches(10, 3, epochs=2, seed=0)
    flat = [index for batch in result for index in batch]
    assert [len(batch) for batch in result] == [3] * 6
    assert sorted(flat[:10]) == list(range(10)) and len(set(flat[10:])) == 8
    assert flat[:10] != flat[10:]


def test_batch_order_depends_on_seed_and_epoch_only():
    flat = [index for batch in data.batches(12, 4, epochs=3, seed=5) for index in batch]
    assert flat[:24] == [index for batch in data.batches(12, 6, epochs=2, seed=5) for index in batch]
    assert flat[:12] != data.batches(12, 12, epochs=1, seed=6)[0]
    assert flat[12:24] != data.batches(12, 12, epochs=1, seed=6)[0]        # epoch 1 of seed 5 is not epoch 0 of seed 6


def test_less_than_one_batch_is_refused():
    assert len(data.batches(5, 10, epochs=2, seed=0)) == 1
    with pytest.raises(InputError, match="5 questions x 1 epochs do not fill one batch of 10"):
        data.batches(5, 10, epochs=1, seed=0)
