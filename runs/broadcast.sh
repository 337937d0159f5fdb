#!/usr/bin/env bash
# Error broadcast beside AdamW and linear probing: the tables of runs/broadcast_*.json.
#
#   SMOLLM2=DIR/SmolLM2-135M-Instruct.Q4_1.gguf GEMMA3=DIR/gemma-3-270m-q4_k_m.gguf DATA_DIR=DIR \
#       bash runs/broadcast.sh
#
# SMOLLM2, GEMMA3: Hub id, folder or GGUF file; default: the Hub's, whose weights are not rounded to
# 4 bits as in the files behind the figures. DATA_DIR: folder with sst2/train.jsonl; default: hub.
# OUT: folder of the JSON files; default: result. A run that stands in a JSON file is not repeated; a
# file of another model is refused. The files behind the figures are those of OUT=runs: delete them
# first to measure again. MeZO's are made by runs/smollm2_sst2.sh, which comes before.
set -euo pipefail
cd "$(dirname "$0")/.."
HERE=$PWD OUT="${OUT:-result}"
source settings.sh
choose_python
MEZO="$OUT/smollm2_sst2.json"
if [ ! -e "$MEZO" ]; then
    echo "error: there is no $MEZO to compare with: bash runs/smollm2_sst2.sh makes it" >&2
    exit 2
fi
SMOLLM2="${SMOLLM2:-HuggingFaceTB/SmolLM2-135M-Instruct}" GEMMA3="${GEMMA3:-google/gemma-3-270m}"
REAL="${DATA_DIR:-hub}" SAMPLES=data/samples
compare() { # FILE MODEL DATA_DIR TASK …
    "$PYTHON" benchmarks/methods.py --output "$OUT/broadcast_$1.json" --model "$2" --data_dir "$3" \
        --task "$4" "${@:5}"
}
SETTINGS=("damping=0.03" "damping=0.3" "from=0" "from=0.25" "from=0.75" "matrices=o" "matrices=d")
SETTINGS=("${SETTINGS[@]/#/broadcast kappa=1 }")
SETTINGS=("${SETTINGS[@]/%/ passes=100}" "broadcast kappa=1 passes=100" "broadcast passes=100"
    "broadcast kappa=0.5 passes=100")
AUTO=("broadcast passes=50" "broadcast passes=100" "broadcast passes=200")

compare tiny_opt_sst2 data/tiny-opt "$SAMPLES" SST2 --at 50 100 200 400 --methods "${AUTO[@]}" \
    "broadcast passes=400" "broadcast passes=1000" "broadcast kappa=1 passes=50" \
    "broadcast kappa=1 passes=100" "broadcast kappa=1 passes=400" "broadcast kappa=1 passes=1000" \
    "broadcast kappa=1 hold=0.5 passes=50" "broadcast kappa=1 hold=0.5 passes=100" \
    "broadcast hold=0.5 passes=200" "broadcast kappa=1 hold=0.5 passes=400" \
    "broadcast kappa=1 hold=0.5 passes=1000" \
    zeroshot probing "adamw lr=1e-4" "adamw lr=3e-4" "curvature every=10"
compare tiny_opt_sst2_settings data/tiny-opt "$SAMPLES" SST2 --seeds 3 --methods "${SETTINGS[@]}"
compare smollm2_sst2 "$SMOLLM2" "$REAL" SST2 --methods "${AUTO[@]}" zeroshot probing
RATES=(smollm2_sst2_rates "$SMOLLM2" "$REAL" SST2)
compare "${RATES[@]}" --methods "broadcast passes=400" "broadcast kappa=1 passes=50" \
    "broadcast kappa=1 passes=100" "broadcast kappa=1 passes=400" \
    "broadcast kappa=1 hold=0.5 passes=100"
