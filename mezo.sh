#!/usr/bin/env bash
# MeZO with the variables and defaults of its published mezo.sh: two forward passes a step.
#
#   MODEL=facebook/opt-13b TASK=SST2 MODE=ft LR=1e-7 EPS=1e-3 bash mezo.sh
#   MODEL=facebook/opt-13b TASK=SST2 MODE=lora LR=5e-5 EPS=1e-2 bash mezo.sh
#   MODEL=data/tiny-opt bash mezo.sh                          the bundled model and data
#
# Further arguments go to run.py and win over the variables: python run.py --help all lists them.
#
# variable    default            bundled model  meaning
# MODEL       facebook/opt-1.3b                 Hub id, local directory or GGUF file
# DATA_DIR    the Hub            data/samples   folder with the data, in the Hub's columns
# TASK        SST2                              one of the eleven tasks, in any case
# MODE        ft                                ft: all parameters; prefix: 5 prefix tokens;
#                                               lora: LoRA matrices
# BS          16                                examples a step, shared by the processes
# LR          1e-5               auto           learning rate, constant
# EPS         1e-3                              perturbation scale, in units of the weights
# STEPS       20000              150            training steps
# EVAL_STEPS  4000               50             steps between dev losses, and checkpoints
# SEED        0                                 of the training set, the batches and the noise
# TRAIN       1000                              training examples
# DEV         500                200            dev examples, by which the best checkpoint is chosen;
#                                               CB and Copa: 100
# EVAL        1000                              validation examples to report on
set -euo pipefail
HERE=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
run_script "$0" "$@"
