#!/usr/bin/env bash
# Zero-shot and in-context (ICL) evaluation from environment variables: nothing is trained.
#
#   bash icl.sh                                                  the bundled model and data
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh                 32 demonstrations before each text
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh --num_train 0   zero-shot, as TRAIN=0
#
# Further arguments go to run.py and win over the ones here. README lists the variables.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

TASK=${TASK:-SST2}
DATA_DIR=${DATA_DIR:-}
EXTRA_ARGS=()
if [ -z "${MODEL:-}" ]; then
    use_bundled_model
fi
SEED=${SEED:-0}
TRAIN=${TRAIN:-32}
EVAL=${EVAL:-1000}

if ! given "--load_float16 --load_bfloat16 --load_int8 --load_int4" "$@" && has_gpu; then
    EXTRA_ARGS+=(--load_float16)
fi
if [ -n "$DATA_DIR" ]; then
    EXTRA_ARGS+=(--data_dir "$DATA_DIR")
fi

# Without --train_set_seed and --num_train_sets every eval example has its own demonstrations, and
# without --tag run.py names the result after the demonstrations that it really used.
exec python "$HERE/run.py" \
    --task_name "$TASK" --model_name "$MODEL" --trainer none \
    --num_train "$TRAIN" --num_eval "$EVAL" --seed "$SEED" \
    ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} "$@"
