#!/usr/bin/env bash
# MJP in fine-tuning: a trained ViT-S/14 at 98 px on a small part of CIFAR-10, plain, naive shuffle, MJP without and with
# the localization loss; accuracy and consistency against the mask ratio, and what the position embeddings know.
#   DATA=CIFAR10 INIT=WEIGHTS scripts/reproduce/finetune.sh
# DATA has train/ and val/ with a folder per class. INIT: `python scripts/prepare_weights.py vit_small_patch14_saliency`
# writes it. About 3 minutes of a core for each of the 12 models. Finished runs are kept and a stopped training
# continues; seeds are the outer loop, so that whole seeds are done first. RATIO=0.5 adds models of another ratio.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?set DATA to the folder of CIFAR-10, with train/ and val/}"
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-datasets/weights/vit_small_patch14_saliency.safetensors}
SEEDS=${SEEDS:-0 1 2}
VARIANTS=${VARIANTS:-plain shuffle unknown unknown_nonlinear}
RATIO=${RATIO:-0.27}
EACH=${EACH:-30} # validation images of a class
OUT=${OUT:-runs/finetune}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the same bits on any number of cores

# The validation images: the first EACH of every class.
for class in "$DATA"/val/*/; do
    part="$OUT.data/val/$(basename "$class")"
    [ -d "$part" ] || { mkdir -p "$part"; find "$(realpath "$class")" -type f | sort | head -n "$EACH" | xargs -d '\n' ln -st "$part"; }
done
ln -sfn "$(realpath "$DATA")/train" "$OUT.data/train"

unless_done() { [ -f "$1/results.json" ] || "${@:2}" --output "$1"; }

# one NAME SEED MASK_RATIO [options of train.py]
one() {
    local run="$OUT/$1/$2"
    [[ " $VARIANTS " = *" $1 "* ]] || return 0
    unless_done "$run" "$PYTHON" train.py --config configs/train/cifar10_finetune.yaml --init "$INIT" --data.path "$OUT.data" \
        --jigsaw.mask_ratio "$3" "${@:4}" --seed "$2" --resume auto
    for script in eval consistency; do
        unless_done "$run/$script" "$PYTHON" $script.py --checkpoint "$run/last.pt" --data.path "$OUT.data" --data.crop false \
            --data.workers 0 --mask_ratios 0,0.5,0.9 --min_block 3 --max_block 24
    done
    unless_done "$run/position" "$PYTHON" eval.py --suite position --checkpoint "$run/last.pt"
}

for seed in $SEEDS; do
    one plain "$seed" 0
    one shuffle "$seed" "$RATIO"
    one unknown "$seed" "$RATIO" --model.unknown true
    one unknown_nonlinear "$seed" "$RATIO" --model.unknown true --model.localization nonlinear
    "$PYTHON" scripts/ablation_table.py --runs "$OUT" --without_attacks --output "$OUT.table" \
        --data "CIFAR-10 at 98 px, a trained ViT-S/14 fine-tuned on 800 images for 2 epochs" \
        --command "DATA=CIFAR10 scripts/reproduce/finetune.sh"
done
