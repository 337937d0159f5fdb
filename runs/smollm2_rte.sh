#!/usr/bin/env bash
# SmolLM2-135M-Instruct on RTE: runs/smollm2_rte.json.
#
#   MODEL=DIR/SmolLM2-135M-Instruct.Q4_1.gguf DATA_DIR=DIR bash runs/smollm2_rte.sh
#
# MODEL and DATA_DIR as in smollm2_sst2.sh. A run that stands in the JSON file is not repeated. Two
# and a half hours on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
compare() {
    python benchmarks/methods.py --model "${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}" \
        --task RTE --data_dir "${DATA_DIR:-hub}" --passes 150 --points 3 \
        --output runs/smollm2_rte.json --methods "$@"
}
compare "curvature" "example-curvature" "adamw lr=1e-5"
