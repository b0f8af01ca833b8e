"""What several test files share: a tiny untrained model folder of a family, its processor, and a few samples."""
import functools
import gc
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny matrices are slower on two threads
sys.path.insert(0, ROOT)

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedConfig

import data
import demo
from engine.policy import Policy
from engine.weights import load_processor
from grading.algebra import grader_counts
from plumbing.processes import start_processes
from ranks import start_server

PreTrainedConfig.__repr__ = object.__repr__  # what transformers logs of each config it reads: a seventh of a tiny run


def pytest_collection_finish(session):
    """The server imports while the first tests run; the fast tests need none."""
    gc.freeze()  # what all files have imported stays for good, so no garbage collection goes through it again
    if any(not item.get_closest_marker("fast") for item in session.items):
        start_server()


@pytest.hookimpl(trylast=True)  # when its patches are undone
def pytest_runtest_teardown():
    """No test counts what an earlier one has asked the grader, whichever files a worker has had before."""
    grader_counts("own")


# Before a test: it runs on a tiny model of each of these, instead of on Qwen2.5-VL alone.
both_families = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
all_families = pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen2_vl"], indirect=True)


@pytest.fixture(scope="session")
def family(request):
    return getattr(request, "param", "qwen2_5_vl")


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """Family -> a folder of it, made once."""
    @functools.cache
    def make(family):
        folder = str(tmp_path_factory.mktemp(family))
        texts = ["How many red circles are there?", "a blue square", *map(str, range(100))]
        processor = demo.make_processor(texts, family)
        demo.make_model(processor, vision_depth=2, initializer_range=0.2, family=family).save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_folder(make_folder, family):
    """A Hugging Face folder: two vision blocks (windowed, full), two decoder layers, grouped heads, tied embeddings.

    Of Qwen3-VL: heads that are wider together than the hidden size, deepstack after the second block."""
    return make_folder(family)


@pytest.fixture(scope="session")
def side(tiny_folder):
    """The side in pixels of the square that is one token: two patches of 14 pixels, in Qwen3-VL of 16."""
    return 2 * AutoConfig.from_pretrained(tiny_folder).vision_config.patch_size


@pytest.fixture(scope="session")
def processor(tiny_folder, side):
    return load_processor(tiny_folder, side**2, 16 * side**2)


def picture(width, height, seed):
    """An image of noise: every patch differs, so a mix-up cannot go unseen."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.fixture(scope="session")
def samples():
    """Images of three shapes, one question with two images, one without any."""
    return [
        data.Sample("a", "How many red circles are there?", (picture(56, 56, 0),), "2", ("red circle",)),
        data.Sample("b", "a blue square", (picture(112, 56, 1),), "3", ("blue square",)),
        data.Sample("c", "1 2 3", (), "4", ("three",)),
        data.Sample("d", "<image>and<image>?", (picture(56, 84, 2), picture(140, 84, 3)), "5", ("red",)),
        data.Sample("e", "How many?", (picture(84, 84, 4),), "6", ("circle",)),
    ]


@pytest.fixture(scope="session")
def prompts(samples, processor):
    return [data.encode_prompt(sample, processor) for sample in samples]


@pytest.fixture(scope="session")
def processes():
    """A process group of one, as `python train.py` makes it: (device, mesh)."""
    return start_processes()


@pytest.fixture
def policy(tiny_folder, processes):
    """The tiny policy in float32, sharded over one process."""
    device, mesh = processes
    return Policy.load(tiny_folder, device, torch.float32, mesh, torch.float32)


@pytest.fixture
def replica(tiny_folder, processes):
    """The tiny policy, whole, as the sampler uses it."""
    return Policy.load(tiny_folder, processes[0], torch.float32).eval()


def pytest_addoption(parser):
    parser.addoption("--faults", type=int, default=5, help="how many interruptions tests/test_faults.py makes")
