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
    """How to start Python where all packages but Triton are installed: the command to put before a script, and its
    environment. `-S` leaves the real site-packages out; a folder of links stands in for it."""
    folder = tmp_path / "packages"
    folder.mkdir(exist_ok=True)
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for name in os.listdir(site):
            if not name.startswith("triton") and not (folder / name).exists():
                (folder / name).symlink_to(os.path.join(site, name))
    return [sys.executable, "-S"], os.environ | {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def start(python: list[str], environment: dict[str, str], code: str) -> subprocess.Popen:
    """Code in a process of its own, in the root folder."""
    return subprocess.Popen([*python, "-c", code], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def printed_by(process: subprocess.Popen) -> str:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return printed


HELP = """
try:
    train.main(["--help"])
except SystemExit as end:
    assert not end.code
"""


@pytest.fixture(scope="module", autouse=True)
def beside_hugging_faces_kernels(tmp_path_factory):
    """A process that imports all beside that package; it is begun before the first test and read by the last."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "kernels.dist-info").mkdir()
    version = transformers.utils.import_utils.KERNELS_MIN_VERSION
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    (folder / "kernels.dist-info" / "METADATA").write_text(metadata)
    process = start([sys.executable], os.environ | {"PYTHONPATH": str(folder)}, f"""
import importlib.metadata
assert importlib.metadata.version("kernels") == "{version}"
import train
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
from kernels import ops
{HELP}""")
    yield process
    process.kill()
    process.communicate()


def test_help_a_step_of_each_stage_and_an_evaluation_run_without_triton(tiny_folder, questions, warmup, tmp_path):
    """As on a Mac. A GPU without Triton is refused in one line that says what to do, also on Windows."""
    small = [*SMALL, "--out", str(tmp_path), "--group_size", "2", "--questions_per_rollout", "2",
             "--questions_per_update", "2", "--max_steps", "1", "--clip_weight", "0"]
    commands = [["--stage", "sft", "--model", tiny_folder, "--data", warmup],
                ["--stage", "sample", "--data", questions],
                ["--stage", "1", "--data", questions], ["--stage", "2", "--data", questions]]
    greedy = [*SMALL[: SMALL.index("--no_gradient_checkpointing")], "--model", tiny_folder, "--data", questions,
              "--out", str(tmp_path / "eval")]
    process = start(*without_triton(tmp_path), f"""
import importlib.util
assert importlib.util.find_spec("triton") is None
import train, eval, demo, rewards, data
from kernels import ops
assert ops.backend("cpu").startswith("torch")
try:
    ops.backend("cuda")
except ValueError as error:
    print(error)
{HELP}
for argv in {commands}:
    assert train.main([*argv, *{small}]) == 0
assert eval.main({greedy}) == 0
""")
    refusal, *usage = printed_by(process).splitlines()
    assert refusal.startswith("a GPU needs Triton, which is not installed here") and "WSL" in refusal
    assert usage[0].startswith("usage:") and any("--stage" in line for line in usage)
    assert all((tmp_path / stage / "model").is_dir() for stage in ("sft", "stage1", "stage2"))
    assert (tmp_path / "eval" / "report.json").is_file() and (tmp_path / "sample" / "hard.jsonl").is_file()


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


def test_hugging_faces_package_named_kernels_does_not_take_the_place_of_ours(beside_hugging_faces_kernels):
    """Installed, in a version that transformers looks for: there would be no model to import."""
    assert printed_by(beside_hugging_faces_kernels).startswith("usage:")


def test_transformers_is_told_wherever_it_asks():
    from transformers.integrations import hub_kernels

    assert not hub_kernels.is_kernels_available() and not transformers.utils.is_kernels_available()
    assert not transformers.utils.import_utils.is_kernels_available()
