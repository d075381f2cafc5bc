#!/usr/bin/env bash
# What each part of MJP is worth: plain, no positions, naive shuffle, + unknown row, + index, + localization (three heads),
# MJP over training ratios. Accuracy, consistency and the naive and the adaptive attack on every trained checkpoint.
#   scripts/reproduce/ablation.sh                                  # embedded digits, 39 trainings of about 4 minutes
#   PRESET=gpu DATA=CIFAR10 scripts/reproduce/ablation.sh          # CIFAR-10, all images
#   PRESET=paper DATA=IMAGENET GPUS=8 scripts/reproduce/ablation.sh
# SEEDS are training seeds. Finished runs are kept and a stopped training continues, so it can be started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
PRESET=${PRESET:-cpu}
SEEDS=${SEEDS:-0 1 2}
OUT=${OUT:-runs/ablation_$PRESET}
case $PRESET in
    cpu)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the same bits on any number of cores
        "$PYTHON" -m data.demo --output datasets
        train=(train.py --config configs/train/digits_deit.yaml)
        evaluate=(--config configs/eval/digits.yaml)
        attack=(--config configs/attack/digits.yaml --num_images "${NUM:-10}")
        ratio=0.5 ratios="0.1 0.3 0.7 0.9" ;;
    gpu)
        : "${DATA:?set DATA to the folder of CIFAR-10, with train/ and val/}"
        train=(train.py --config configs/train/cifar10_deit.yaml --data.path "$DATA")
        evaluate=(--config configs/eval/ratio_curve.yaml --data.path "$DATA" --min_block 3 --max_block 24)
        attack=(--images "$DATA/val" --num_images "${NUM:-50}" --min_block 3 --max_block 24)
        ratio=0.5 ratios="0.03 0.1 0.27 0.3 0.7 0.9" ;;
    paper)
        : "${DATA:?set DATA to the folder of ImageNet, with train/ and val/}"
        train=(-m torch.distributed.run --standalone --nproc_per_node="${GPUS:-8}" train.py --config configs/train/deit_small.yaml --data.path "$DATA")
        evaluate=(--config configs/eval/ratio_curve.yaml --data.path "$DATA")
        attack=(--images "$DATA/val" --num_images "${NUM:-50}")
        ratio=0.27 ratios="0.03 0.1 0.3 0.5 0.7 0.9" ;;
    *) echo "error: PRESET must be cpu, gpu or paper, got '$PRESET'" >&2; exit 2 ;;
esac

unless_done() { [ -f "$1/results.json" ] || "${@:2}" --output "$1"; }

# one NAME MASK_RATIO [options of train.py]
one() {
    local name=$1 ratio=$2 attacks="closed_form adaptive"
    [ "$name" != no_positions ] || attacks=token_span # there is no position embedding whose gradient could tell
    for seed in $SEEDS; do
        run="$OUT/$name/$seed"
        unless_done "$run" "$PYTHON" "${train[@]}" --jigsaw.mask_ratio "$ratio" "${@:3}" --seed "$seed" --resume auto
        for script in eval consistency; do
            unless_done "$run/$script" "$PYTHON" $script.py "${evaluate[@]}" --checkpoint "$run/last.pt"
        done
        for each in $attacks; do
            unless_done "$run/$each" "$PYTHON" attack.py "${attack[@]}" --attack "$each" --checkpoint "$run/last.pt" \
                --mask_ratio "$ratio" --seed "$seed" --resume auto
        done
    done
}

one plain 0
one no_positions 0 --model.positions none
one shuffle "$ratio"
one unknown "$ratio" --model.unknown true
one unknown_index "$ratio" --model.unknown true --model.index_embed true
for head in linear pca nonlinear; do one "unknown_$head" "$ratio" --model.unknown true --model.localization $head; done
for share in $ratios; do one "mjp_$share" "$share" --model.unknown true --model.localization nonlinear; done
"$PYTHON" scripts/ablation_table.py --runs "$OUT" --output "$OUT/ablation"
