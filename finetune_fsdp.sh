#!/usr/bin/env bash
# finetune.sh with the weights, gradients and AdamW states sharded over NUM_GPU GPUs (FSDP).
#
#   MODEL=facebook/opt-13b TASK=SST2 NUM_GPU=4 bash finetune_fsdp.sh
#
# BS examples a step are shared by the GPUs. transformers shards each decoder layer (FSDP2);
# --fsdp_config FILE.json changes how. NUM_GPU is the number of visible NVIDIA GPUs if not set.
# The other variables and the further arguments are those of finetune.sh.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

if [ -z "${NUM_GPU:-}" ] && ! given "--help -h" "$@"; then
    has_gpu || refuse "no NVIDIA GPU found: give NUM_GPU, or run finetune.sh"
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        NUM_GPU=$(printf %s "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .)
    else
        NUM_GPU=$(nvidia-smi -L | grep -c '^GPU')
    fi
fi
export NUM_GPU
exec bash "$HERE/finetune.sh" --fsdp "$@"
