#!/usr/bin/env bash
# What the server of a real Flower run reconstructs, by local steps, batch size and MJP: the table and figure of
# docs/results.md. FLOWER_PYTHON is an interpreter that has flwr (docs/flower.md); IMAGES a folder of photographs. About 20 minutes of 2
# busy cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
PYTHON=${PYTHON:-.venv/bin/python}
need IMAGES "a folder of photographs, such as ImageNet val"
OUT=${OUT:-runs/flower}

export OMP_NUM_THREADS=1
"$PYTHON" scripts/flower_study.py --images "$IMAGES" --output "$OUT" "$@"
