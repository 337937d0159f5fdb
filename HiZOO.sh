#!/usr/bin/env bash
# HiZOO (and MeZO, with HESSIAN_SMOOTH_TYPE=constant0) from environment variables.
#
#   bash HiZOO.sh                                          the bundled model and data
#   MODEL=facebook/opt-13b TASK=CB MODE=ft LR=1e-6 EPS=1e-3 HESSIAN_SMOOTH_TYPE=constant1e-10 \
#       bash HiZOO.sh                                      an experiment of the paper
#   bash HiZOO.sh --train_file train.jsonl --validation_file validation.jsonl
#
# Further arguments go to run.py and win over the variables: python run.py --help all lists them.
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
HERE=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/settings.sh"
run_script "$0" "$@"
