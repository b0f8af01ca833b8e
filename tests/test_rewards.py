"""The five rewards, their sum, and the CLIP models: FG-CLIP under its own names, open_clip folders, missing ones."""
import ast
import json
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

import rewards
from data import InputError, Sample, parse
from engine import clip

pytestmark = pytest.mark.fast


GOOD = "### Image Description: {} ### Rationales: r ### Step 1: s ### The final answer is: {}"


def sample(answer="7", key_words=("red", "circle"), images=()):
    return Sample("q", "how many?", images, answer, key_words)


# ---------------------------------------------------------------- the five parts


def table(function) -> list[tuple]:
    """Rows (arguments, score) of the docstring's table, whose lines read `argument, argument -> score`.

    Python 3.13 strips their indentation, those before it do not."""
    rows = re.findall(r"^ *(.+?) +-> (\d\.\d+)$", function.__doc__, re.MULTILINE)
    assert len(rows) in (3, 4)
    return [(ast.literal_eval(f"({arguments},)"), float(score)) for arguments, score in rows]


@pytest.mark.parametrize("arguments, expected", [
    *table(rewards.clip_reward), ((0.0, 0.4), 0.0), ((0.3, 0.4), 0.75), ((0.9, 0.4), 1.0)])
def test_clip_reward_table(arguments, expected):
    cosine, target = arguments
    assert rewards.clip_reward(torch.tensor([cosine]), target).item() == pytest.approx(expected)


@pytest.mark.parametrize("arguments, expected", [
    *table(rewards.keyword_reward), (("a circle that is red", ("red circle",)), 0.0), (("", ("red",)), 0.0)])
def test_keyword_reward_table(arguments, expected):
    assert rewards.keyword_reward(*arguments) == expected


@pytest.mark.parametrize("arguments, expected", [
    *table(rewards.format_reward),
    (("### Image Description: a ### Rationales: b ### Step 2: c ### The final answer is: 7",), 0.0),
    (("### Image Description: a ### Step 1: c ### The final answer is: 7",), 0.0),
    (("### Image Description: a ### Rationales: b ### Step 1: c",), 0.0)])
def test_format_reward_table(arguments, expected):
    assert rewards.format_reward(parse(*arguments)) == expected


@pytest.mark.parametrize("arguments, expected", [*table(rewards.length_reward), ((0, 512), 1.0), ((512, 512), 1.0)])
def test_length_reward_table(arguments, expected):
    assert rewards.length_reward(*arguments) == expected


@pytest.mark.parametrize("arguments, expected", [
    *table(rewards.accuracy_reward), (("### The final answer is: 50%", "1/2"), 1.0),
    (("### The final answer is: (B) 30°", "B"), 1.0),
    (("### The final answer is: 7 ### The final answer is: 8", "7"), 0.0)])
def test_accuracy_reward_table(arguments, expected):
    response, gold = arguments
    assert rewards.accuracy_reward(parse(response).answer, sample(gold)) == expected


@pytest.mark.parametrize("text, key_word, found", [
    ("rendered", "red", False), ("red-hot", "red", True), ("(red)", "red", True), ("RED", "red", True),
    ("a red\n circle", "Red  Circle", True), ("a red blue circle", "red circle", False), ("17", "7", False),
    ("7.5 cm", "7", False), ("it is 7.", "7", True), ("50%", "50%", True), ("x = a.b", "a.b", True),
    ("axb", "a.b", False), ("(+", "(+", True), ("C++ code", "C++", True), ("30°", "30", True), ("red", "", False),
    ("一个红色圆形", "红色", True), ("一个red圆形", "red", True), ("一个rendered圆形", "red", False),
    ("赤い円があります", "赤い円", True),
    ("มีวงกลมสีแดง", "วงกลม", True), ("빨간색을 칠한다", "빨간색", True), ("10,000 cubes", "10,000", True),
    ("10,000 cubes", "10", False), ("10,000 cubes", "000", False), ("1,234,567", "234", False), ("1,2,3", "2", True),
    ("cafe\u0301", "café", True), ("café", "cafe\u0301", True), ("Tom’s", "tom's", True), ("１０ cm", "10", True),
    ("r\u200bed", "red", True), ("red\u200bcircle", "red", False),             # what is not seen parts no words
])
def test_key_words_are_whole_words_and_never_patterns(text, key_word, found):
    assert rewards.keyword_reward(text, (key_word,)) == float(found)


