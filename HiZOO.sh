#!/usr/bin/env bash
# HiZOO (and MeZO, with HESSIAN_SMOOTH_TYPE=constant0) from environment variables.
#
#   bash HiZOO.sh                                          the bundled model and data
#   MODEL=facebook/opt-13b TASK=CB MODE=ft LR=1e-6 EPS=1e-3 HESSIAN_SMOOTH_TYPE=constant1e-10 \
#       bash HiZOO.sh                                      an experiment of the paper
#
# Further arguments go to run.py and win over the ones here. README lists the variables.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

TASK=${TASK:-SST2}
MODE=${MODE:-ft}
DATA_DIR=${DATA_DIR:-}
choose_mode
# The middle of the MeZO paper's grids: prefixes and LoRA matrices take larger steps than weights.
case $MODE in
    ft) DEFAULT_LR=1e-6 DEFAULT_EPS=1e-3 ;;
    prefix) DEFAULT_LR=1e-2 DEFAULT_EPS=1e-1 ;;
    lora) DEFAULT_LR=1e-4 DEFAULT_EPS=1e-2 ;;
esac
DEFAULT_SMOOTHING=constant1e-8
EXTRA_ARGS=()
if [ -z "${MODEL:-}" ]; then
    use_bundled_model
    # It has a thousandth of the parameters and learns in far fewer steps.
    case $MODE in
        ft) DEFAULT_LR=1e-4 DEFAULT_SMOOTHING=constant1e-5 ;;
        prefix) DEFAULT_LR=1 DEFAULT_SMOOTHING=constant1e-4 ;;
        lora) DEFAULT_LR=1e-2 DEFAULT_SMOOTHING=constant1e-5 ;;
    esac
    STEPS=${STEPS:-400}
    EVAL_STEPS=${EVAL_STEPS:-100}
    EXTRA_ARGS+=(--eval_before_training --per_device_eval_batch_size 64)
fi
BS=${BS:-16}
LR=${LR:-$DEFAULT_LR}
EPS=${EPS:-$DEFAULT_EPS}
SEED=${SEED:-0}
TRAIN=${TRAIN:-1000}
EVAL=${EVAL:-1000}
STEPS=${STEPS:-20000}
EVAL_STEPS=${EVAL_STEPS:-2000}
WARMUP_STEP=${WARMUP_STEP:-0}
DECAY_STEP=${DECAY_STEP:-0}
ZO_LR_SCHEDULER_TYPE=${ZO_LR_SCHEDULER_TYPE:-constant}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
HESSIAN_SMOOTH_TYPE=${HESSIAN_SMOOTH_TYPE:-$DEFAULT_SMOOTHING}

choose_objective "$@"
choose_best "$@"
DEV=${DEV:-$DEFAULT_DEV}

if ! given "--load_float16 --load_bfloat16 --load_int8 --load_int4" "$@" && has_gpu; then
    EXTRA_ARGS+=(--load_float16)
fi
if [ -n "$DATA_DIR" ]; then
    EXTRA_ARGS+=(--data_dir "$DATA_DIR")
fi

TAG=hizoo-$MODE-$STEPS-$BS-$LR-$EPS-$SEED-$HESSIAN_SMOOTH_TYPE
NAME=$TASK-$(basename "$MODEL")-$TAG

exec python "$HERE/run.py" \
    --task_name "$TASK" --model_name "$MODEL" \
    --output_dir "result/$NAME" --tag "$NAME" \
    --trainer zo --max_steps "$STEPS" --learning_rate "$LR" --zo_eps "$EPS" \
    --hessian_smooth_type "$HESSIAN_SMOOTH_TYPE" --weight_decay "$WEIGHT_DECAY" \
    --zo_lr_scheduler_type "$ZO_LR_SCHEDULER_TYPE" \
    --warmup_step "$WARMUP_STEP" --decay_step "$DECAY_STEP" \
    --per_device_train_batch_size "$BS" --seed "$SEED" --train_set_seed "$SEED" \
    --num_train "$TRAIN" --num_dev "$DEV" --num_eval "$EVAL" \
    --eval_strategy steps --eval_steps "$EVAL_STEPS" \
    --save_strategy steps --save_steps "$EVAL_STEPS" --save_total_limit 1 \
    --save_on_interrupt --logging_steps 10 \
    ${MODE_ARGS[@]+"${MODE_ARGS[@]}"} ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} \
    ${BEST[@]+"${BEST[@]}"} ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} "$@"
