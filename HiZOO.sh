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

TASK=${TASK:-SST2}
MODE=${MODE:-ft}
DATA_DIR=${DATA_DIR:-}
EXTRA_ARGS=()
if [ -z "${MODEL:-}" ]; then
    # The bundled model has a thousandth of the parameters and learns in far fewer steps.
    MODEL=$HERE/data/tiny-opt
    DATA_DIR=${DATA_DIR:-$HERE/data/samples}
    LR=${LR:-1e-4}
    STEPS=${STEPS:-400}
    EVAL_STEPS=${EVAL_STEPS:-100}
    HESSIAN_SMOOTH_TYPE=${HESSIAN_SMOOTH_TYPE:-constant1e-5}
    # A model this small gains nothing from a second thread, and loses much beside another process.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    EXTRA_ARGS+=(--eval_before_training --per_device_eval_batch_size 64)
fi
BS=${BS:-16}
LR=${LR:-1e-6}
EPS=${EPS:-1e-3}
SEED=${SEED:-0}
TRAIN=${TRAIN:-1000}
EVAL=${EVAL:-1000}
STEPS=${STEPS:-20000}
EVAL_STEPS=${EVAL_STEPS:-2000}
WARMUP_STEP=${WARMUP_STEP:-0}
DECAY_STEP=${DECAY_STEP:-0}
ZO_LR_SCHEDULER_TYPE=${ZO_LR_SCHEDULER_TYPE:-constant}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
HESSIAN_SMOOTH_TYPE=${HESSIAN_SMOOTH_TYPE:-constant1e-8}

case $MODE in
    ft) ;;
    prefix | lora)
        echo "error: MODE=$MODE is not built yet: MODE=ft trains all parameters" >&2
        exit 2
        ;;
    *)
        echo "error: MODE=$MODE: give ft" >&2
        exit 2
        ;;
esac

DEFAULT_DEV=500
if [ "$MODEL" = "$HERE/data/tiny-opt" ]; then
    DEFAULT_DEV=200
fi
OBJECTIVE=(--train_as_classification)
case $(printf %s "$TASK" | tr '[:upper:]' '[:lower:]') in
    cb) DEFAULT_DEV=100 ;; # CB and Copa have fewer than 500 training examples.
    copa) DEFAULT_DEV=100 OBJECTIVE=() ;;
    record | squad | drop) OBJECTIVE=() ;;
esac
DEV=${DEV:-$DEFAULT_DEV}

case " $* " in *" --load_"*) ;; *)
    if [ "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        EXTRA_ARGS+=(--load_float16)
    fi
    ;;
esac
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
    --load_best_model_at_end --save_on_interrupt --logging_steps 10 \
    ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} "$@"
