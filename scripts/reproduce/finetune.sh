#!/usr/bin/env bash
# MJP in fine-tuning: a trained ViT-S/14 at 98 px on a small part of CIFAR-10, plain, naive shuffle, MJP without and with
# the localization loss, the last three at mask ratios 0.27 and 0.5; accuracy and consistency against the mask ratio,
# accuracy on corrupted images, and what the position embeddings know.
#   DATA=CIFAR10 INIT=WEIGHTS scripts/reproduce/finetune.sh
# DATA has train/ and val/ with a folder per class. INIT: `python scripts/prepare_weights.py vit_small_patch14_saliency`
# writes it. About 3 minutes of a core for each of the 21 models, 1 hour in all. Finished runs are kept and a stopped
# training continues; seeds are the outer loop, so that whole seeds are done first. SEEDS and VARIANTS choose a part,
# OPTIONS are further options of train.py. finetune_photographs.sh is this script on photographs.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
need DATA "the folder of CIFAR-10, with train/ and val/"
[ -d "$DATA/train" ] && [ -d "$DATA/val" ] || { echo "error: '$DATA' has no train/ and val/: set DATA to a folder that has" >&2; exit 2; }
names="SEEDS VARIANTS" given=
[ -n "${COMMAND:-}" ] || names+=" SKIP EACH OPTIONS"
for name in $names; do [ -z "${!name:-}" ] || given+="$name=${!name@Q} "; done
COMMAND=$given${COMMAND:-DATA=CIFAR10 scripts/reproduce/finetune.sh}
PYTHON=${PYTHON:-.venv/bin/python}
INIT=${INIT:-datasets/weights/vit_small_patch14_saliency.safetensors}
SEEDS=${SEEDS:-0 1 2}
VARIANTS=${VARIANTS:-plain shuffle unknown unknown_nonlinear shuffle_0.5 unknown_0.5 unknown_nonlinear_0.5}
SKIP=${SKIP:-30} # validation images of a class on which the learning rate was chosen
EACH=${EACH:-40} # and those behind them, which are scored
LABEL=${LABEL:-CIFAR-10 at 98 px, a trained ViT-S/14 fine-tuned on 1,600 images for 1 epoch}
OUT=${OUT:-runs/finetune}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the same bits on any number of cores

{
    printf 'train\t%s\n' "$(realpath "$DATA")/train"
    for class in "$DATA"/val/*/; do
        find -L "$(realpath "$class")" -type f | sort | sed -n "$((SKIP + 1)),$((SKIP + EACH))p" |
            while IFS= read -r file; do printf 'val/%s/%s\t%s\n' "$(basename "$class")" "${file##*/}" "$file"; done
    done
} | link_all "$OUT.data" "$OUT.corrupted.done"
# Half of them corrupted, at 32 pixels, where strengths that were made for 224 are harsh.
[ -f "$OUT.corrupted.done" ] || "$PYTHON" scripts/prepare_imagenet_c.py --source "$OUT.data/val" --limit $((EACH * 5)) \
    --corruptions gaussian_noise defocus_blur fog jpeg_compression --severities 2 --resize 0 --size 0 --quality 95 \
    --output "$OUT.corrupted"
touch "$OUT.corrupted.done"

# one NAME SEED MASK_RATIO [options of train.py]
# shellcheck disable=SC2086
one() {
    local run="$OUT/$1/$2"
    [[ " $VARIANTS " = *" $1 "* ]] || return 0
    once "$run" train.py --config configs/train/cifar10_finetune.yaml --init "$INIT" --data.path "$OUT.data" \
        --jigsaw.mask_ratio "$3" "${@:4}" --seed "$2" --resume auto ${OPTIONS:-}
    once "$run/eval" eval.py --checkpoint "$run/last.pt" --data.path "$OUT.data" --data.crop false \
        --data.workers 0 --mask_ratios 0,0.5,0.9 --min_block 3 --max_block 24
    once "$run/consistency" consistency.py --checkpoint "$run/last.pt" --data.path "$OUT.data" --data.crop false \
        --data.workers 0 --mask_ratios 0.5,0.9 --min_block 3 --max_block 24
    once "$run/position" eval.py --suite position --checkpoint "$run/last.pt"
    once "$run/corruption" eval.py --suite imagenet-c --data.path "$OUT.corrupted" --data.crop false \
        --data.workers 0 --checkpoint "$run/last.pt"
}

for seed in $SEEDS; do
    one plain "$seed" 0
    for ratio in 0.27 0.5; do
        name=${ratio/0.27/} # runs at 0.27 go without a number
        one "shuffle${name:+_$name}" "$seed" "$ratio"
        one "unknown${name:+_$name}" "$seed" "$ratio" --model.unknown true
        one "unknown_nonlinear${name:+_$name}" "$seed" "$ratio" --model.unknown true --model.localization nonlinear
    done
    "$PYTHON" scripts/ablation_table.py --runs "$OUT" --without_attacks --output "${OUT}_table" \
        --data "$LABEL" --command "$COMMAND"
done
