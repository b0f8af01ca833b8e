"""Precedence, unknown flags, wrong types."""
import pytest

from data import InputError
from train import STAGES, Config, read_config

pytestmark = pytest.mark.fast


@pytest.fixture
def inputs(tmp_path):
    """Flags that satisfy the check for missing inputs."""
    return ["--model", str(tmp_path), "--data", str(tmp_path)]


def test_the_command_line_beats_the_stage_which_beats_the_default(inputs):
    config = read_config(["--stage", "2", *inputs, "--epochs", "5"])
    assert config.epochs == 5 and STAGES["2"]["epochs"] == 2 and Config().epochs == 1
    assert config.accuracy_weight == 0.9 and Config().accuracy_weight == 0.0
    assert config.group_size == Config().group_size == 8


def test_a_stage_changes_nothing_but_defaults(inputs):
    """The reward weights and sizes of the release."""
    one, two = read_config(["--stage", "1", *inputs]), read_config(["--stage", "2", *inputs])
    parts = ("clip", "keyword", "format", "length", "accuracy")
    assert [getattr(one, f"{part}_weight") for part in parts] == [0.4, 0.4, 0.1, 0.1, 0.0]
    assert [getattr(two, f"{part}_weight") for part in parts] == [0.0, 0.0, 0.1, 0.0, 0.9]
    assert one.questions_per_rollout // one.questions_per_update == 5
    assert two.questions_per_rollout // two.questions_per_update == 4
    assert (one.kl_coef, one.lr) == (0.01, 1e-6)
    assert (one.clip_ratio_low, one.clip_ratio_high, one.clip_ratio_c) == (0.2, 0.3, 3.0)


@pytest.mark.parametrize("flags, message", [
    (["--stage", "1", "--tempratur", "1"], "unknown flag --tempratur: did you mean --temperature"),
    (["--stage", "1", "--temp", "1"], "unknown flag --temp"),  # no abbreviations: they break when a flag is added
    (["--stage", "1", "--clip_low", "0.1"], "unknown flag --clip_low: did you mean --clip_ratio_low?"),  # its old name
    (["--stage", "1", "--xyzzy"], "unknown flag --xyzzy: --help lists all"),
    (["--stage", "1", "--epochs", "one"], "argument --epochs: invalid int value: 'one'"),
    (["--stage", "1", "--freeze_vision", "perhaps"], "perhaps"),
    (["--stage", "7"], "--stage 7: give one of sft, sample, 1, 2"),
    ([], "--stage is missing"),
    (["--stage", "1", "--group_size", "1"], "--group_size 1"),
    (["--stage", "1", "--questions_per_update", "100"], "560 is not a multiple of --questions_per_update 100"),
    (["--stage", "1", "--slots", "4"], "--slots 4"),
    (["--stage", "1", "--token_budget", "4095"],
     "--token_budget 4095 is less than --max_prompt + --max_response = 4096"),
    (["--stage", "1", "--temperature", "0"], "--temperature 0"),
    (["--stage", "1", "--top_p", "1.5"], "--top_p 1.5"),
    (["--stage", "1", "--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    (["--stage", "1", "--keyword_scope", "all"], "argument --keyword_scope: invalid choice: 'all'"),
    (["--stage", "1", "--min_pixels", "9", "--max_pixels", "8"], "--min_pixels 9 is more than --max_pixels 8"),
    (["--stage", "1", "--clip_ratio_c", "0.5"], "--clip_ratio_c 0.5 is not in 1"),
    (["--stage", "sft", "--questions_per_update", "64"], "the same thing in the warm-up"),
])
def test_bad_flags_are_one_line_that_names_them(inputs, flags, message):
    with pytest.raises(InputError) as error:
        read_config([*flags, *inputs])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_default_inputs_name_the_stage_that_makes_them(tmp_path):
    for stage, maker in (("sample", "sft"), ("1", "sft"), ("2", "1")):
        with pytest.raises(InputError, match=f"make it with `train.py --stage {maker} --out"):
            read_config(["--stage", stage, "--out", str(tmp_path)])
