#!/usr/bin/env bash
# Fine-tuning by backpropagation (AdamW) from environment variables.
#
#   bash finetune.sh                                                    the bundled model and data
#   MODEL=facebook/opt-1.3b TASK=SST2 MODE=ft LR=1e-5 bash finetune.sh  all parameters
#   MODEL=facebook/opt-13b TASK=SST2 MODE=lora LR=1e-4 NUM_GPU=2 bash finetune.sh
#
# Further arguments go to run.py and win over the variables: python run.py --help lists them.
#
# variable              default       bundled model  meaning
# MODEL                 the bundled one              Hub id, local directory or GGUF file
# DATA_DIR              the Hub       data/samples   folder with the data, in the Hub's columns
# TASK                  SST2                         one of the eleven tasks, in any case
# MODE                  ft                           ft: all parameters; prefix: 5 prefix tokens;
#                                                    lora: LoRA matrices
# EPOCH                 5                            epochs; dev loss and checkpoint after each
# BS                    8                            examples a step, shared by the processes
# LR                    1e-5                         learning rate, which falls linearly to 0
#                       1e-2                         with MODE=prefix
#                       1e-4                         with MODE=lora
# SEED                  0                            of the training set and the batches
# TRAIN                 1000                         training examples; your own files: all the rows
#                                                    beside DEV, if they are fewer
# DEV                   500           200            dev examples, by which the best checkpoint is
#                                                    chosen; CB and Copa: 100; your own files: a
#                                                    fifth of the rows, if that is less; 0: none,
#                                                    the last checkpoint counts
# EVAL                  1000                         validation examples to report on, or all there
#                                                    are
# NUM_GPU               1                            processes, one for each GPU; finetune_fsdp.sh:
#                                                    all visible NVIDIA GPUs
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
begin "$@"
refuse_no_training "$@"

MODE=${MODE:-ft}
choose_mode
choose_model_and_data "$@"
case $MODE in
    ft) DEFAULT_LR=1e-5 ;;
    prefix) DEFAULT_LR=1e-2 ;;
    lora) DEFAULT_LR=1e-4 ;;
esac
EPOCH=${EPOCH:-5}
BS=${BS:-8}
LR=${LR:-$DEFAULT_LR}
SEED=${SEED:-0}
NUM_GPU=${NUM_GPU:-1}

choose_objective "$@"
choose_course epoch "$@"
choose_seeds "$@"

case $NUM_GPU in
    "" | *[!0-9]* | 0*) refuse "NUM_GPU=$NUM_GPU: give the number of GPUs, at least 1" ;;
esac
case $BS in
    "" | *[!0-9]* | 0*) refuse "BS=$BS: give the examples of a step, at least 1" ;;
esac
if [ $((BS % NUM_GPU)) != 0 ]; then
    refuse "BS=$BS: give a multiple of NUM_GPU=$NUM_GPU, the processes that share a step's examples"
fi
LAUNCHER=()
# The Trainer shards only in processes that torchrun has started, even if it is one.
if [ "$NUM_GPU" != 1 ] || given --fsdp "$@"; then
    LAUNCHER=(-P "$HERE/command_line/processes.py" --standalone --nproc_per_node "$NUM_GPU")
fi
REPORT=()
if [ "$IS_BUNDLED" ]; then
    REPORT=(--per_device_eval_batch_size 64)
    if ! given --fsdp "$@"; then # Before training nothing is sharded yet, nor whole.
        REPORT+=(--eval_before_training)
    fi
fi
if [ "$MODE" = prefix ] && given --fsdp "$@"; then
    refuse "MODE=prefix: a prefix needs the whole weights, which are sharded; give ft or lora"
fi

# Mixed precision: AdamW on float16 weights would lose most updates, so they stay float32.
MIXED_PRECISION=()
if ! given "--fp16 --bf16 $WEIGHTS_ARGUMENTS --use_cpu" "$@" && has_gpu; then
    # float16 overflows in models that were trained in bfloat16.
    if gpu_has_bfloat16; then MIXED_PRECISION=(--bf16); else MIXED_PRECISION=(--fp16); fi
fi

# What stands before -- is the script's choice: it may be without effect beside what follows.
exec "$PYTHON" ${LAUNCHER[@]+"${LAUNCHER[@]}"} "$HERE/run.py" --trainer regular \
    --model_name "$MODEL" ${DATA[@]+"${DATA[@]}"} \
    --num_train_epochs "$EPOCH" --learning_rate "$LR" --lr_scheduler_type linear \
    --per_device_train_batch_size "$((BS / NUM_GPU))" "${SEEDS[@]}" \
    --num_train "${TRAIN:-$DEFAULT_TRAIN}" --num_eval "${EVAL:-1000}" "${COURSE[@]}" \
    ${MODE_ARGS[@]+"${MODE_ARGS[@]}"} ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} \
    ${MIXED_PRECISION[@]+"${MIXED_PRECISION[@]}"} ${REPORT[@]+"${REPORT[@]}"} -- "$@"
