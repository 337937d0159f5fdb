#!/usr/bin/env bash
# HiZOO (and MeZO, with HESSIAN_SMOOTH_TYPE=constant0) from environment variables.
#
#   bash HiZOO.sh                                          the bundled model and data
#   MODEL=facebook/opt-13b TASK=CB MODE=ft LR=1e-6 EPS=1e-3 HESSIAN_SMOOTH_TYPE=constant1e-10 \
#       bash HiZOO.sh                                      an experiment of the paper
#
# Further arguments go to run.py and win over the ones here. --help lists the variables.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

if given "--help -h" "$@"; then
    cat <<'END'
VARIABLE=value … bash HiZOO.sh [arguments of run.py, which win]

  variable              default (bundled model)   meaning
  MODEL                 the bundled one           Hub id or local directory
  DATA_DIR              the Hub (data/samples)    folder with the data, in the Hub's columns
  TASK                  SST2                      one of the eleven tasks
  MODE                  ft                        ft: all weights; prefix: 5 prefix tokens; lora
  BS                    16                        examples a step
  LR                    1e-6, prefix 1e-2, lora 1e-4 (1e-4, 1, 1e-2)        learning rate
  EPS                   1e-3, prefix 1e-1, lora 1e-2                        perturbation scale
  HESSIAN_SMOOTH_TYPE   constant1e-8 (1e-5, prefix 1e-4, lora 1e-5)         constant0 is MeZO
  STEPS                 20000 (400)               training steps
  EVAL_STEPS            2000 (100)                steps between dev losses, and checkpoints
  SEED                  0                         of the training set, the batches and the noise
  TRAIN                 1000                      training examples
  DEV                   500 (200), CB and Copa 100, own files at most a fifth; 0: none
  EVAL                  1000                      validation examples to report on
  WARMUP_STEP           0                         steps over which the learning rate rises from 0
  DECAY_STEP            0                         step from which a linear or cosine rate decays
  ZO_LR_SCHEDULER_TYPE  constant                  learning-rate schedule
  WEIGHT_DECAY          0                         decoupled weight decay

python run.py --help lists the arguments, docs/scripts.md says more about the variables.
END
    exit 0
fi
find_python
point_out_unknown_variables MODEL DATA_DIR TASK MODE BS LR EPS HESSIAN_SMOOTH_TYPE STEPS EVAL_STEPS \
    SEED TRAIN DEV EVAL WARMUP_STEP DECAY_STEP ZO_LR_SCHEDULER_TYPE WEIGHT_DECAY
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
if wants_bundled_model; then
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

choose_data "$@"
choose_objective "$@"
DEV=${DEV:-$DEFAULT_DEV}
choose_best "$@"
choose_weights "$@"
EVALUATION=(--eval_strategy steps --eval_steps "$EVAL_STEPS")
if [ "$DEV" = 0 ]; then
    EVALUATION=()
fi

TAG=hizoo-$MODE-$STEPS-$BS-$LR-$EPS-$SEED-$HESSIAN_SMOOTH_TYPE
NAME=${TASK:-own}-$(basename "$MODEL")-$TAG

exec "$PYTHON" "$HERE/run.py" \
    ${DATA[@]+"${DATA[@]}"} --model_name "$MODEL" \
    --output_dir "result/$NAME" --tag "$NAME" \
    --trainer zo --max_steps "$STEPS" --learning_rate "$LR" --zo_eps "$EPS" \
    --hessian_smooth_type "$HESSIAN_SMOOTH_TYPE" --weight_decay "$WEIGHT_DECAY" \
    --zo_lr_scheduler_type "$ZO_LR_SCHEDULER_TYPE" \
    --warmup_step "$WARMUP_STEP" --decay_step "$DECAY_STEP" \
    --per_device_train_batch_size "$BS" --seed "$SEED" --train_set_seed "$SEED" \
    --num_train "$TRAIN" --num_dev "$DEV" --num_eval "$EVAL" \
    ${EVALUATION[@]+"${EVALUATION[@]}"} \
    --save_strategy steps --save_steps "$EVAL_STEPS" --save_total_limit 1 \
    --save_on_interrupt --logging_steps 10 \
    ${MODE_ARGS[@]+"${MODE_ARGS[@]}"} ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} \
    ${BEST[@]+"${BEST[@]}"} ${WEIGHTS[@]+"${WEIGHTS[@]}"} ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} \
    -- "$@"
