"""Model and CLIP folders as people have them: what is exported beside the weights, and what is refused in one line."""
import json
import os
import re
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import demo
from data import InputError
from engine.clip import load_clip
from engine.plan import shape_of
from engine.policy import Policy
from engine.weights import export, load_processor, other_files
from plumbing.flags import check_sampling
from test_rewards import FG_CONFIG, OPEN_CLIP, fg_clip_shapes
from train import Config, read_config

GONE, FOLDER = "GONE", "FOLDER"  # what a case may make of a file or of a setting
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# ------------------------------------------------------------------------------- folders that are good


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write(path, content):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)


@pytest.fixture(scope="session")
def flat_folder(tiny_folder, tmp_path_factory):
    """The tiny model in the files that the hub has for Qwen2.5-VL, which transformers 4 has written."""
    folder = str(tmp_path_factory.mktemp("flat"))
    ours, tokenizer = read(f"{tiny_folder}/config.json"), read(f"{tiny_folder}/tokenizer.json")
    text, vision, rope = ours["text_config"], ours["vision_config"], ours["text_config"]["rope_parameters"]
    kept = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "hidden_act max_position_embeddings rms_norm_eps bos_token_id eos_token_id initializer_range").split()
    tokens = "image_token_id video_token_id vision_start_token_id vision_end_token_id tie_word_embeddings".split()
    shape = "depth hidden_size intermediate_size num_heads out_hidden_size patch_size spatial_merge_size window_size " \
            "fullatt_block_indexes temporal_patch_size hidden_act tokens_per_second"
    write(f"{folder}/config.json", {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "float16",
        **{key: text[key] for key in kept}, **{key: ours[key] for key in tokens}, "transformers_version": "4.41.2",
        "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "vision_config": {"in_chans": 3, **{key: vision[key] for key in shape.split()}}})
    write(f"{folder}/vocab.json", tokenizer["model"]["vocab"])
    with open(f"{folder}/merges.txt", "w", encoding="utf-8") as file:
        file.write("".join(" ".join(merge) + "\n" for merge in tokenizer["model"]["merges"]))
    added = {token.pop("id"): token for token in tokenizer["added_tokens"]}
    write(f"{folder}/tokenizer_config.json", {
        "added_tokens_decoder": added, "additional_special_tokens": ["<|im_start|>", *demo.VISION_TOKENS],
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"})
    write(f"{folder}/preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": MEAN, "image_std": STD, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor"})
    write(f"{folder}/chat_template.json", {"chat_template": demo.CHAT_TEMPLATE})
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        os.symlink(f"{tiny_folder}/{name}", f"{folder}/{name}")  # as the hub's cache has them
    return folder


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory):
    """A tiny open_clip model and a tiny FG-CLIP."""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("open", "fg")}
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**OPEN_CLIP).state_dict(), f"{folders['open']}/open_clip_model.safetensors")
    write(f"{folders['open']}/open_clip_config.json",
          {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    save_file({name: torch.randn(shape) * 0.3 for name, shape in fg_clip_shapes().items()},
              f"{folders['fg']}/model.safetensors")
    write(f"{folders['fg']}/config.json", FG_CONFIG)
    write(f"{folders['fg']}/preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    return folders


@pytest.fixture(scope="session")
def bases(tiny_folder, flat_folder, clip_folders):
    return {"new": tiny_folder, "flat": flat_folder, **clip_folders}


def changed(base: str, file: str, change, folder) -> str:
    """A copy of a folder with one file changed: its bytes, settings by their dotted names, tensors, or gone."""
    for name in set(os.listdir(base)) - {file}:
        os.symlink(os.path.join(base, name), folder / name)
    path = folder / file
    if isinstance(change, dict):
        content = read(os.path.join(base, file))
        for name, value in change.items():
            *parts, last = name.split(".")
            part = content
            for key in parts:
                part = part[key]
            part.pop(last, None) if value == GONE else part.update({last: value})
        write(path, content)
    elif callable(change):
        tensors = load_file(os.path.join(base, file))
        change(tensors)
        save_file(tensors, path)
    elif change == FOLDER:
        path.mkdir()
    elif change != GONE:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    return str(folder)


# ------------------------------------------------------------------------------- what is exported


def test_an_export_keeps_every_file_but_number_type_and_pixel_limits(bases, processes, tmp_path):
    """Of either generation of files, each stays byte for byte or setting for setting, and none is added."""
    for name in ("flat", "new"):
        base = tmp_path / name
        base.mkdir()
        changed(bases[name], "README.md", "# a model\n", base)
        for odd in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", ".hidden", "modeling.py"):
            (base / odd).write_text("{}")
        (base / ".cache").mkdir()
        processor = load_processor(str(base), 784, 12544)
        policy = Policy.load(str(base), processes[0], torch.float32, processes[1], torch.float32)
        export(str(tmp_path / "made" / name), policy, processor)
        kept = set(os.listdir(bases[name])) | {"README.md"}
        assert set(os.listdir(tmp_path / "made" / name)) == kept
        for file in kept - {"model.safetensors"}:
            before, after = (open(folder / file, "rb").read() for folder in (base, tmp_path / "made" / name))
            if file == "config.json":
                key = {"flat": "torch_dtype", "new": "dtype"}[name]
                assert json.loads(after) == json.loads(before) | {key: "bfloat16"}
            elif file == "preprocessor_config.json":
                assert json.loads(after) == json.loads(before) | {"min_pixels": 784, "max_pixels": 12544}
            elif file == "processor_config.json":
                expected = json.loads(before)
                expected["image_processor"]["size"] = {"shortest_edge": 784, "longest_edge": 12544}
                assert json.loads(after) == expected
            else:
                assert after == before, file
        assert not os.path.islink(tmp_path / "made" / name / "tokenizer.json")


@pytest.mark.parametrize("images, expected", [
    ({"size": {"shortest_edge": 1, "longest_edge": 2}}, {"size": {"shortest_edge": 784, "longest_edge": 12544}}),
    ({"min_pixels": 1, "max_pixels": 2}, {"min_pixels": 784, "max_pixels": 12544}),
])
def test_pixel_limits_are_written_where_they_have_stood(tiny_folder, processes, processor, tmp_path, images, expected):
    policy = Policy.load(tiny_folder, processes[0], torch.float32, processes[1], torch.float32)
    policy.files = {"config.json": b"{}", "preprocessor_config.json": json.dumps(images).encode()}
    export(str(tmp_path / "made"), policy, processor)
    assert read(tmp_path / "made" / "preprocessor_config.json") == expected


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_weights_that_are_not_finite_are_not_exported(policy, processor, tmp_path, number):
    with torch.no_grad():
        policy.model.language_model.norm.weight.to_local()[3] = float(number)
    with pytest.raises(InputError, match="nothing is exported to .* holds numbers that are not"):
        export(str(tmp_path / "model"), policy, processor)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- models that are bad
NORM, MLP, EMBEDDINGS = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


def with_number(number):
    return lambda tensor: tensor.flatten().index_fill(0, torch.tensor([3]), float(number)).view(tensor.shape)


def rows(base, file, *cases):
    """Cases of one file: (change, what the message says)."""
    return [(base, file, change, message) for change, message in cases]


def settings(base, file, message, prefix="", **values):
    """Cases of one file: each of these values of a setting, with the same message."""
    return [(base, file, {f"{prefix}{name}": value}, message) for name, given in values.items() for value in given]


TYPE, BAD = "config.json cannot be read: Strict", "config.json describes no model: |config.json says"
PATCHES = "its processor makes patches .* config.json wants"
TEST, NONE = "template fails on a test prompt: ", "no processor found that works"
WEIGHTS = "model.safetensors"
BAD_MODELS = [
    *rows("new", "config.json", ("{}", "is not that of"), ("[]", "config.json cannot be read: TypeError"),
          ("null", "config.json cannot be read"), ("", "config.json cannot be read: OSError"),
          ('{"model_type": "qwen', "cannot be read"), (b"\xff\xfe\0", "cannot be read"), ("5", "cannot be read"),
          (GONE, "has no config.json"), (FOLDER, "IsADirectoryError")),
    *settings("flat", "config.json", "model; supported is a model_type of qwen2_vl, qwen2_5_vl, qwen3_vl",
              model_type=["llama", "nobody", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen2_5_vl_text", 5, None]),
    *settings("flat", "config.json", "is missing, config.json says", model_type=["qwen3_vl"]),
    *settings("flat", "config.json", BAD, model_type=["qwen2_vl"]),
    *settings("flat", "config.json", TYPE, num_hidden_layers=["2", None, 2.5, -1], hidden_size=["128", None],
              intermediate_size=["x"], num_attention_heads=["4"], num_key_value_heads=["2"], vocab_size=["288"],
              hidden_act=[5, None], rms_norm_eps=["small", None], rope_scaling=[5], image_token_id=[None],
              tie_word_embeddings=["yes"], max_position_embeddings=["x"], attention_dropout=["x"],
              vision_config=[[], 5]),
    *settings("flat", "config.json", TYPE, "vision_config.", depth=["2"], hidden_size=["96"], num_heads=["4"],
              window_size=["x"], patch_size=["14"], fullatt_block_indexes=["all", None]),
    *settings("new", "config.json", TYPE, "text_config.",
              layer_types=[["full_attention"], ["full_attention", "half"], "full"]),
    *settings("flat", "config.json", BAD, num_hidden_layers=[0], hidden_size=[0, -128, 127, 64],
              intermediate_size=[0, -1], num_attention_heads=[0, 3, -4], num_key_value_heads=[0, 3, 8],
              hidden_act=["nobody"], rope_theta=["x"], torch_dtype=[5], rope_scaling=[{"type": "nobody"}],
              vision_config=[GONE]),
    *settings("flat", "config.json", BAD, "vision_config.", depth=[0, -1], hidden_size=[0, 90], num_heads=[0],
              intermediate_size=[0], out_hidden_size=[64, 0], hidden_act=["nobody"]),
    *settings("flat", "config.json", PATCHES, "vision_config.", patch_size=[0, 16, 7], spatial_merge_size=[0, 1, 3],
              temporal_patch_size=[0, 1]),
    *settings("new", "config.json", BAD, "text_config.rope_parameters.", rope_type=["nobody"]),
    *settings("flat", "config.json", "its tokenizer of 286 tokens is not that of", vocab_size=[0, -1, 10, 270]),
    *settings("flat", "config.json", "is not that of its config.json", image_token_id=[0, 10**6, -1, GONE]),
    *settings("flat", "config.json", "cannot be read: AttributeError", torch_dtype=["float99"]),
    *settings("flat", "config.json", "is missing, config.json says", num_hidden_layers=[3],
              tie_word_embeddings=[False, GONE]),
    *settings("flat", "config.json", "visual.blocks.2.* is missing", "vision_config.", depth=[3]),
    *settings("flat", "config.json", "no place for model.layers.1.input_layernorm.weight",
              num_hidden_layers=[1]),
    *settings("flat", "config.json", "no place for visual.blocks.1", "vision_config.", depth=[1]),
    *settings("flat", "generation_config.json", "has no eos_token_id", eos_token_id=[None]),
    *rows("flat", "generation_config.json", *[(text, "generation_config.json cannot be read")
                                              for text in ("[]", "{", "5", b"\xff", FOLDER)]),
    *rows("new", WEIGHTS, (GONE, r"in \*.safetensors .* is missing"), *[(text, "its weights cannot be read")
                                                      for text in (FOLDER, "", "text", b"\xff" * 100)],
          (b"\x08\0\0\0\0\0\0\0{}      ", "is missing"),
          (put(NORM, with_number("nan")), f"{NORM} holds numbers that are not finite"),
          (put(EMBEDDINGS, with_number("nan")), f"{EMBEDDINGS} holds numbers that"),
          (put(MLP, with_number("inf")), f"{MLP} holds numbers that are not finite"),
          (put(MLP, lambda tensor: tensor[:-1]), r"is \[255, 128\], config.json says \[256, 128\]"),
          (put(MLP, lambda tensor: tensor.T), r"is \[128, 256\]"), (put(MLP, lambda tensor: tensor[0, 0]), r"is \[\]"),
          (lambda tensors: tensors.pop(MLP), f"{MLP} is missing, config.json says"),
          (lambda tensors: tensors.update({"v_head.weight": tensors[MLP].clone()}), "no place for v_head.weight")),
    *rows("new", "tokenizer.json", *[(text, NONE) for text in ("{}", "[]", "{", "5", b"\xff", '{"model": 5}')],
          (GONE, "tokenizer of 8 tokens is not that of"), (FOLDER, "tokenizer of 8 tokens is not that of")),
    *rows("flat", "tokenizer_config.json", *[(text, NONE) for text in ("[]", "{", "5", b"\xff")]),
    *settings("flat", "tokenizer_config.json", NONE, tokenizer_class=[5], added_tokens_decoder=[5], eos_token=[5],
              padding_side=["up"]),
    *settings("flat", "tokenizer_config.json", TEST, model_max_length=["x"]),
    *rows("new", "chat_template.jinja", ("{% for %}", TEST + "TemplateSyntaxError"),
          ("{{ messages", TEST + "TemplateSyntaxError"),
          ("{{ raise_exception('no') }}", TEST + "TemplateError: no"), ("{{ 1 / 0 }}", TEST + "ZeroDivisionError"),
          ("{% for a in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
          ("{{ ''.__class__.__mro__ }}", TEST + "SecurityError"), ("{{ nobody() }}", TEST + "UndefinedError"),
          ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", TEST + "RecursionError"),
          ("{{ messages + 5 }}", TEST + "TypeError"),
          ("{{ strftime_now(5) }}", TEST + "TypeError"),
          ("{{ messages[7]['role'] }}", TEST + "UndefinedError"), ("", TEST), (b"\xff", NONE),
          ("{{ messages[0]['role'] }}", "is not that of"), (FOLDER, TEST),
          (demo.CHAT_TEMPLATE.replace("<|image_pad|>", "<|image_pad|>" * 2), TEST + "StopIteration"),
          (demo.CHAT_TEMPLATE.replace("{{ part['text'] }}", ""), "is not that of")),
    *rows("flat", "preprocessor_config.json", *[(text, NONE) for text in ("[]", "{", b"\xff", GONE, FOLDER)]),
    *settings("flat", "preprocessor_config.json", PATCHES, patch_size=[16, 7], merge_size=[1, 4],
              temporal_patch_size=[0, 1, 3]),
    *settings("flat", "preprocessor_config.json", TEST, patch_size=[0, "x"], merge_size=[0],
              image_mean=[[0.5] * 2, "x"], image_std=[[1.0] * 4], do_resize=[False], rescale_factor=["x"],
              resample=[99]),
    *settings("flat", "preprocessor_config.json", NONE, image_processor_type=["Nobody", 5]),
    *settings("flat", "preprocessor_config.json", TEST, processor_class=["Nobody"]),
]
# What loads and is meant to: an index is not read, since every *.safetensors is; our own limits replace the folder's.
GOOD_MODELS = [
    *rows("new", "model.safetensors.index.json", *[(text, "") for text in ("5", "{", '{"weight_map": {"a": 5}}')]),
    *rows("new", WEIGHTS, (put(MLP, torch.Tensor.double), ""), (put(MLP, torch.Tensor.half), ""),
          (lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDINGS].clone()}), "")),  # a tied head
    *settings("flat", "config.json", "", model_type=[GONE], max_position_embeddings=[0], eos_token_id=[GONE]),
    *settings("flat", "config.json", "", "vision_config.", fullatt_block_indexes=[[], [9]], in_chans=[1]),
    *settings("flat", "generation_config.json", "", temperature=["hot"]),
    *settings("flat", "preprocessor_config.json", "", min_pixels=["x"], size=[None, {}], processor_class=[GONE],
              image_processor_type=[GONE], do_convert_rgb=[False]),
    *rows("flat", "preprocessor_config.json", ("{}", "")),
]


def load_model(folder: str):
    """What train.py and eval.py do with a model's folder, in their order."""
    load_processor(folder, 784, 12544)
    shape_of(folder)
    return Policy.load(folder, "cpu", torch.float32)


def names(cases):
    return [re.sub(r"\W+", " ", f"{base} {file} {'tensor' if callable(change) else change}")[:70]
            for base, file, change, _ in cases]


def refused(load, folder: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    line = str(error.value).replace(folder, "F")
    assert "\n" not in line and len(line) < 420 and folder in str(error.value), line


@pytest.mark.parametrize("base, file, change, message", BAD_MODELS, ids=names(BAD_MODELS))
def test_a_bad_model_folder_is_one_line_that_names_it(bases, tmp_path, base, file, change, message):
    if file == "config.json" and change == GONE:  # a processor alone may be loaded, a model not
        return refused(lambda folder: Policy.load(folder, "cpu"), changed(bases[base], file, change, tmp_path), message)
    refused(load_model, changed(bases[base], file, change, tmp_path), message)


@pytest.mark.parametrize("base, file, change, _", GOOD_MODELS, ids=names(GOOD_MODELS))
def test_an_odd_model_folder_is_accepted(bases, tmp_path, base, file, change, _):
    load_model(changed(bases[base], file, change, tmp_path))


# ------------------------------------------------------------------------------- CLIPs that are bad
WORD, LAYER = "transformer.resblocks.0.mlp.c_fc.weight", "text_model.encoder.layers.0.mlp.fc1.weight"
OPEN, OPEN_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CANNOT = "open_clip cannot load it: "


def bad_tensors(name):
    return [(put(name, with_number("nan")), f"{name} holds numbers that are not finite"),
            (lambda tensors: tensors.pop(name), name), (put(name, lambda tensor: tensor[:-1]), f"{name}|size mismatch"),
            (lambda tensors: tensors.update(other=tensors[name].clone()), "other"),
            (b"\xff" * 100, "SafetensorError"), (FOLDER, "CLIP model")]


POSITIONS = "text_model.embeddings.position_embedding_res.weight"
BAD_CLIPS = [
    *rows("open", OPEN, *[(text, CANNOT) for text in ("{}", "[]", "{", "5", b"\xff")]),
    *settings("open", OPEN, CANNOT, model_cfg=[GONE, 5]),
    *settings("open", OPEN, CANNOT, "model_cfg.", vision_cfg=[GONE, "x", 5], text_cfg=[GONE], embed_dim=[8, 0, "x"]),
    *settings("open", OPEN, CANNOT, "model_cfg.vision_cfg.", layers=[0, 2, -1, "x"], width=[16, 0, 33, "x"],
              head_width=[5, 0, "x"], patch_size=[0, 7, 100], image_size=[0, "x"], nobody=[1]),
    *settings("open", OPEN, CANNOT, "model_cfg.text_cfg.", layers=[0, 2], width=[16], heads=[0, 3, "x"],
              context_length=[0, "x"], vocab_size=[5]),
    *settings("open", OPEN, CANNOT + "AssertionError", "preprocess_cfg.", interpolation=["nobody"],
              resize_mode=["nobody"], mode=["L"]),
    *rows("open", OPEN_WEIGHTS, *bad_tensors(WORD), (GONE, "weights .* could not be loaded")),
    *rows("fg", "config.json", *[(text, "download it again") for text in ("[]", "null", "{", "5", b"\xff")]),
    *settings("fg", "config.json", "download", "text_config.", num_hidden_layers=[3, "x"], hidden_size=[5, "wide", 0],
              num_attention_heads=[0, 3, "x"], hidden_act=["nobody"], intermediate_size=[3]),
    *settings("fg", "config.json", "download", "vision_config.", num_hidden_layers=[3, "x"], hidden_size=[5, 0],
              num_attention_heads=[0, 5], hidden_act=["nobody"], image_size=[0, 28, 84, "x"], patch_size=[0, 7]),
    *settings("fg", "config.json", "Unexpected key", "text_config.", num_hidden_layers=[0, 1]),
    *settings("fg", "config.json", "Unexpected key", "vision_config.", num_hidden_layers=[0, 1]),
    *settings("fg", "config.json", "download", text_config=["x"], projection_dim=[5]),
    *rows("fg", "preprocessor_config.json", ("[]", "download"), ("{", "download")),
    *rows("fg", WEIGHTS, *bad_tensors(LAYER), (GONE, "neither an open_clip model"),
          (put(POSITIONS, lambda tensor: tensor[0, 0]), "TypeError")),
]
# The weights do not say how many heads there are, and one number as mean is that of all three colours.
GOOD_CLIPS = [
    *settings("open", OPEN, "", "model_cfg.vision_cfg.", head_width=[8]),
    *settings("open", OPEN, "", "preprocess_cfg.", mean=[[0.5], None], size=["x"]),
]


@pytest.mark.parametrize("base, file, change, message", BAD_CLIPS, ids=names(BAD_CLIPS))
def test_a_bad_clip_folder_is_one_line_that_names_it(bases, tmp_path, base, file, change, message):
    refused(lambda folder: load_clip(folder, "cpu"), changed(bases[base], file, change, tmp_path), message)


@pytest.mark.parametrize("base, file, change, _", GOOD_CLIPS, ids=names(GOOD_CLIPS))
def test_an_odd_clip_folder_is_accepted(bases, tmp_path, base, file, change, _):
    load_clip(changed(bases[base], file, change, tmp_path), "cpu")


# ------------------------------------------------------------------------------- flags that are bad
NUMBERS = [name for name, kind in Config.__annotations__.items() if kind in (int, float)]
NUMBERS += [name for name, kind in Config.__mro__[1].__annotations__.items() if kind in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_or_out_of_range_is_one_line(name):
    given = Config(stage="1", keyword_weight=1.0)
    check_sampling(given)
    for value in (float("nan"), -1, 1e10, float("inf")):
        with pytest.raises(InputError, match=f"^--{name} {value} is not in .*$"):
            check_sampling(replace(given, **{name: value}))
    with pytest.raises(InputError, match=f"^argument --{name}: invalid .* value: 'ten'$"):
        read_config(["--stage", "1", "--model", ".", "--data", ".", f"--{name}", "ten"])


def test_files_beside_the_weights_are_neither_hidden_nor_huge(tmp_path):
    (tmp_path / "small.txt").write_text("x")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(65_000_000)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert other_files(str(tmp_path)) == {"small.txt": b"x"}
