#!/usr/bin/env bash
# SmolLM2-135M-Instruct learns SST-2: README's picture and table, runs/smollm2_sst2.json and .png.
#
#   MODEL=DIR/SmolLM2-135M-Instruct.Q4_1.gguf DATA_DIR=DIR bash runs/smollm2_sst2.sh
#
# MODEL: Hub id, folder or GGUF file; default: HuggingFaceTB/SmolLM2-135M-Instruct, which is not
# rounded to 4 bits as the file behind the figures was. DATA_DIR: folder with sst2/train.jsonl;
# default: hub. A run that stands in the JSON file is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/methods.py --model "${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
    --task SST2 --data_dir "${DATA_DIR:-hub}" --passes 900 --points 9 \
    --methods curvature "adamw lr=1e-5" "mezo lr=1e-6" "hizoo lr=1e-6 alpha=1e-6" \
    --output runs/smollm2_sst2.json --plot runs/smollm2_sst2.png
