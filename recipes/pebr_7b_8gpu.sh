#!/usr/bin/env bash
# From an empty disk to a MathVista score: PeBR-R1 on Qwen2.5-VL-7B with 8 GPUs of 80 GB.
#
#     bash recipes/pebr_7b_8gpu.sh
#
# Run it again after anything went wrong: downloads go on, complete stages are skipped, others resume from their last
# checkpoint. It has not been run at full size yet. For another model or number of GPUs set MODEL, GPUS and GPU_GB, and
# for other settings FLAGS (of all stages), WARMUP_FLAGS and RL_FLAGS. docs/recipe.md explains the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
gpus=${GPUS:-8}
flags=${FLAGS:-} warmup=${WARMUP_FLAGS:-} rl=${RL_FLAGS:-}  # words, not quoted below
export PATH="$PWD/.venv/bin:$PATH"  # the environment that the README's first command makes
run="torchrun --nproc_per_node $gpus"

# ---- Download. By arithmetic the models take 17 GB (7B) and 2 GB (FG-CLIP); the data sets' sizes stand on their pages.
hf download "$model" --local-dir models/base
hf download qihoo360/fg-clip-large --local-dir models/fg-clip
hf download HuanjinYao/Mulberry-SFT --repo-type dataset --local-dir data/mulberry
hf download cythu/PeBR_R1_dataset --repo-type dataset --local-dir data/pebr
hf download AI4Math/MathVista --repo-type dataset --local-dir data/mathvista

# ---- Unpack every archive where it lies, once, because the json files name their images relative to that folder.
find data \( -name '*.tar' -o -name '*.tar.gz' -o -name '*.zip' \) -print | while read -r archive; do
    [ -e "$archive.unpacked" ] && continue
    case $archive in
        *.zip) unzip -qo "$archive" -d "$(dirname "$archive")" ;;
        *) tar -xf "$archive" -C "$(dirname "$archive")" ;;
    esac
    touch "$archive.unpacked"
done

# ---- Find the three json files. Their names are those in the release's README, but nobody has checked where they lie,
# and the authors' own solutions have no name there: set a variable to the file where this stops.
find_json() { find data -name "$1" -print -quit; }
mulberry=${MULBERRY:-$(find_json mulberry_sft.json)}        # warm-up rows: messages, images
solutions=${SOLUTIONS:-$(find_json 'pebr*sft*.json')}       # warm-up rows of the authors
questions=${QUESTIONS:-$(find_json pebr_grpo_dataset.json)} # RL rows: problem, answer, images, key_words
for name in mulberry solutions questions; do
    if [ ! -f "${!name}" ]; then
        echo "error: no file of $name found below data/: set ${name^^}=FILE and run this again. These are there:" >&2
        find data -name '*.json*' -size +1k >&2
        exit 2
    fi
done

# ---- The folder that the image paths of a file start from: its own, or one above it, up to the repository's. Where the
# first image lies decides. If none is found, the stage says which path it looked for, before anything is trained.
root_of() {
    python - "$1" <<'END'
import json, os, sys
own = folder = os.path.dirname(sys.argv[1])
images = next((row.get("images") or row.get("image") for row in json.load(open(sys.argv[1]))), [])
first = images if isinstance(images, str) else (images or [""])[0]
while folder not in ("", "data") and not os.path.isfile(os.path.join(folder, first)):
    folder = os.path.dirname(folder)
print(own if folder in ("", "data") else folder)
END
}
warmup_images=${WARMUP_IMAGES:-$(root_of "$mulberry"),$(root_of "$solutions")}  # one folder for each file
images=${IMAGES:-$(root_of "$questions")}

# ---- Plan. It prints where each GPU's memory goes in each stage, before anything is paid for. It reads config.json
# alone.
for stage in sft sample 1 2; do
    python train.py --stage "$stage" --plan --gpus "$gpus" --gpu_gb "${GPU_GB:-80}" --model models/base $flags
done

# ---- Stage 0, warm-up: the model learns to write the format, 128 rows a step, 2 epochs. It writes runs/pebr/sft/model
# (17 GB) and keeps two checkpoints of 94 GB while it writes the next: have 300 GB free.
$run train.py --stage sft --model models/base --data "$mulberry,$solutions" --image_root "$warmup_images" \
    $flags $warmup

# ---- Sampling: 8 responses to each question sort them into easy.jsonl (all right), medium.jsonl (some) and hard.jsonl
# (none) in runs/pebr/sample. Below 1 GB. It is skipped where its last file is there.
if [ ! -e runs/pebr/sample/rollouts.jsonl ]; then
    $run train.py --stage sample --data "$questions" --image_root "$images" $flags
fi

# ---- Stage 1, perception RL on the easy questions, 560 a step. It writes runs/pebr/stage1/model (17 GB), the responses
# of each step, and keeps two checkpoints of 100 GB while it writes the next: have 320 GB free. The checkpoints of the
# stage before, runs/pebr/sft/checkpoints, can go once it has begun.
$run train.py --stage 1 --clip models/fg-clip $flags $rl

# ---- Stage 2, reasoning RL on the medium questions, 512 a step, 2 epochs. It writes runs/pebr/stage2, as large again.
$run train.py --stage 2 $flags $rl

# ---- The score: official and strict, with intervals and how the errors split. A few MB in runs/eval/mathvista.
$run eval.py --model runs/pebr/stage2/model --benchmark mathvista --data data/mathvista --blind --caption_only
