"""The benchmarks run and compare equals: they assert inside that both sides compute the same."""
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_step_benchmark_smoke(tmp_path):
    out = tmp_path / "step.json"
    done = subprocess.run([sys.executable, "bench/step.py", "--smoke", "--repeats", "1", "--out", str(out)], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    saved = json.loads(out.read_text())
    assert all(result["ratio"] > 0 for result in saved["results"].values()) and saved["machine"]["torch"]


def test_load_benchmark_at_a_tiny_size(tiny_folder, tmp_path):
    out = tmp_path / "load.json"
    done = subprocess.run([sys.executable, "bench/load.py", "--config", os.path.join(tiny_folder, "config.json"),
                           "--processes", "1", "--ways", "ours", "--file_bytes", "100000", "--export", "--out",
                           str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (saved,) = json.loads(out.read_text()).values()
    assert saved["results"][0]["shard"] == 4 * saved["parameters"] and saved["results"][0]["export_seconds"] > 0
