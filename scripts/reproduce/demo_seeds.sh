#!/usr/bin/env bash
# The demo's accuracy and consistency with 3 training seeds: the first table of docs/results.md. About 20 minutes on 2 cores.
# Finished runs are kept, so it can be stopped and started again. PYTHON and OUT may be set from outside.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/demo_seeds}

export OMP_NUM_THREADS=1 # the same bits on any number of cores

"$PYTHON" -m data.demo --output datasets
for seed in 0 1 2; do
    for model in deit shuffle mjp; do
        run="$OUT/$model/$seed"
        once "$run" train.py --config "configs/train/digits_$model.yaml" --seed $seed --resume auto
        once "$run/eval" eval.py --config configs/eval/digits.yaml --checkpoint "$run/last.pt"
        once "$run/consistency" consistency.py --config configs/eval/digits.yaml --checkpoint "$run/last.pt"
    done
done
"$PYTHON" -m eval.report --runs "deit=$OUT/deit" "mjp=$OUT/mjp" "shuffle=$OUT/shuffle" --output "$OUT/tables"
