#!/usr/bin/env bash
# PSNR of the closed-form attack against mask ratio, DeiT-S/16 at 224 pixels: the attack table of docs/results.md.
# IMAGES is a folder of photographs (default: the embedded six); SEEDS weight and mask draws. About 1 s an image and draw, 6 minutes in all.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
IMAGES=${IMAGES:-datasets/photographs}
NUM=${NUM:-6}
SEEDS=${SEEDS:-0 1 2}
OUT=${OUT:-runs/closed_form_curve}

[ -d "$IMAGES" ] || "$PYTHON" -m data.demo --output datasets
for sampler in block uniform; do
    for ratio in 0 0.03 0.09 0.15 0.27 0.5 0.9; do
        for seed in $SEEDS; do
            once "$OUT/$sampler/$ratio/$seed" attack.py --config configs/attack/closed_form.yaml --images "$IMAGES" \
                --num_images "$NUM" --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 --mask_sampler $sampler --mask_ratio $ratio \
                --seed "$seed" --resume auto
        done
    done
done
"$PYTHON" scripts/attack_table.py --runs "$OUT"
