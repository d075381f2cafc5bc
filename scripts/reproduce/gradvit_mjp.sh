#!/usr/bin/env bash
# The comparison that papers on MJP show: gradient matching by an attacker who does not know the mask, DeiT-S at 224 px
# with and without MJP, random weights, labels known, the image prior from half of the iterations on.
#   IMAGES=IMAGENET_SAMPLE/val scripts/reproduce/gradvit_mjp.sh                      # NUM=2: half an hour of a core
#   IMAGES=IMAGENET_SAMPLE/val ITERATIONS=120000 scripts/reproduce/gradvit_mjp.sh    # the length of GradViT's paper: a GPU
# RATIOS: the mask ratios, 0 is the model without MJP. PRIOR: a CNN with BatchNorm as timm:NAME=FILE, TRUNK: AlexNet for
# LPIPS (python scripts/prepare_weights.py efficientnet_lite0, lpips_alex). Finished attacks are kept, begun ones go on.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
need_folder IMAGES "a folder of photographs"
need_counts NUM ITERATIONS
PYTHON=${PYTHON:-.venv/bin/python}
PRIOR=${PRIOR:-timm:tf_efficientnet_lite0=datasets/weights/efficientnet_lite0.safetensors}
TRUNK=${TRUNK:-datasets/weights/lpips_alex.safetensors}
NUM=${NUM:-2}
ITERATIONS=${ITERATIONS:-300}
RATIOS=${RATIOS:-0 0.27}
PRECISION=${PRECISION:-bf16}
OUT=${OUT:-runs/gradvit_mjp}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

for ratio in $RATIOS; do
    masked=()
    [ "$ratio" = 0 ] || masked=(--mask_ratio "$ratio" --model_options.unknown true --attacker_knowledge none)
    once "$OUT/DeiT-S: gradvit/$ratio/0" attack.py --config configs/attack/gradvit.yaml --images "$IMAGES" \
        --num_images "$NUM" --lpips alex --lpips_trunk "$TRUNK" --victims_at_once 1 \
        --attack_options.iterations "$ITERATIONS" --attack_options.restarts 1 --attack_options.group 0 \
        --attack_options.precision "$PRECISION" --attack_options.image_prior_checkpoint "$PRIOR" "${masked[@]}" \
        --resume auto
done
"$PYTHON" scripts/attack_table.py --runs "$OUT" --by "model: attack" --output "$OUT.table" \
    --data "DeiT-S at 224 px, random weights, photographs, $ITERATIONS iterations, precision $PRECISION, prior ${PRIOR%%=*}"
