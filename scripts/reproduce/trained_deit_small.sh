#!/usr/bin/env bash
# Naive and adaptive attack on trained ViTs of the paper's shape, DeiT-S/16 at 224 pixels, plain and MJP (ratio 0.27).
#   IMAGES=IMAGENET_SAMPLE/val scripts/reproduce/trained_deit_small.sh      # about an hour on 2 cores; keeps finished work
#   PLAIN=plain.pt MJP=mjp.pt IMAGES=IMAGENET/val NUM=50 scripts/reproduce/trained_deit_small.sh
# IMAGES has a folder per class. Without checkpoints of your own, two models are trained on every other class of it.
set -euo pipefail
shopt -s inherit_errexit # a training that fails ends this, too
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
need IMAGES "a folder of photographs with a folder per class"
[ -n "$(find -L "$IMAGES" -mindepth 2 -maxdepth 2 -type f -print -quit 2>/dev/null)" ] || {
    echo "error: '$IMAGES' has no images in class folders: set IMAGES to a folder like ImageNet's val" >&2
    exit 2
}
PYTHON=${PYTHON:-.venv/bin/python}
NUM=${NUM:-6}
LABEL=${LABEL:-6 epochs on 250 photographs} # how the models were trained, in words
RATIOS=${RATIOS:-0.1 0.27 0.5}
OUT=${OUT:-runs/trained_deit_small}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the same bits on any number of cores

# trained NAME OPTIONS: the checkpoint of a model trained here
trained() {
    mkdir -p "$OUT/data/train"
    find "$OUT/data" -maxdepth 2 -type l -delete # made anew: IMAGES may have been another folder
    find "$(realpath "$IMAGES")" -mindepth 1 -maxdepth 1 -type d | sort | sed -n 'p;n' | xargs -d '\n' ln -st "$OUT/data/train"
    ln -s train "$OUT/data/val" # accuracy on the training images: whether anything was learned at all
    once "$OUT/$1" train.py --config configs/train/deit_small_sample.yaml --data.path "$OUT/data" "${@:2}" --resume auto >&2
    echo "$OUT/$1/last.pt"
}

# attack MODEL CHECKPOINT RATIOS
attack() {
    CHECKPOINT=$2 RATIOS=$3 LABEL="DeiT-S, $LABEL" OUT="$OUT/$1_attacks" NUM=$NUM IMAGES=$IMAGES scripts/reproduce/adaptive_curve.sh
}

[ -n "${PLAIN:-}" ] || PLAIN=$(trained plain)
[ -n "${MJP:-}" ] || MJP=$(trained mjp --jigsaw.mask_ratio 0.27 --model.unknown true --model.localization nonlinear)
attack plain "$PLAIN" 0
attack mjp "$MJP" "0 $RATIOS"
