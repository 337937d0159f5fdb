#!/usr/bin/env bash
# Fine-tuning by backpropagation (AdamW) from environment variables.
#
#   bash finetune.sh                                                    the bundled model and data
#   MODEL=facebook/opt-1.3b TASK=SST2 MODE=ft LR=1e-5 bash finetune.sh  all parameters
#   MODEL=facebook/opt-13b TASK=SST2 MODE=lora LR=1e-4 NUM_GPU=2 bash finetune.sh
#
# Further arguments go to run.py and win over the ones here. --help lists the variables.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

if given "--help -h" "$@"; then
    cat <<'END'
VARIABLE=value … bash finetune.sh [arguments of run.py, which win]; finetune_fsdp.sh takes the same

  variable  default (bundled model)  meaning
  MODEL     the bundled one          Hub id or local directory
  DATA_DIR  the Hub (data/samples)   folder with the data, in the Hub's columns
  TASK      SST2                     one of the eleven tasks
  MODE      ft                       ft: all weights; prefix: 5 prefix tokens; lora
  EPOCH     5                        epochs
  BS        8                        examples a step, shared by the GPUs
  LR        1e-5, prefix 1e-2, lora 1e-4
                                     learning rate, which falls to 0
  SEED      0                        of the training set and the batches
  TRAIN     1000                     training examples
  DEV       500 (200), CB and Copa 100, own files at most a fifth; 0: none
  EVAL      1000                     validation examples to report on
  NUM_GPU   1 (finetune_fsdp.sh: all visible ones)
                                     processes, one for each GPU

python run.py --help lists the arguments, docs/scripts.md says more about the variables.
END
    exit 0
fi
find_python
point_out_unknown_variables MODEL DATA_DIR TASK MODE EPOCH BS LR SEED TRAIN DEV EVAL NUM_GPU
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
if wants_bundled_model; then
    use_bundled_model
    EXTRA_ARGS+=(--per_device_eval_batch_size 64)
    if ! given --fsdp "$@"; then # Sharded weights are not whole before training.
        EXTRA_ARGS+=(--eval_before_training)
    fi
fi
EPOCH=${EPOCH:-5}
BS=${BS:-8}
LR=${LR:-$DEFAULT_LR}
SEED=${SEED:-0}
TRAIN=${TRAIN:-1000}
EVAL=${EVAL:-1000}
NUM_GPU=${NUM_GPU:-1}

choose_data "$@"
choose_objective "$@"
DEV=${DEV:-$DEFAULT_DEV}
choose_best "$@"
EVALUATION=(--eval_strategy epoch)
if [ "$DEV" = 0 ]; then
    EVALUATION=()
fi

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
    # float16 overflows in models that were trained in bfloat16.
    if gpu_has_bfloat16; then EXTRA_ARGS+=(--bf16); else EXTRA_ARGS+=(--fp16); fi
fi

TAG=regular-$MODE-$EPOCH-$BS-$LR-$SEED
if given --fsdp "$@"; then # Checkpoints of sharded runs are different files.
    TAG=$TAG-fsdp
fi
NAME=${TASK:-own}-$(basename "$MODEL")-$TAG

exec "$PYTHON" ${LAUNCHER[@]+"${LAUNCHER[@]}"} "$HERE/run.py" \
    ${DATA[@]+"${DATA[@]}"} --model_name "$MODEL" \
    --output_dir "result/$NAME" --tag "$NAME" \
    --trainer regular --num_train_epochs "$EPOCH" --learning_rate "$LR" \
    --lr_scheduler_type linear --per_device_train_batch_size "$((BS / NUM_GPU))" \
    --seed "$SEED" --train_set_seed "$SEED" \
    --num_train "$TRAIN" --num_dev "$DEV" --num_eval "$EVAL" \
    ${EVALUATION[@]+"${EVALUATION[@]}"} --save_strategy epoch --save_total_limit 1 \
    --save_on_interrupt --logging_steps 10 \
    ${MODE_ARGS[@]+"${MODE_ARGS[@]}"} ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} \
    ${BEST[@]+"${BEST[@]}"} ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"} -- "$@"