compare "${RATES[@]}" --seeds 0 1 --methods "broadcast kappa=1 hold=0.5 passes=400"
compare "${RATES[@]}" --at 50 100 200 400 --methods "adamw lr=3e-5" "adamw lr=3e-5 from=0.5"
# A backward pass counts as far as it goes: these took 17, 34, 67 and 134 steps.
compare "${RATES[@]}" --at 34 68 134 268 --methods "adamw lr=1e-5 from=0.5"
compare "${RATES[@]}" --at 17 34 67 134 --methods "adamw mode=head lr=1e-3"
compare "${RATES[@]}" --seeds 0 --at 17 34 67 134 --methods \
    "adamw mode=head lr=1e-2" "adamw mode=head lr=1e-4"
compare "${RATES[@]}" --seeds 0 --at 50 100 200 400 --methods "adamw lr=3e-6" \
    "hizoo lr=3e-5 alpha=1e-6" "hizoo lr=1e-4 alpha=1e-6" "fzoo lr=3e-7"
# The rule for κ comes from these.
compare smollm2_sst2_settings "$SMOLLM2" "$REAL" SST2 --seeds 3 --methods "${SETTINGS[@]}" \
    "${AUTO[@]}" "broadcast passes=400" "broadcast kappa=1 passes=50" "broadcast kappa=2 passes=50" \
    "broadcast kappa=8 passes=50" "broadcast kappa=4 passes=100" "broadcast kappa=2 passes=200" \
    "broadcast kappa=4 passes=200" "broadcast kappa=1 passes=400"
KAPPAS=("broadcast kappa=0.5 passes=100" "broadcast kappa=1 passes=100" "broadcast kappa=2 passes=100")
compare smollm2_sst2_370_settings "$SMOLLM2" "$REAL" SST2 --pool 370 --seeds 3 \
    --methods "${KAPPAS[@]}"
compare smollm2_wic_settings "$SMOLLM2" "$REAL" WIC --pool 370 --seeds 3 --methods "${KAPPAS[@]}"
compare smollm2_wic "$SMOLLM2" "$REAL" WIC --pool 370 --at 50 100 --methods \
    zeroshot "broadcast passes=100" "broadcast kappa=1 passes=100" "adamw lr=1e-5"
compare smollm2_multirc "$SMOLLM2" "$REAL" MultiRC --pool 700 --seeds 0 --at 50 100 --methods \
    "broadcast passes=100" "adamw lr=1e-5"
compare smollm2_boolq "$SMOLLM2" "$REAL" BoolQ --pool 700 --seeds 0 --at 50 100 --methods \
    zeroshot probing "broadcast kappa=1 passes=100" "adamw lr=1e-5"
compare smollm2_squad "$SMOLLM2" "$SAMPLES" SQuAD --seeds 0 --at 50 100 --methods \
    "broadcast kappa=1 passes=100" "adamw lr=1e-5"
GEMMA=(gemma3_sst2 "$GEMMA3" "$REAL" SST2)
compare "${GEMMA[@]}" --methods "${AUTO[@]}" "broadcast kappa=1 passes=100" \
    "broadcast kappa=1 hold=0.5 passes=100" zeroshot probing
compare "${GEMMA[@]}" --at 50 100 200 --methods "adamw lr=3e-6"
compare "${GEMMA[@]}" --seeds 0 --at 50 100 200 400 --methods \
    "adamw lr=1e-5" "broadcast kappa=1 passes=400"
compare gemma3_copa "$GEMMA3" "$REAL" Copa --pool 88 --seeds 0 --at 50 100 --methods \
    zeroshot "adamw lr=1e-5 from=0"
"$PYTHON" benchmarks/methods_table.py "$MEZO" \
    "$OUT"/broadcast_{smollm2_{sst2,sst2_rates,wic,multirc,boolq,squad},gemma3_{sst2,copa},tiny_opt_sst2}.json
"$PYTHON" benchmarks/methods_table.py "$OUT"/broadcast_*_settings.json
# README's picture
"$PYTHON" benchmarks/methods_table.py "$MEZO" "$OUT"/broadcast_smollm2_sst2{,_rates}.json \
    --methods "mezo lr=1e-6" "hizoo lr=1e-6 alpha=1e-6" "mezo lr=3e-5" "curvature" "adamw lr=1e-5" \
    "adamw lr=3e-5" "probing" "${AUTO[@]}" "broadcast passes=400" --plot "$OUT"/smollm2_sst2.png
