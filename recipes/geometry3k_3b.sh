#!/usr/bin/env bash
# Geometry3K with Qwen2.5-VL-3B: the task on which most trainers of vision-language models report. Sampling and stage 2.
#
#     bash recipes/geometry3k_3b.sh                                            8 GPUs of 80 GB
#     GPUS=1 GPU_GB=24 FLAGS="--recipe small --lr 1e-5" bash recipes/geometry3k_3b.sh      one card, LoRA
#
# EasyR1 reports that its 3B goes from .24 to .38 of the test questions, its 7B from .37 to .48. We have no figure yet:
# this has not been run at full size. What differs here: the prompt and its answer line, only questions that are
# sometimes right are trained on, and answers are compared by our rules (--grader release takes EasyR1's, mathruler).
set -euo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct}
gpus=${GPUS:-8}
flags=${FLAGS:-}  # words, not quoted below
export PATH="$PWD/.venv/bin:$PATH"  # the environment that the README's first command makes
run="torchrun --nproc_per_node $gpus"

# ---- Download. The rows have images, problem (with <image> in it) and answer; the pictures lie inside the parquet
# files, whose names begin with their split: 2,101 train, 300 validation, 601 test rows, as the set's page says.
hf download "$model" --local-dir models/base
hf download hiyouga/geometry3k --repo-type dataset --local-dir data/geometry3k
files() { find data/geometry3k -name "$1*.parquet" | sort | paste -sd, -; }
train=$(files train) test=$(files test)
if [ -z "$train" ] || [ -z "$test" ]; then
    echo "error: no train*.parquet and test*.parquet below data/geometry3k: see what the set's page offers" >&2
    exit 2
fi

for stage in sample 2; do
    python train.py --stage "$stage" --plan --gpus "$gpus" --gpu_gb "${GPU_GB:-80}" --model models/base $flags
done

# ---- Sampling: 8 responses to each question; medium.jsonl has those that are sometimes right.
if [ ! -e runs/geometry3k/sample/rollouts.jsonl ]; then
    $run train.py --stage sample --out runs/geometry3k --model models/base --data "$train" $flags
fi

# ---- Stage 2 on these, 128 a step in 4 updates, 5 epochs. Every 5 steps 300 test questions are asked greedily: the
# figure is eval/accuracy, on the console and in runs/geometry3k/stage2/metrics.jsonl.
$run train.py --stage 2 --out runs/geometry3k --model models/base --questions_per_rollout 128 \
    --questions_per_update 32 --epochs 5 --eval_data "$test" --eval_every 5 --eval_questions 300 $flags

# ---- All test questions, greedily, before and after: runs/geometry3k/eval/*/report.json.
$run eval.py --model models/base --data "$test" --out runs/geometry3k/eval/before
$run eval.py --model runs/geometry3k/stage2/model --data "$test" --out runs/geometry3k/eval/after
