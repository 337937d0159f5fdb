#!/usr/bin/env bash
# finetune.sh with the weights, gradients and AdamW states sharded over NUM_GPU GPUs (FSDP).
#
#   MODEL=facebook/opt-13b TASK=SST2 NUM_GPU=4 bash finetune_fsdp.sh
#
# transformers shards each decoder layer (FSDP2); --fsdp_config FILE.json changes how. NUM_GPU is
# the number of visible NVIDIA GPUs if it is not set, MODE is ft or lora. All else is as for
# finetune.sh; python run.py --help lists the further arguments.
#
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

if given "--help -h" "$@"; then
    print_help "$0"
    print_help "$HERE/finetune.sh" | sed -n '/^variable /,$p'
    exit 0
fi
if [ -z "${NUM_GPU:-}" ]; then
    has_gpu || refuse "no NVIDIA GPU found: run finetune.sh, or give NUM_GPU for other GPUs"
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        NUM_GPU=$(printf %s "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .)
    else
        NUM_GPU=$(nvidia-smi -L | grep -c '^GPU')
    fi
fi
export NUM_GPU
exec bash "$HERE/finetune.sh" --fsdp "$@"
