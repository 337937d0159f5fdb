#!/usr/bin/env bash
# What probe.py finds for the bundled model and SmolLM2-135M-Instruct: runs/probes/*.json and .png.
#
#   MODEL=DIR/SmolLM2-135M-Instruct.Q4_1.gguf DATA_DIR=DIR bash runs/probes.sh
#
# MODEL: Hub id, folder or GGUF file; default: HuggingFaceTB/SmolLM2-135M-Instruct. DATA_DIR: folder
# with sst2/train.jsonl and rte/train.jsonl; default: hub. What stands in a JSON file is not measured
# again. About a quarter of an hour on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p runs/probes
probe() { # NAME DTYPE TASK SEED ARGUMENTS
    local name=runs/probes/$1_${3,,}_$2_seed$4 folder plot=()
    [[ ! -f $name.json ]] || return 0
    [[ $4 != 0 ]] || plot=(--plot "$name.png")
    folder=$(mktemp -d)
    [[ $2 == float32 ]] || set -- "$@" "--load_$2"
    python probe.py --trainer zo --task_name "$3" --train_as_classification --num_train 1000 \
        --seed "$4" --train_set_seed "$4" --per_device_train_batch_size 16 \
        --output_dir "$folder" "${@:5}" "${plot[@]}"
    cp "$folder/probe.json" "$name.json"
    rm -r "$folder"
}
tiny=(--model_name data/tiny-opt --data_dir data/samples)
large=(--model_name "${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}")
[[ -z ${DATA_DIR:-} ]] || large+=(--data_dir "$DATA_DIR")
for seed in 0 1 2; do
    probe tiny-opt float32 SST2 $seed "${tiny[@]}"
    probe tiny-opt bfloat16 SST2 $seed "${tiny[@]}"
done
probe smollm2 float32 SST2 0 "${large[@]}"
probe smollm2 bfloat16 SST2 0 "${large[@]}"
probe smollm2 float32 RTE 0 "${large[@]}"
