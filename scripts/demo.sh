#!/usr/bin/env bash
# The whole story on 2 cores in minutes: train three small ViTs, score them, attack them, write runs/demo/report.html.
# Finished steps are kept: run it again after an interruption. PYTHON and OUT may be set from outside.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/demo}
started=$SECONDS

step() { printf '\n== %s  (%d:%02d since start)\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
unless_done() { [ -f "$1/results.json" ] && echo "already done: $1" || "${@:2}" --output "$1"; }

step "1/5 embedded data"
"$PYTHON" -m data.demo --output datasets

for model in deit shuffle mjp; do
    step "2/5 train $model"
    unless_done "$OUT/$model" "$PYTHON" train.py --config "configs/train/digits_$model.yaml" --resume auto
done

for model in deit shuffle mjp; do
    step "3/5 accuracy and consistency of $model, clean and shuffled"
    unless_done "$OUT/$model/eval" "$PYTHON" eval.py --config configs/eval/digits.yaml --checkpoint "$OUT/$model/last.pt"
    unless_done "$OUT/$model/consistency" "$PYTHON" consistency.py --config configs/eval/digits.yaml --checkpoint "$OUT/$model/last.pt"
done

step "4/5 closed-form attack on the three models, as they train"
unless_done "$OUT/deit/attack_0" "$PYTHON" attack.py --config configs/attack/digits.yaml --resume auto --checkpoint "$OUT/deit/last.pt"
unless_done "$OUT/shuffle/attack_0.5" "$PYTHON" attack.py --config configs/attack/digits.yaml --resume auto --checkpoint "$OUT/shuffle/last.pt" --mask_ratio 0.5
for ratio in 0 0.5; do
    unless_done "$OUT/mjp/attack_$ratio" "$PYTHON" attack.py --config configs/attack/digits.yaml --resume auto --checkpoint "$OUT/mjp/last.pt" --mask_ratio $ratio
done

for ratio in 0 0.03 0.09 0.15 0.27 0.5 0.9; do
    step "5/5 closed-form attack on DeiT-S/16 at 224 pixels, mask ratio $ratio"
    unless_done "$OUT/photographs/attack_$ratio" "$PYTHON" attack.py --config configs/attack/closed_form.yaml --resume auto --images datasets/photographs --mask_ratio $ratio
done

for ratio in 0.09 0.27 0.5; do
    step "5/5 the attacker who knows MJP (joint, float64), mask ratio $ratio"
    unless_done "$OUT/photographs/joint_$ratio" "$PYTHON" attack.py --attack joint --model deit_small --dtype float64 --resume auto --images datasets/photographs --index 0,1 --mask_ratio $ratio
done

"$PYTHON" scripts/demo_report.py --runs "$OUT"
