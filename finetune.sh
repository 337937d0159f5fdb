#!/usr/bin/env bash
# Fine-tuning by backpropagation (AdamW) from environment variables.
#
#   bash finetune.sh                                                    the bundled model and data
#   MODEL=facebook/opt-1.3b TASK=SST2 MODE=ft LR=1e-5 bash finetune.sh  all parameters
#   MODEL=facebook/opt-13b TASK=SST2 MODE=lora LR=1e-4 NUM_GPU=2 bash finetune.sh
#
# Further arguments go to run.py and win over the ones here. README lists the variables.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

TASK=${TASK:-SST2}
MODE=${MODE:-ft}
DATA_DIR=${DATA_DIR:-}
choose_mode
case $MODE in
    ft) DEFAULT_LR=1e-5 ;;
    prefix) DEFAULT_LR=1e-2 ;;
    lora) DEFAULT_LR=1e-4 ;;
esac
EXTRA_ARGS=()
if [ -z "${MODEL:-}" ]; then
    use_bundled_model
    EXTRA_ARGS+=(--eval_before_training --per_device_eval_batch_size 64)
fi
EPOCH=${EPOCH:-5}
BS=${BS:-8}
LR=${LR:-$DEFAULT_LR}
SEED=${SEED:-0}
TRAIN=${TRAIN:-1000}
EVAL=${EVAL:-1000}
NUM_GPU=${NUM_GPU:-1}

choose_objective "$@"
choose_best "$@"
DEV=${DEV:-$DEFAULT_DEV}

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
    LAUNCHER=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_GPU")
fi

# Mixed precision: AdamW on float16 weights would lose most updates, so they stay float32.
if ! given "--fp16 --bf16 --load_float16 --load_bfloat16 --load_int8 --load_int4" "$@" &&
    has_gpu; then
    EXTRA_ARGS+=(--fp16)
fi
if [ -n "$DATA_DIR" ]; then
    EXTRA_ARGS+=(--data_dir "$DATA_DIR")
fi

TAG=regular-$MODE-$EPOCH-$BS-$LR-$SEED
if given --fsdp "$@"; then # Checkpoints of sharded runs are different files.
    TAG=$TAG-fsdp
fi
NAME=$TASK-$(basename "$MODEL")-$TAG

exec python ${LAUNCHER[@]+"${LAUNCHER[@]}"} "$HERE/run.py" \
    --task_name "$TASK" --model_name "$MODEL" \
    --output_dir "result/$NAME" --tag "$NAME" \
    --trainer regular --num_train_epochs "$EPOCH" --learning_rate "$LR" \
    --lr_scheduler_type linear --per_device_train_batch_size "$((BS / NUM_GPU))" \
    --seed "$SEED" --train_set_seed "$SEED" \
    --num_train "$TRAIN" --num_dev "$DEV" --num_eval "$EVAL" \
    --eval_strategy epoch --save_strategy epoch --save_total_limit 1 \
    --save_on_interrupt --logging_steps 10 \
    ${MODE_ARGS[@]+"${MODE_ARGS[@]}"} ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} \
    ${BEST[@]+"${BEST[@]}"} ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} "$@"
