#!/usr/bin/env bash
# finetune.sh with the weights, gradients and AdamW states sharded over NUM_GPU GPUs (FSDP).
#
#   MODEL=facebook/opt-13b TASK=SST2 NUM_GPU=4 bash finetune_fsdp.sh
#
# transformers shards each decoder layer (FSDP2); --fsdp_config FILE.json changes how. NUM_GPU is
# the number of visible NVIDIA GPUs if it is not set, MODE is ft or lora. All else is as for
# finetune.sh; python run.py --help all lists the further arguments.
set -euo pipefail
HERE=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
run_script "$0" "$@"
