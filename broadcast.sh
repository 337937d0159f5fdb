#!/usr/bin/env bash
# Error broadcast from environment variables: one forward pass a step, no backward pass.
#
#   bash broadcast.sh                                   the bundled model and data
#   MODEL=HuggingFaceTB/SmolLM2-135M TASK=SST2 STEPS=100 bash broadcast.sh
# Further arguments go to run.py and win over the variables: python run.py --help all lists them.
#
# variable    default            bundled model  meaning
# MODEL       the bundled one                   Hub id, local directory or GGUF file
# DATA_DIR    the Hub            data/samples   folder with the data, in the Hub's columns
# TASK        SST2                              one of the eleven tasks, in any case
# BS          16                                examples a step, shared by the processes
# RATE        auto                              κ, how many times a step takes the error; falls to 0
# DAMPING     0.1                               λ, damping of the inputs' second moments
# FROM        0.5                               lower share of the blocks, not trained
# STEPS       200                100            training steps
# EVAL_STEPS  50                 25             steps between dev losses, and checkpoints
# SEED        0                                 of the training set and the batches
# TRAIN       1000                              training examples; own files: all beside DEV, if fewer
# DEV         500                200            dev examples; CB and Copa 100, own files a fifth
# EVAL        1000                              validation examples to report on
set -euo pipefail
HERE=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
run_script "$0" "$@"
