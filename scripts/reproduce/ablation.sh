#!/usr/bin/env bash
# What each part of MJP is worth: plain, no positions, naive shuffle, + unknown row, + index, + localization (three heads),
# MJP over training ratios. Of every trained checkpoint: accuracy and consistency under shuffling, errors on corrupted
# images, what its position embeddings know, the naive and the adaptive attack.
#   scripts/reproduce/ablation.sh                                  # embedded digits, 36 trainings, about 3 hours
#   PRESET=quick scripts/reproduce/ablation.sh                     # all parts once, one epoch, no numbers: 6 minutes
#   PRESET=subset DATA=CIFAR10 scripts/reproduce/ablation.sh       # 10,000 images of CIFAR-10, 9 models, about 2.5 hours
#   PRESET=gpu DATA=CIFAR10 scripts/reproduce/ablation.sh          # CIFAR-10, all images
#   PRESET=paper DATA=IMAGENET CORRUPTED=IMAGENET_C GPUS=8 scripts/reproduce/ablation.sh
# SEEDS are training seeds, VARIANTS some of the names below, PROCESSES how many models are trained at the same time.
# CORRUPTED is a folder in the layout of ImageNet-C; on digits and CIFAR-10 it is made here. Finished runs are kept and a
# stopped training continues, so it can be started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
PRESET=${PRESET:-cpu}
SEEDS=${SEEDS:-0 1 2}
VARIANTS=${VARIANTS:-}
PROCESSES=${PROCESSES:-1}
OUT=${OUT:-runs/ablation_$PRESET}
CORRUPTED=${CORRUPTED:-}
corrupt=()
case $PRESET in
    cpu)
        data="digits"
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the same bits on any number of cores
        "$PYTHON" -m data.demo --output datasets
        train=(train.py --config configs/train/digits_deit.yaml)
        evaluate=(--config configs/eval/digits.yaml)
        attack=(--config configs/attack/digits.yaml --num_images "${NUM:-10}")
        corrupt=(--source datasets/digits/val --limit 200 --severities 1 3 5)
        ratio=0.5 ratios="0.1 0.3 0.7 0.9" ;;
    quick) # does every part run? One epoch, one seed, two images
        data="digits, one epoch"
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        [ -d datasets/digits ] || "$PYTHON" -m data.demo --output datasets
        train=(train.py --config configs/train/digits_deit.yaml --optim.epochs 1 --optim.warmup_epochs 0 --jigsaw.start_epoch 0)
        evaluate=(--config configs/eval/digits.yaml --limit 50)
        attack=(--config configs/attack/digits.yaml --num_images 2)
        corrupt=(--source datasets/digits/val --limit 10 --severities 1)
        SEEDS=0 VARIANTS=${VARIANTS:-plain no_positions shuffle unknown unknown_nonlinear mjp_0.1 mjp_0.9}
        ratio=0.5 ratios="0.1 0.9" ;;
    subset)
        data="CIFAR-10, 10,000 images"
        need DATA "the folder of CIFAR-10, with train/ and val/"
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
        train=(train.py --config configs/train/cifar10_subset.yaml --data.path "$DATA")
        evaluate=(--config configs/eval/cifar10.yaml --data.path "$DATA" --limit 2000)
        attack=(--images "$DATA/val" --num_images "${NUM:-4}" --min_block 3 --max_block 24)
        corrupt=(--source "$DATA/val" --limit 200 --severities 1 3 5)
        VARIANTS=${VARIANTS:-plain shuffle unknown_nonlinear}
        ratio=0.5 ratios="" ;;
    gpu)
        data="CIFAR-10"
        need DATA "the folder of CIFAR-10, with train/ and val/"
        train=(train.py --config configs/train/cifar10_deit.yaml --data.path "$DATA")
        evaluate=(--config configs/eval/cifar10.yaml --data.path "$DATA")
        attack=(--images "$DATA/val" --num_images "${NUM:-50}" --min_block 3 --max_block 24)
        corrupt=(--source "$DATA/val" --limit 2000)
        ratio=0.5 ratios="0.03 0.1 0.27 0.3 0.7 0.9" ;;
    paper)
        data="ImageNet"
        need DATA "the folder of ImageNet, with train/ and val/"
        train=(-m utils.launch --standalone --nproc_per_node="${GPUS:-8}" train.py --config configs/train/deit_small.yaml --data.path "$DATA")
        evaluate=(--config configs/eval/ratio_curve.yaml --data.path "$DATA")
        attack=(--images "$DATA/val" --num_images "${NUM:-50}")
        ratio=0.27 ratios="0.03 0.1 0.3 0.5 0.7 0.9" ;;
    *) echo "error: PRESET must be cpu, quick, subset, gpu or paper, got '$PRESET'" >&2; exit 2 ;;
esac
if [ -z "$CORRUPTED" ] && [ ${#corrupt[@]} -gt 0 ]; then
    CORRUPTED=$OUT.corrupted # 19 corruptions at 32 pixels: ImageNet-C's strengths are made for 224, so they are harsh here
    "$PYTHON" scripts/prepare_imagenet_c.py "${corrupt[@]}" --resize 0 --size 0 --quality 95 --output "$CORRUPTED"
fi

# trained SEED NAME MASK_RATIO [options of train.py]: one model, and everything that is asked of it
trained() {
    local seed=$1 name=$2 ratio=$3 attacks="closed_form mjp_aware" free=()
    local run="$OUT/$name/$seed"
    [ "$name" != no_positions ] || { attacks=token_span; free=(--attack_options.underdetermined true); } # no position tells
    once "$run" "${train[@]}" --jigsaw.mask_ratio "$ratio" "${@:4}" --seed "$seed" --resume auto
    for script in eval consistency; do
        once "$run/$script" $script.py "${evaluate[@]}" --checkpoint "$run/last.pt"
    done
    [ "$name" = no_positions ] || once "$run/position" eval.py --suite position --checkpoint "$run/last.pt"
    [ -z "$CORRUPTED" ] || once "$run/corruption" eval.py --suite imagenet-c --data.path "$CORRUPTED" \
        --data.workers 0 --checkpoint "$run/last.pt"
    for each in $attacks; do
        once "$run/$each" attack.py "${attack[@]}" --attack "$each" "${free[@]}" --checkpoint "$run/last.pt" \
            --mask_ratio "$ratio" --seed "$seed" --resume auto
    done
}

# Each model in a process group of its own (set -m), which ends with this script: the first that fails ends all.
set -m
trap 'for model in $(jobs -p); do kill -- "-$model" 2>/dev/null || true; done' EXIT

# one NAME MASK_RATIO [options of train.py]: start the models of all seeds, PROCESSES at the same time
one() {
    [ -z "$VARIANTS" ] || [[ " $VARIANTS " = *" $1 "* ]] || return 0
    for seed in $SEEDS; do
        [ "$(jobs -pr | wc -l)" -lt "$PROCESSES" ] || wait -n
        trained "$seed" "$@" &
    done
}

one plain 0
one no_positions 0 --model.positions none
one shuffle "$ratio"
one unknown "$ratio" --model.unknown true
one unknown_index "$ratio" --model.unknown true --model.index_embed true
for head in linear pca nonlinear; do one "unknown_$head" "$ratio" --model.unknown true --model.localization $head; done
for share in $ratios; do one "mjp_$share" "$share" --model.unknown true --model.localization nonlinear; done
while [ -n "$(jobs -p)" ]; do wait -n; done
"$PYTHON" scripts/ablation_table.py --runs "$OUT" --data "$data" --output "$OUT/ablation"
