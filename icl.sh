#!/usr/bin/env bash
# Zero-shot and in-context (ICL) evaluation from environment variables: nothing is trained.
#
#   bash icl.sh                                                  the bundled model and data
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh                 32 demonstrations before each text
#   MODEL=facebook/opt-13b TASK=SST2 bash icl.sh --num_train 0   zero-shot, as TRAIN=0
#
# Further arguments go to run.py and win over the variables: python run.py --help all lists them.
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
HERE=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
run_script "$0" "$@"
