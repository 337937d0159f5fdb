#!/usr/bin/env bash
# Methods on the bundled model and samples: runs/tiny_opt_<task>.json and .png. About an hour.
#
#   bash runs/tiny_opt.sh                    SST2, RTE and SQuAD
#   bash runs/tiny_opt.sh SST2               one of them
#
# A run that stands in the JSON file is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
methods=(
    "adamw lr=1e-4" "adamw lr=1e-3"
    "mezo lr=1e-6" "mezo lr=1e-4" "mezo lr=4e-4" "mezo lr=8e-4" "mezo lr=1.6e-3" "mezo lr=3.2e-3"
    "curvature" "curvature every=10" "curvature n=2" "curvature n=4"
    "curvature alpha=1e-5" "curvature alpha=1e-4"
    "hizoo lr=8e-4 alpha=1e-8" "hizoo lr=8e-4 alpha=1e-6" "hizoo lr=8e-4 alpha=1e-5"
    "hizoo lr=8e-4 alpha=1e-4" "hizoo lr=8e-4 alpha=1e-3"
    "hizoo lr=3.2e-3 alpha=1e-5" "hizoo lr=3.2e-3 alpha=1e-4" "hizoo lr=3.2e-3 alpha=1e-3"
    "hizoo lr=8e-4 alpha=1e-5 hessian=lowrank"
    "traceless lr=8e-4 alpha=1e-5" "traceless lr=8e-4 alpha=1e-4" "traceless lr=3.2e-3 alpha=1e-4"
    "fzoo lr=1e-6" "fzoo lr=3e-6" "fzoo lr=1e-5" "fzoo lr=3e-5"
    "zo-muon lr=1e-4" "zo-muon lr=3e-4" "zo-muon lr=1e-3" "zo-muon lr=3e-3" "zo-muon lr=1e-2"
)
for task in ${*:-SST2 RTE SQuAD}; do
    python benchmarks/methods.py --task "$task" --passes 450 --points 6 \
        --methods "${methods[@]}" --output "runs/tiny_opt_${task,,}.json"
done
