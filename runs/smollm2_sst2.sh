#!/usr/bin/env bash
# SmolLM2-135M-Instruct on SST-2: README's table, runs/smollm2_sst2*.json.
#
#   MODEL=DIR/SmolLM2-135M-Instruct.Q4_1.gguf DATA_DIR=DIR bash runs/smollm2_sst2.sh
#
# MODEL: Hub id, folder or GGUF file; default: HuggingFaceTB/SmolLM2-135M-Instruct, whose weights are
# not rounded to 4 bits as in the file behind the figures. DATA_DIR: folder with sst2/train.jsonl;
# default: hub. OUT: folder of the JSON files; default: result. Seven hours on one core.
# A run that stands in a JSON file is not repeated; a file of another model is refused. The files
# behind the figures are those of OUT=runs: delete them first to measure again.
set -euo pipefail
cd "$(dirname "$0")/.."
HERE=$PWD OUT="${OUT:-result}"
source settings.sh
choose_python
compare() {
    "$PYTHON" benchmarks/methods.py --model "${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
        --task SST2 --data_dir "${DATA_DIR:-hub}" "$@"
}
compare --passes 400 --points 4 --output "$OUT"/smollm2_sst2.json \
    --methods "mezo lr=1e-6" "hizoo lr=1e-6 alpha=1e-6" "mezo lr=3e-5" "curvature" "adamw lr=1e-5"
compare --passes 900 --points 9 --output "$OUT"/smollm2_sst2_900.json --methods "curvature"
compare --passes 2100 --points 10 --output "$OUT"/smollm2_sst2_1000_steps.json \
    --methods "curvature every=10"
# Seconds a pass, all methods in one run.
compare --seeds 0 --at 24 --output "$OUT"/smollm2_sst2_seconds.json --methods \
    "mezo lr=3e-5" "hizoo lr=1e-6 alpha=1e-6" "curvature" "adamw lr=1e-5" "broadcast"
"$PYTHON" benchmarks/methods_table.py "$OUT"/smollm2_sst2_seconds.json --passes 24
