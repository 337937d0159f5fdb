#!/usr/bin/env bash
# Zero-shot and in-context (ICL) evaluation from environment variables: nothing is trained.
#
#   bash icl.sh                                                  the bundled model and data
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh                 32 demonstrations before each text
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh --num_train 0   zero-shot, as TRAIN=0
#
# Further arguments go to run.py and win over the ones here. --help lists the variables.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"

if given "--help -h" "$@"; then
    cat <<'END'
VARIABLE=value … bash icl.sh [arguments of run.py, which win]

  variable  default (bundled model)  meaning
  MODEL     the bundled one          Hub id or local directory
  DATA_DIR  the Hub (data/samples)   folder with the data, in the Hub's columns
  TASK      SST2                     one of the eleven tasks
  SEED      0                        of random numbers
  TRAIN     32                       demonstrations, of its own for each example; 0: zero-shot
  EVAL      1000                     validation examples to report on

python run.py --help lists the arguments, docs/scripts.md says more about the variables.
END
    exit 0
fi
find_python
point_out_unknown_variables MODEL DATA_DIR TASK SEED TRAIN EVAL
TASK=${TASK:-SST2}
DATA_DIR=${DATA_DIR:-}
if wants_bundled_model; then
    use_bundled_model
fi
SEED=${SEED:-0}
TRAIN=${TRAIN:-32}
EVAL=${EVAL:-1000}

choose_data "$@"
choose_weights "$@"

# Without --train_set_seed and --num_train_sets every eval example has its own demonstrations, and
# without --tag run.py names the result after the demonstrations that it really used.
exec "$PYTHON" "$HERE/run.py" \
    ${DATA[@]+"${DATA[@]}"} --model_name "$MODEL" --trainer none \
    --num_train "$TRAIN" --num_eval "$EVAL" --seed "$SEED" \
    ${WEIGHTS[@]+"${WEIGHTS[@]}"} -- "$@"
