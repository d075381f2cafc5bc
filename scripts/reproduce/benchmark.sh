#!/usr/bin/env bash
# Attacks by defences by models: the benchmark of docs/results.md. PLAN small (embedded digits, about 30 minutes of 2 cores) or full (GPUs,
# DATA an image folder such as CIFAR-10); PROCESSES share the cells. Can be stopped and started again.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
PLAN=${PLAN:-small}
PROCESSES=${PROCESSES:-2}
OUT=${OUT:-runs/benchmark_$PLAN}

export OMP_NUM_THREADS=1
[ -n "${DATA:-}" ] || [ -d datasets/digits ] || "$PYTHON" -m data.demo --output datasets
"$PYTHON" -m utils.launch --standalone --nproc_per_node "$PROCESSES" scripts/benchmark.py \
    --plan "configs/benchmark/$PLAN.yaml" --output "$OUT" ${DATA:+--data "$DATA"} "$@"
