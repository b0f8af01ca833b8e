"""The benchmark runs and compares equals: it asserts inside that both sides compute the same log-probs."""
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
