#!/usr/bin/env bash
# The attacker who knows MJP beside the naive one, DeiT-S/16 at 224 pixels, block masks: the table of docs/results.md.
# IMAGES is a folder of photographs (default: the embedded six). CHECKPOINT attacks trained weights, LABEL says in words
# which. About 40 s an image, 16 minutes for the six.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
IMAGES=${IMAGES:-datasets/photographs}
NUM=${NUM:-6}
RATIOS=${RATIOS:-0.03 0.1 0.27 0.5}
OUT=${OUT:-runs/adaptive_curve}
VICTIM=(--model deit_small)
[ -z "${CHECKPOINT:-}" ] || VICTIM=(--checkpoint "$CHECKPOINT")

[ -d "$IMAGES" ] || "$PYTHON" -m data.demo --output datasets
for ratio in $RATIOS; do
    for attack in closed_form mjp_aware; do
        once "$OUT/$attack/$ratio/0" attack.py --attack $attack "${VICTIM[@]}" --images "$IMAGES" \
            --num_images "$NUM" --mask_ratio "$ratio" --resume auto
    done
done
"$PYTHON" scripts/attack_table.py --runs "$OUT" --by attack --data "${LABEL:-random DeiT-S}" --output "${OUT}_table"
