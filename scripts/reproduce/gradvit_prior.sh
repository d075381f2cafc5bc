#!/usr/bin/env bash
# GradViT, or GradInversion, with and without an image prior, on a small trained ViT at 64 px:
# photographs, mean colour beside.
#   DATA=CIFAR10 IMAGES=IMAGENET_SAMPLE/val scripts/reproduce/gradvit_prior.sh        # ATTACK=gradinversion for the other
# The victim (64 patches of 8 px) is trained on 2,000 images of CIFAR-10, or is VICTIM, a folder of train.py. PRIOR: a CNN
# with BatchNorm as timm:NAME=FILE; the default is what `python scripts/prepare_weights.py efficientnet_lite0` writes.
# WEIGHT: of the prior; as the attacks have it, 0.2 for GradViT and 0.1 for GradInversion, whose victims have BatchNorm
# themselves and which has no prior of another network. About 15 minutes of a core. The paper of GradViT takes 120,000
# iterations, that of GradInversion 20,000. Finished attacks are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
need DATA "the folder of CIFAR-10, with train/ and val/"
need IMAGES "a folder of photographs"
PYTHON=${PYTHON:-.venv/bin/python}
PRIOR=${PRIOR:-timm:tf_efficientnet_lite0=datasets/weights/efficientnet_lite0.safetensors}
TRUNK=${TRUNK:-datasets/weights/lpips_alex.safetensors}
NUM=${NUM:-10}
ITERATIONS=${ITERATIONS:-800}
ATTACK=${ATTACK:-gradvit}
OUT=${OUT:-runs/${ATTACK}_prior}
case $ATTACK in
    gradvit) name=GradViT own=0.2 options=() ;;
    gradinversion) name=GradInversion own=0.1 options=(--attack_options.batch_norm 0) ;;
    *) echo "error: ATTACK is '$ATTACK': choose gradvit or gradinversion" >&2; exit 2 ;;
esac
WEIGHT=${WEIGHT:-$own}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

victim=${VICTIM:-runs/gradvit_prior.victim}
[ -n "${VICTIM:-}" ] || once "$victim" train.py --config configs/train/cifar10_subset.yaml --data.path "$DATA" \
    --data.image_size 64 --data.train_images 2000 --model.patch_size 8 --model.embed_dim 96 --model.depth 3 \
    --optim.epochs 5 --resume auto

# attack NAME [options]: one start for each image, so that both ways cost one search
attack() {
    once "$OUT/$1/0/0" attack.py --attack "$ATTACK" --checkpoint "$victim/last.pt" --images "$IMAGES" \
        --num_images "$NUM" --lpips alex --lpips_trunk "$TRUNK" --attack_options.iterations "$ITERATIONS" \
        --attack_options.restarts 1 --attack_options.group 0 "${options[@]}" "${@:2}" --resume auto
}

attack "without prior" --attack_options.image_prior 0
attack "with prior" --attack_options.image_prior_checkpoint "$PRIOR" --attack_options.image_prior "$WEIGHT"
"$PYTHON" scripts/attack_table.py --runs "$OUT" --by "$name" --output "$OUT.table" \
    --data "ViT at 64 px (64 patches) trained on 2,000 images of CIFAR-10, photographs, $ITERATIONS iterations, prior ${PRIOR%%=*} with weight $WEIGHT"
"$PYTHON" scripts/attack_figure.py --runs "$OUT/without prior/0/0" "$OUT/with prior/0/0" --across --number "$NUM" \
    --output "$OUT.jpg"
