#!/usr/bin/env bash
# Whole batches and whole masked images by the joint attack, in single and double precision: docs/results/joint_PRESET.json;
# and whether it ever predicts an error too small: docs/results/joint_claims.json. IMAGES: a folder of photographs.
#   IMAGES=DIR scripts/reproduce/joint.sh                        # PRESET=paper, 2 h of a core
#   IMAGES=DIR BATCHES=1 scripts/reproduce/joint.sh              # the first batch of every kind: 15 min
# PRESET: paper, equal, clients; trained and half also need WEIGHTS, the file of scripts/prepare_weights.py
# vit_small_patch14_saliency. Batches that were measured are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
PYTHON=${PYTHON:-.venv/bin/python}
need IMAGES "a folder of photographs"
PRESET=${PRESET:-paper}
BATCHES=${BATCHES:-20}
OUT=${OUT:-runs/joint}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$OUT"
"$PYTHON" scripts/joint_table.py --preset "$PRESET" --images "$IMAGES" --batches "$BATCHES" \
    ${WEIGHTS:+--weights "$WEIGHTS"} --output "$OUT/joint_$PRESET.json"
"$PYTHON" scripts/joint_table.py --preset claims --output "$OUT/joint_claims.json"
