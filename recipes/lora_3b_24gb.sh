#!/usr/bin/env bash
# All stages on one card of 24 GB: PeBR-R1 on Qwen2.5-VL-3B with LoRA. By the memory plan 16 GB will do as well.
#
#     bash recipes/lora_3b_24gb.sh
#
# It is recipes/pebr_7b_8gpu.sh with other settings: downloads, plan, stages and score are described there. It has not
# been run at full size yet.
set -euo pipefail
export MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct} GPUS=1 GPU_GB=${GPU_GB:-24}

# --recipe small: adapters of rank 16 in all linear layers of the decoder, rows of 8,192 tokens. An optimiser step of
# the method is 112 to 128 questions; here it is 16, so that a step is minutes of one card. Nobody has tuned this.
export FLAGS=${FLAGS:---recipe small}

# Adapters want about ten times the learning rate of whole weights (1e-5 in the warm-up, 1e-6 in RL).
export WARMUP_FLAGS=${WARMUP_FLAGS:---lr 1e-4}
export RL_FLAGS=${RL_FLAGS:---lr 1e-5 --questions_per_rollout 64 --questions_per_update 16 --save_every 20}

# Each stage leaves the merged model in model/ and A and B alone in adapter/, as PEFT loads them. A checkpoint holds the
# adapters and their moments only: 0.4 GB.
exec bash "$(dirname "$0")/pebr_7b_8gpu.sh"
