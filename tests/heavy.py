"""What takes a process seconds to import: the fork server of ranks.py imports it once, for all of its children."""
import gc
import importlib
import threading

from tqdm import tqdm

QWEN = "transformers.models.qwen2_5_vl"
HEAVY = ["train", "eval", "demo", "conftest", "datasets", "open_clip", "torch.distributed.checkpoint.hf_storage",
         "transformers.models.auto.processing_auto", "transformers.models.qwen2.tokenization_qwen2",
         "transformers.models.qwen2_vl.image_processing_qwen2_vl", f"{QWEN}.modeling_qwen2_5_vl",
         f"{QWEN}.processing_qwen2_5_vl"]

for name in HEAVY:
    importlib.import_module(name)
tqdm.set_lock(threading.RLock())  # its usual lock, for several processes, would be left behind by one that is killed
gc.freeze()  # a child's garbage collection leaves these objects alone, and with them the memory that it shares
