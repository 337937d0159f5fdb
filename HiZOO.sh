#!/usr/bin/env bash
# HiZOO (and MeZO, with HESSIAN_SMOOTH_TYPE=constant0) from environment variables.
#
#   bash HiZOO.sh                                          the bundled model and data
#   MODEL=facebook/opt-13b TASK=CB MODE=ft LR=1e-6 EPS=1e-3 HESSIAN_SMOOTH_TYPE=constant1e-10 \
#       bash HiZOO.sh                                      an experiment of the paper
#   bash HiZOO.sh --train_file train.jsonl --validation_file validation.jsonl
#
# Further arguments go to run.py and win over the variables: python run.py --help lists them.
#
# variable              default       bundled model  meaning
# MODEL                 the bundled one              Hub id, local directory or GGUF file
# DATA_DIR              the Hub       data/samples   folder with the data, in the Hub's columns
# TASK                  SST2                         one of the eleven tasks, in any case
# MODE                  ft                           ft: all parameters; prefix: 5 prefix tokens;
#                                                    lora: LoRA matrices
# BS                    16                           examples a step, shared by the processes
# LR                    1e-6          auto           learning rate; auto: by the measured curvature
#                       1e-2          auto           with MODE=prefix
#                       1e-4          auto           with MODE=lora
# EPS                   1e-3                         perturbation scale, in units of the weights
#                       1e-1                         with MODE=prefix
#                       1e-2                         with MODE=lora
# HESSIAN_SMOOTH_TYPE   constant1e-8  constant1e-5   smoothing of the Hessian; constant0 is MeZO
# DIRECTIONS            1             2              random directions a step
# STEPS                 20000         150            training steps
# EVAL_STEPS            2000          50             steps between dev losses, and checkpoints
# SEED                  0                            of the training set, the batches and the noise
# TRAIN                 1000                         training examples; your own files: all the rows
#                                                    beside DEV, if they are fewer
# DEV                   500           200            dev examples, by which the best checkpoint is
#                                                    chosen; CB and Copa: 100; your own files: a
#                                                    fifth of the rows, if that is less; 0: none,
#                                                    the last checkpoint counts
# EVAL                  1000                         validation examples to report on, or all there
#                                                    are
# WARMUP_STEP           0                            steps over which the learning rate rises from 0
# DECAY_STEP            0                            step from which a linear or cosine rate decays
# ZO_LR_SCHEDULER_TYPE  constant                     learning-rate schedule
# WEIGHT_DECAY          0                            none for biases and layer norms
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
begin "$@"
refuse_no_training "$@"

MODE=${MODE:-ft}
choose_mode
choose_model_and_data "$@"
# The middle of the MeZO paper's grids: prefixes and LoRA matrices take larger steps than weights.
case $MODE in
    ft) DEFAULT_LR=1e-6 DEFAULT_EPS=1e-3 ;;
    prefix) DEFAULT_LR=1e-2 DEFAULT_EPS=1e-1 ;;
    lora) DEFAULT_LR=1e-4 DEFAULT_EPS=1e-2 ;;
esac
DEFAULT_SMOOTHING=constant1e-8
if [ "$IS_BUNDLED" ]; then
    # It has a thousandth of the parameters and learns in far fewer steps.
    DEFAULT_LR=auto DEFAULT_SMOOTHING=constant1e-5
    STEPS=${STEPS:-150}
    EVAL_STEPS=${EVAL_STEPS:-50}
    DIRECTIONS=${DIRECTIONS:-2}
fi
LR=${LR:-$DEFAULT_LR}
EPS=${EPS:-$DEFAULT_EPS}
HESSIAN_SMOOTH_TYPE=${HESSIAN_SMOOTH_TYPE:-$DEFAULT_SMOOTHING}
STEPS=${STEPS:-20000}
EVAL_STEPS=${EVAL_STEPS:-2000}
SEED=${SEED:-0}

choose_objective "$@"
choose_course steps "$@"
choose_weights "$@"
choose_seeds "$@"
LENGTH=(--max_steps "$STEPS")
if given --num_train_epochs "$@"; then
    LENGTH=()
fi
REPORT=()
if [ "$IS_BUNDLED" ]; then
    REPORT=(--eval_before_training --per_device_eval_batch_size 64)
fi

# Under torchrun, or as several tasks of srun, this is one of the processes of a job.
BS=${BS:-16}
PROCESSES=${WORLD_SIZE:-${SLURM_STEP_NUM_TASKS:-1}}
if [ "$(value_given --zo_parallel "$@")" != directions ] && ! given --tensor_parallel "$@"; then
    if [ $((BS % PROCESSES)) != 0 ]; then
        refuse "BS=$BS: as many examples cannot be shared by $PROCESSES processes"
    fi
    BS=$((BS / PROCESSES))
fi

# What stands before -- is the script's choice: it may be without effect beside what follows.
exec "$PYTHON" "$HERE/run.py" --trainer zo --model_name "$MODEL" ${DATA[@]+"${DATA[@]}"} \
    ${LENGTH[@]+"${LENGTH[@]}"} --learning_rate "$LR" --zo_eps "$EPS" \
    --zo_num_samples "${DIRECTIONS:-1}" \
    --hessian_smooth_type "$HESSIAN_SMOOTH_TYPE" --weight_decay "${WEIGHT_DECAY:-0}" \
    --lr_scheduler_type "${ZO_LR_SCHEDULER_TYPE:-constant}" \
    --warmup_steps "${WARMUP_STEP:-0}" --decay_step "${DECAY_STEP:-0}" \
    --per_device_train_batch_size "$BS" "${SEEDS[@]}" \
    --num_train "${TRAIN:-$DEFAULT_TRAIN}" --num_eval "${EVAL:-1000}" "${COURSE[@]}" \
    ${MODE_ARGS[@]+"${MODE_ARGS[@]}"} ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} \
    ${WEIGHTS[@]+"${WEIGHTS[@]}"} ${REPORT[@]+"${REPORT[@]}"} -- "$@"
