#!/usr/bin/env bash
# Whole batches and whole masked images by the joint attack, in single and double precision: docs/results/joint.json;
# and whether it ever predicts an error too small: docs/results/joint_claims.json. IMAGES: a folder of photographs.
# PRESET: cpu, equal (equal patches), masked (a quarter of an hour each on one core) or paper (hours). Batches that were
# measured are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
IMAGES=${IMAGES:?a folder of photographs}
PRESET=${PRESET:-cpu}
OUT=${OUT:-runs/joint}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

mkdir -p "$OUT"
"$PYTHON" scripts/joint_table.py --preset "$PRESET" --images "$IMAGES" --output "$OUT/joint.json"
"$PYTHON" scripts/joint_table.py --preset claims --output "$OUT/joint_claims.json"
