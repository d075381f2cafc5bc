#!/usr/bin/env bash
# Deep Leakage from Gradients on batches of 2, 4 and 8 (LeNet, CIFAR-10 pictures of different classes, labels
# hidden), a table and one figure; or second-order steps on the same.
#   IMAGES=CIFAR10/val scripts/reproduce/dlg_batches.sh                    # BATCHES="2 4" for some of them
#   ATTACK=levenberg_marquardt BATCHES="1 2" NUM=3 IMAGES=CIFAR10/val scripts/reproduce/dlg_batches.sh
# The paper's README reports 602, 1173 and 2711 steps of L-BFGS, of 20 evaluations each; an iteration here is one
# evaluation. A start of 2 takes 1 minute of a core, of 4 about 4, of 8 about 30, reckoned. Expected: a batch of 2 does
# not come back by L-BFGS (docs/results_matching.md). RESTARTS: its starts, one as it stands. NUM: batches of each size.
# Finished attacks are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
need_folder IMAGES "a folder of pictures with a folder for each class"
need_counts NUM ITERATIONS RESTARTS
PYTHON=${PYTHON:-.venv/bin/python}
ATTACK=${ATTACK:-dlg}
OUT=${OUT:-runs/${ATTACK}_batches}
BATCHES=${BATCHES:-2 4 8}
NUM=${NUM:-1}
RESTARTS=${RESTARTS:-1}
declare -A STEPS=([2]=602 [4]=1173 [8]=2711)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

runs=()
for batch in $BATCHES; do
    [ "$ATTACK" != dlg ] || [ -n "${ITERATIONS:-${STEPS[$batch]:-}}" ] ||
        { echo "error: BATCHES has '$batch': DLG's lengths are of 2, 4 and 8; set ITERATIONS for another" >&2; exit 2; }
    case $ATTACK in
        dlg)
            label="DLG, $RESTARTS start(s)"
            options=(--config configs/attack/dlg.yaml --attack_options.restarts "$RESTARTS"
                --attack_options.iterations $((20 * ${ITERATIONS:-${STEPS[$batch]}}))) ;;
        levenberg_marquardt)
            label="Levenberg-Marquardt from grey"
            options=(--config configs/attack/levenberg_marquardt_batches.yaml) ;;
        *) echo "error: ATTACK must be dlg or levenberg_marquardt, got '$ATTACK'" >&2; exit 2 ;;
    esac
    run="$OUT/batch of $batch/0/0"
    runs+=("$run")
    once "$run" attack.py "${options[@]}" --images "$IMAGES" --partition classes \
        --batch_size "$batch" --num_images $((batch * NUM)) --resume auto
done
"$PYTHON" scripts/attack_table.py --runs "$OUT" --by "$label" --output "$OUT.table" \
    --data "LeNet, $NUM batch(es) of each size, CIFAR-10 pictures of different classes, labels hidden, $label"
"$PYTHON" scripts/attack_figure.py --runs "${runs[@]}" --batches --output "$OUT.jpg"
