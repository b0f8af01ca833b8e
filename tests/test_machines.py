"""What machines have or lack: Triton, which macOS has not, and a package of Hugging Face named as a folder of ours."""
import os
import subprocess
import sys
import sysconfig

import pytest
import transformers.utils

import data  # noqa: F401  tells transformers that there is no package named kernels
import train
from kernels import ops
from test_train import SMALL, questions, warmup

__all__ = ["questions", "warmup"]  # fixtures

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def without_triton(tmp_path) -> tuple[list[str], dict[str, str]]:
    """How to start Python where all packages but Triton are installed, and Hugging Face's package named kernels: the
    command to put before a script, and its environment. `-S` leaves the real site-packages out; a folder of links
    stands in for it."""
    folder = tmp_path / "packages"
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for name in os.listdir(site):
            if not name.startswith(("triton", "kernels")) and not (folder / name).exists():
                (folder / name).symlink_to(os.path.join(site, name))
    return [sys.executable, "-S"], os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def elsewhere(tiny_folder, questions, warmup, tmp_path_factory):
    """What a program prints that imports everything there, asks for help, and runs each stage and an evaluation: one
    process for two properties, since it takes seconds to import; and the folder of its results."""
    out = tmp_path_factory.mktemp("elsewhere")
    small = [*SMALL, "--out", str(out), "--group_size", "2", "--questions_per_rollout", "2",
             "--questions_per_update", "2", "--max_steps", "1", "--clip_weight", "0"]
    commands = [["--stage", "sft", "--model", tiny_folder, "--data", warmup],
                ["--stage", "sample", "--data", questions],
                ["--stage", "1", "--data", questions], ["--stage", "2", "--data", questions]]
    greedy = [*SMALL[: SMALL.index("--no_gradient_checkpointing")], "--model", tiny_folder, "--data", questions,
              "--out", str(out / "eval")]
    (out / "packages" / "kernels.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {transformers.utils.import_utils.KERNELS_MIN_VERSION}\n"
    (out / "packages" / "kernels.dist-info" / "METADATA").write_text(metadata)
    command, environment = without_triton(out)
    done = subprocess.run([*command, "-c", f"""
import importlib.metadata, importlib.util
assert importlib.util.find_spec("triton") is None
print(importlib.metadata.version("kernels"))
import train, eval, demo, rewards, data
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
from kernels import ops
print(ops.__file__)
assert ops.backend("cpu").startswith("torch")
try:
    ops.backend("cuda")
except ValueError as error:
    print(error)
try:
    train.main(["--help"])
except SystemExit as end:
    assert not end.code
for argv in {commands}:
    assert train.main([*argv, *{small}]) == 0
assert eval.main({greedy}) == 0
"""], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines(), out


def test_help_a_step_of_each_stage_and_an_evaluation_run_without_triton(elsewhere):
    """As on a Mac. A GPU without Triton is refused in one line that says what to do, also on Windows."""
    (*_, refusal, usage), out = elsewhere[0][:4], elsewhere[1]
    assert refusal.startswith("a GPU needs Triton, which is not installed here") and "WSL" in refusal
    assert usage.startswith("usage:") and any("--stage" in line for line in elsewhere[0])
    assert all((out / stage / "model").is_dir() for stage in ("sft", "stage1", "stage2"))
    assert (out / "eval" / "report.json").is_file() and (out / "sample" / "hard.jsonl").is_file()


def test_hugging_faces_package_named_kernels_does_not_take_the_place_of_ours(elsewhere):
    """Installed, in a version that transformers looks for: there would be no model to import."""
    assert elsewhere[0][:2] == [transformers.utils.import_utils.KERNELS_MIN_VERSION, ops.__file__]


@pytest.mark.parametrize("missing, package", [("which", "gcc"), ("exists", "python3-dev")])
def test_a_gpu_without_what_tritons_first_launch_compiles_with_is_told_what_to_install(monkeypatch, missing, package):
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(ops.shutil, "which", lambda name: None if missing == "which" else "/usr/bin/" + name)
    monkeypatch.setattr(ops.os.path, "exists", lambda path: missing != "exists")
    with pytest.raises(ValueError, match=f"^Triton needs .* at its first launch: apt install {package}$"):
        ops.backend("cuda")


def test_windows_is_told_to_use_wsl(tiny_folder, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert train.main(["--stage", "1"]) == 2
    error = "error: Windows lacks what this needs: run it in Linux under WSL (`wsl --install`)\n"
    assert capsys.readouterr().err == error


def test_transformers_is_told_wherever_it_asks():
    from transformers.integrations import hub_kernels

    assert not hub_kernels.is_kernels_available() and not transformers.utils.is_kernels_available()
    assert not transformers.utils.import_utils.is_kernels_available()
