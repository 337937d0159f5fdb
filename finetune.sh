#!/usr/bin/env bash
# Fine-tuning by backpropagation (AdamW) from environment variables.
#
#   bash finetune.sh                                                    the bundled model and data
#   MODEL=facebook/opt-1.3b TASK=SST2 MODE=ft LR=1e-5 bash finetune.sh  all parameters
#   torchrun --nproc_per_node 2 --no-python bash finetune.sh            two processes
#
# Further arguments go to run.py and win over the variables: python run.py --help all lists them.
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
set -euo pipefail
HERE=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
run_script "$0" "$@"