def test_key_words_count_once():
    assert rewards.keyword_reward("red red red", ("red", "RED", "red ", "blue")) == 0.5
    assert rewards.keyword_reward("red", ()) == 0.0


# ---------------------------------------------------------------- the weighted sum


def test_score_is_the_weighted_sum_of_the_parts():
    responses = [GOOD.format("a red circle", 7), GOOD.format("red", 8), "no sections", GOOD.format("a circle", "7.0")]
    weights = {"keyword": 0.4, "format": 0.1, "length": 0.1, "accuracy": 0.4}
    total, parts = rewards.score([sample("7"), sample("7")], responses, [10, 1024, 10, 512], weights, None)
    assert parts["clip"].tolist() == [0, 0, 0, 0]
    assert parts["keyword"].tolist() == [1, 0.5, 0, 0.5]
    assert parts["format"].tolist() == [1, 1, 0, 1]
    assert parts["length"].tolist() == [1, 0.5, 1, 1]
    assert parts["accuracy"].tolist() == [1, 0, 0, 1]
    # .4 + .1 + .1 + .4;  .2 + .1 + .05;  .1;  .2 + .1 + .1 + .4
    torch.testing.assert_close(total, torch.tensor([1.0, 0.35, 0.1, 0.8]))
    assert set(parts) == {"clip", "keyword", "format", "length", "accuracy"}


def test_score_pairs_responses_with_questions_group_by_group():
    samples = [sample("1"), sample("2"), sample("3")]
    responses = [GOOD.format("x", answer) for answer in (1, 2, 2, 3, 3, 3)]
    total, _ = rewards.score(samples, responses, [1] * 6, {"accuracy": 1.0}, None)
    assert total.tolist() == [1, 0, 1, 0, 1, 1]


def test_score_of_no_question_is_empty(scorer):
    total, parts = rewards.score([], [], [], {"clip": 0.5, "format": 0.5}, scorer)
    assert total.shape == (0,) and all(part.shape == (0,) for part in parts.values())


def test_keyword_scope_response_looks_in_the_whole_response():
    responses = ["### Image Description: red ### Rationales: a circle"]
    for scope, expected in (("description", 0.5), ("response", 1.0)):
        assert rewards.score([sample()], responses, [1], {"keyword": 1.0}, None, keyword_scope=scope)[0] == expected


def test_a_clip_weight_without_a_scorer_is_refused():
    with pytest.raises(AssertionError, match="no scorer"):
        rewards.score([sample()], ["x"], [1], {"clip": 0.4}, None)


