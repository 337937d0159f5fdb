#!/usr/bin/env bash
# Zero-shot and in-context (ICL) evaluation from environment variables: nothing is trained.
#
#   bash icl.sh                                                  the bundled model and data
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh                 32 demonstrations before each text
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh --num_train 0   zero-shot, as TRAIN=0
#
# Further arguments go to run.py and win over the variables: python run.py --help lists them.
#
# variable              default       bundled model  meaning
# MODEL                 the bundled one              Hub id, local directory or GGUF file
# DATA_DIR              the Hub       data/samples   folder with the data, in the Hub's columns
# TASK                  SST2                         one of the eleven tasks, in any case
# TRAIN                 32                           demonstrations; 0 is zero-shot
# EVAL                  1000                         validation examples to report on, or all there
#                                                    are
# SEED                  not set                      draws one set of demonstrations, and the
#                                                    examples to report on; not set: each example
#                                                    has demonstrations of its own
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
begin "$@"
TRAINER=$(value_given --trainer "$@")
if [ "${TRAINER:-none}" != none ]; then
    refuse "--trainer $TRAINER: icl.sh trains nothing; HiZOO.sh and finetune.sh do"
fi

choose_model_and_data "$@"
choose_weights "$@"
DEFAULT_TRAIN=32
if [ -z "$TASK" ] && ! given --train_file "$@"; then
    DEFAULT_TRAIN=0
fi
SEEDS=()
if [ "${SEED:-}" ]; then
    SEEDS=(--train_set_seed "$SEED")
fi

# What stands before -- is the script's choice: it may be without effect beside what follows.
exec "$PYTHON" "$HERE/run.py" --trainer none --model_name "$MODEL" ${DATA[@]+"${DATA[@]}"} \
    --num_train "${TRAIN:-$DEFAULT_TRAIN}" --num_eval "${EVAL:-1000}" \
    ${SEEDS[@]+"${SEEDS[@]}"} ${WEIGHTS[@]+"${WEIGHTS[@]}"} -- "$@"
