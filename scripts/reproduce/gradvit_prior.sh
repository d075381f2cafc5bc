#!/usr/bin/env bash
# GradViT with and without its image prior, on a small trained ViT at 64 px: photographs, mean colour beside them.
#   DATA=CIFAR10 IMAGES=IMAGENET_SAMPLE/val scripts/reproduce/gradvit_prior.sh
# The victim (64 patches of 8 px) is trained on 2,000 images of CIFAR-10. PRIOR: a CNN with BatchNorm as
# timm:NAME=FILE; the default is what `python scripts/prepare_weights.py efficientnet_lite0` writes. About 15 minutes of a
# core. The paper takes 120,000 iterations. Finished attacks are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?set DATA to the folder of CIFAR-10, with train/ and val/}"
: "${IMAGES:?set IMAGES to a folder of photographs}"
PYTHON=${PYTHON:-.venv/bin/python}
PRIOR=${PRIOR:-timm:tf_efficientnet_lite0=datasets/weights/efficientnet_lite0.safetensors}
TRUNK=${TRUNK:-datasets/weights/lpips_alex.safetensors}
NUM=${NUM:-8}
ITERATIONS=${ITERATIONS:-800}
OUT=${OUT:-runs/gradvit_prior}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

victim="$OUT.victim"
[ -f "$victim/results.json" ] || "$PYTHON" train.py --config configs/train/cifar10_subset.yaml --data.path "$DATA" \
    --data.image_size 64 --data.train_images 2000 --model.patch_size 8 --model.embed_dim 96 --model.depth 3 \
    --optim.epochs 5 --resume auto --output "$victim"

# attack NAME [options]: one start for each image, so that both ways cost one search
attack() {
    local run="$OUT/$1/0/0"
    [ -f "$run/results.json" ] || "$PYTHON" attack.py --attack gradvit --checkpoint "$victim/last.pt" --images "$IMAGES" \
        --num_images "$NUM" --lpips alex --lpips_trunk "$TRUNK" --attack_options.iterations "$ITERATIONS" \
        --attack_options.restarts 1 --attack_options.group 0 "${@:2}" --resume auto --output "$run"
}

attack "without prior" --attack_options.image_prior 0
attack "with prior" --attack_options.image_prior_checkpoint "$PRIOR"
for weight in ${WEIGHTS:-0.002}; do # 0.2 is the weight for 120,000 iterations
    attack "with prior, weight $weight" --attack_options.image_prior_checkpoint "$PRIOR" --attack_options.image_prior "$weight"
done
"$PYTHON" scripts/attack_table.py --runs "$OUT" --by GradViT --output "$OUT.table" \
    --data "ViT at 64 px (64 patches) trained on 2,000 images of CIFAR-10, photographs, $ITERATIONS iterations"