@pytest.mark.parametrize("response, keyword, form, accuracy", [
    ("", 0, 0, 0),
    ("red circle 7", 0, 0, 0),                                                             # no section
    ("### Image Description: ### Rationales: ### Step 1: ### The final answer is:", 0, 1, 0),       # headers only
    ("red circle " + GOOD.format("a square", 8), 0, 1, 0),                                 # stuffed before the format
    (GOOD.format("a square ### Notes: red circle", 8), 0, 1, 0),                           # below an unknown header
    (GOOD.format("a square", 8) + " red circle", 0, 1, 0),                                 # in the answer
    ("### Image Description: a square " + GOOD.format("red circle", 8), 0, 1, 0),          # in a second description
    (GOOD.format("red circle red circle", 8), 1, 1, 0),                                    # repeated: counts once
    (GOOD.format("redcircle", 8), 0, 1, 0),
    (GOOD.format("x", 7) + " ### The final answer is: 8", 0, 1, 0),                        # two different answers
    (GOOD.format("x", "7 or 8"), 0, 1, 0),
    (GOOD.format("x", "1, 2, 3, 4, 5, 6, 7"), 0, 1, 0),
    ("### The final answer is 7", 0, 0, 1),                                                # right, but nothing else
    ("### Rationales: r ### Step 1: s ### The final answer is: 7 ### Image Description: red circle", 0, 0, 1),  # behind
    ("### The final answer is: 7 " + GOOD.format("red circle", 7), 0, 0, 1),               # answered before it was seen
    ("### Image Description: a ### The final answer is: 7 ### Rationales: r ### Step 1: s", 0, 0, 1),
    (GOOD.format("x ### Image Description: red circle", 8), 0, 1, 0),                      # a repeated header
    (GOOD.format("red\u200bcircle", 8), 0, 1, 0),                                         # parted by nothing seen
    (GOOD.format("x", "7 ### The final answer is: **7**"), 0, 1, 1),                       # the same answer twice
    ("###\u200bImage Description：a ###\ufeffRationales: r ### Step 1：s ### The final answer is：７", 0, 1, 1),
])
def test_adversarial_responses(response, keyword, form, accuracy):
    _, parts = rewards.score([sample()], [response], [1], {}, None)
    assert [parts[name].item() for name in ("keyword", "format", "accuracy")] == [keyword, form, accuracy]


@pytest.mark.parametrize("description, read", [
    ("a <end_of_text> b", "a end_of_text b"), ("a <END_OF_TEXT>b", "a END_OF_TEXT b"),
    ("a <|endoftext|> b", "a |endoftext| b"),
    ("a &lt;end_of_text&gt; b", "a end_of_text b"), ("&amp;amp;lt;end_of_text> b", "end_of_text b"),
    ("＜end_of_text＞", "end_of_text"), ("ï¼œend_of_textï¼ž", "end_of_text"), ("<end\x00_of_text>", "end_of_text"),
    ("<end_<end_of_text>of_text> b", "end_ end_of_text of_text b"), ("a </s> [SEP] b", "a /s b"),
    ("black &amp; white", "black & white"), ("a red\n circle", "a red circle"), ("", ""), (None, ""), ("\ud800", "�"),
])
def test_clip_reads_no_control_tokens(description, read):
    """open_clip's tokenizer finds its end token in most of these, and in none of what is read of them."""
    tokenizer = open_clip.SimpleTokenizer()
    assert rewards.caption(description) == read
    assert tokenizer.eot_token_id not in tokenizer.encode(rewards.caption(description))


# ---------------------------------------------------------------- an open_clip folder

OPEN_CLIP = {
    "embed_dim": 16, "vision_cfg": {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**OPEN_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": statistics}))
    return str(folder)


@pytest.fixture(scope="module")
def scorer(open_clip_folder):
    return clip.load_clip(open_clip_folder, "cpu")


def image(colour, size=(28, 28)):
    return Image.new("RGB", size, colour)


def cosine(scorer, picture, text):
    """One image, one text, by hand: the folder above asks for (value / 255 - 0.5) / 0.5."""
    pixels = torch.tensor(picture.getpixel((0, 0))).view(1, 3, 1, 1).expand(1, 3, 28, 28) / 255
    with torch.no_grad():
        image_vector = scorer.model.encode_image((pixels - 0.5) / 0.5)
        text_vector = scorer.model.encode_text(open_clip.SimpleTokenizer(context_length=12)([text]))
    return F.cosine_similarity(image_vector, text_vector).item()


def test_clip_scorer_cosines_are_those_of_single_pairs(scorer, monkeypatch):
    monkeypatch.setattr(clip, "CHUNK", 2)                             # several chunks
    red, blue = image("red"), image("blue", (56, 28))                    # 56 x 28 is squashed, not cut
    texts = ["a red square", "a blue square", "a red square", "something else", None, "  "]
    cosines = scorer.score([[red], [blue], [red, blue]], texts)
    expected = [cosine(scorer, red, texts[0]), cosine(scorer, red, texts[1]), cosine(scorer, blue, texts[2]),
                cosine(scorer, blue, texts[3]), 0, 0]
    torch.testing.assert_close(cosines, torch.tensor(expected))


def test_clip_scorer_averages_over_the_images_of_a_question(scorer):
    red, blue = image("red"), image("blue")
    expected = (cosine(scorer, red, "a square") + cosine(scorer, blue, "a square")) / 2
    assert scorer.score([[red, blue], []], ["a square", "a square"]).tolist() == pytest.approx([expected, 0])


def test_an_empty_description_has_no_clip_reward(scorer, tmp_path):
    assert scorer.score([[image("red")]], ["", None]).tolist() == [0, 0]
    responses = [GOOD.format("", 7), "no description", GOOD.format("a red square", 7)]
    path = str(tmp_path / "red.png")
    image("red").save(path)
    _, parts = rewards.score([sample(images=(path,))], responses, [1, 1, 1], {"clip": 1.0}, scorer)
    assert parts["clip"][:2].tolist() == [0, 0]
    assert parts["clip"][2] == rewards.clip_reward(torch.tensor(cosine(scorer, image("red"), "a red square")), 0.4)


def test_nothing_in_a_description_hides_what_follows_it(scorer):
    """Before, a text behind the end token changed nothing of what CLIP saw."""
    ends = ("<end_of_text>", "&lt;end_of_text&gt;", "＜end_of_text＞")
    texts = [f"a square {end} {more}" for end in ends for more in ("", "red circle")]
    raw, read = (scorer.score([[image("red")]], described).view(3, 2)
                 for described in (texts, list(map(rewards.caption, texts))))
    assert (raw[:, 0] == raw[:, 1]).all() and (read[:, 0] != read[:, 1]).all()


def test_each_image_and_each_different_description_is_encoded_once(scorer, monkeypatch):
    seen = {"encode_image": 0, "encode_text": 0}
    for name in seen:
        encode = getattr(scorer.model, name)

        def count(batch, name=name, encode=encode):
            seen[name] += len(batch)
            return encode(batch)
        monkeypatch.setattr(scorer.model, name, count)
    scorer.score([[image("red")], [image("blue"), image("green")]], ["a", "a", "b", "a", "", "b", "a", "b"])
    assert seen == {"encode_image": 3, "encode_text": 2}


def test_clip_is_frozen_and_in_fp32(scorer):
    assert all(not weight.requires_grad and weight.dtype == torch.float32 for weight in scorer.model.parameters())
    assert not scorer.model.training
    assert not scorer.score([[image("red")]], ["a"]).requires_grad


def test_long_text_is_cut_with_the_end_token_kept(scorer):
    tokens = scorer.tokenize(["word " * 50])
    assert tokens.shape == (1, 12) and tokens[0, 0] == 49406 and tokens[0, -1] == 49407


# ---------------------------------------------------------------- FG-CLIP

VOCAB, LENGTH, TEXT, IMAGE, DIM, HEADS = 49408, 30, 32, 48, 16, 2        # LENGTH is 248 in the real model
FG_CONFIG = {
    "model_type": "clip", "auto_map": {"AutoModel": "modeling_fgclip.FGCLIPModel"}, "projection_dim": DIM,
    "text_config": dict(hidden_size=TEXT, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS,
                        vocab_size=VOCAB, hidden_act="quick_gelu", projection_dim=DIM),
    "vision_config": dict(hidden_size=IMAGE, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
                          image_size=42, patch_size=14, hidden_act="quick_gelu", projection_dim=DIM),
}


def fg_clip_shapes() -> dict[str, tuple]:
    """The tensors of an FG-CLIP v1 file: those of a transformers CLIPModel, and what its authors added."""
    with torch.device("meta"):
        weights = CLIPModel(CLIPConfig(**FG_CONFIG)).state_dict()
    return {name: tuple(weight.shape) for name, weight in weights.items()} | {
        "text_model.embeddings.position_embedding_ori.weight": (LENGTH, TEXT),
        "text_model.embeddings.position_embedding_res.weight": (LENGTH, TEXT),
        "text_filip_projection.weight": (DIM, TEXT), "logit_scale_finegraind": (), "logit_scale_hardneg": (),
    }


@pytest.fixture(scope="module")
def fg_clip_weights():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in fg_clip_shapes().items()}


@pytest.fixture(scope="module")
def fg_clip_folder(tmp_path_factory, fg_clip_weights):
    folder = tmp_path_factory.mktemp("fg_clip")
    (folder / "config.json").write_text(json.dumps(FG_CONFIG))
    names = sorted(fg_clip_weights)                                      # two files, as a large model comes
    save_file({name: fg_clip_weights[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: fg_clip_weights[name] for name in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    (folder / "preprocessor_config.json").write_text("{}")                # CLIP's own mean and std
    return folder


def fg_clip_long_text(weights, ids):
    """FG-CLIP's long-text forward in plain tensor operations: ids (texts, LENGTH) -> unit vectors (texts, DIM)."""
    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return centred * scale * weights[name + ".weight"] + weights[name + ".bias"]

    def heads(x):
        return x.unflatten(-1, (HEADS, TEXT // HEADS)).transpose(1, 2)   # (B, heads, L, d)

    is_original = (torch.arange(LENGTH) < 20).float()[:, None]
    embeddings = "text_model.embeddings."
    x = weights[embeddings + "token_embedding.weight"][ids]
    x = x + weights[embeddings + "position_embedding_ori.weight"] * is_original
    x = x + weights[embeddings + "position_embedding_res.weight"] * (1 - is_original)
    future = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    for i in range(2):
        layer = f"text_model.encoder.layers.{i}."
        y = norm(x, layer + "layer_norm1")
        q, k, v = (heads(linear(y, f"{layer}self_attn.{letter}_proj")) for letter in "qkv")
        attention = (q @ k.transpose(-1, -2) / (TEXT // HEADS) ** 0.5 + future).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), layer + "self_attn.out_proj")
        y = linear(norm(x, layer + "layer_norm2"), layer + "mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), layer + "mlp.fc2")
    ends = torch.tensor([row.index(49407) for row in ids.tolist()])      # the first end token
    pooled = norm(x, "text_model.final_layer_norm")[torch.arange(len(ids)), ends]
    return F.normalize(pooled @ weights["text_filip_projection.weight"].T, dim=-1)


def test_fg_clip_texts_equal_its_long_text_forward(fg_clip_weights, fg_clip_folder):
    scorer = clip.load_clip(str(fg_clip_folder), "cpu")
    texts = ["a cat", "a red circle above a blue square " * 2, "one two three " * 30]   # below 20, above 20, cut
    ids = scorer.tokenize(texts)                                         # (3, LENGTH)
    assert ids.shape == (3, LENGTH) and ids[2, -1] == 49407
    # FG-CLIP pads with end tokens, open_clip with zeros: nothing after the first end token may matter.
    padded = ids.masked_fill(ids == 0, 49407)
    expected = fg_clip_long_text(fg_clip_weights, padded)
    torch.testing.assert_close(scorer.encode(texts, scorer.tokenize, scorer.model.encode_text), expected)


def test_fg_clip_images_equal_transformers_clip(fg_clip_weights, fg_clip_folder):
    scorer = clip.load_clip(str(fg_clip_folder), "cpu")
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**FG_CONFIG["vision_config"])).eval()
    vision = {name: weight for name, weight in fg_clip_weights.items() if name.startswith("vis")}
    assert not model.load_state_dict(vision, strict=False).missing_keys
    picture = Image.effect_noise((90, 50), 60).convert("RGB")
    # Squashed to 42 x 42, then CLIP's mean and std.
    pixels = torch.from_numpy(np.array(picture.resize((42, 42), Image.BICUBIC))).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = F.normalize(model(((pixels - mean) / std)[None]).image_embeds, dim=-1)
    torch.testing.assert_close(scorer.encode([picture], scorer.pixels, scorer.model.encode_image), expected)


def test_fg_clip_uses_the_mean_and_std_of_its_own_preprocessor(fg_clip_folder, tmp_path):
    for file in fg_clip_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.0, 0.0, 0.0], "image_std": [0.5, 0.5, 0.5]}')
    pixels = clip.load_clip(str(tmp_path), "cpu").pixels([image("white")])
    torch.testing.assert_close(pixels, torch.full((1, 3, 42, 42), 2.0))


@pytest.fixture(scope="module")
def fg_clip_model(fg_clip_weights):
    return clip.fg_clip_model(CLIPConfig(**FG_CONFIG), LENGTH)


@pytest.mark.parametrize("name", sorted(set(fg_clip_shapes()) - clip.FG_CLIP_UNUSED))
def test_fg_clip_names_a_missing_or_wrongly_shaped_tensor(name, fg_clip_weights, fg_clip_model):
    missing = {key: weight for key, weight in fg_clip_weights.items() if key != name}
    with pytest.raises((KeyError, RuntimeError), match=re.escape(name)):
        fg_clip_model.load_state_dict(clip.fg_clip_state(missing))
    with pytest.raises(RuntimeError, match="size"):
        fg_clip_model.load_state_dict(clip.fg_clip_state(fg_clip_weights | {name: torch.zeros(5, 3)}))


def test_fg_clip_names_an_unknown_tensor_and_needs_no_short_path(fg_clip_weights, fg_clip_model):
    with pytest.raises(RuntimeError, match="box_head.weight"):
        fg_clip_model.load_state_dict(clip.fg_clip_state(fg_clip_weights | {"box_head.weight": torch.zeros(1)}))
    needed = {name: weight for name, weight in fg_clip_weights.items() if name not in clip.FG_CLIP_UNUSED}
    fg_clip_model.load_state_dict(clip.fg_clip_state(needed))


# ---------------------------------------------------------------- what cannot be loaded


def refused(name, match):
    with pytest.raises(InputError, match=match) as caught:
        clip.load_clip(str(name), "cpu")
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_safetensors_and_json_only(open_clip_folder, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return open_clip_folder
    monkeypatch.setattr(clip, "snapshot_download", snapshot_download)
    clip.load_clip("someone/model", "cpu")
    assert asked == [("someone/model", ["*.safetensors", "*.json"])]


def test_a_model_that_is_not_there_is_one_line(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("no\nnetwork")
    monkeypatch.setattr(clip, "snapshot_download", snapshot_download)
    refused("qihoo360/fg-clip-large", "no such folder, and the hub says: OSError: no network; give a folder")
    refused("ViT-B-99:openai", "open_clip cannot load it: .*ViT-B-99")
    refused("ViT-B-32:nobody", "open_clip cannot load it: .*nobody")


def test_a_folder_that_is_no_model_is_one_line(tmp_path, open_clip_folder, fg_clip_folder):
    refused(tmp_path, "config.json")                                     # empty
    (tmp_path / "config.json").write_text('{"text_config": {"hidden_size": "wide"}}')
    refused(tmp_path, "hidden_size")
    (tmp_path / "config.json").write_text(json.dumps(FG_CONFIG))
    refused(tmp_path, "neither an open_clip model .* nor FG-CLIP v1")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    refused(tmp_path, "download it again")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    refused(tmp_path, "weights .* could not be loaded")
    weights = load_file(f"{open_clip_folder}/open_clip_model.safetensors")
    save_file({name: weight for name, weight in weights.items() if name != "ln_final.bias"},
              tmp_path / "open_clip_model.safetensors")
    refused(tmp_path, "ln_final.bias")
