#!/usr/bin/env bash
# Every image attack that fits a ViT on the trained models of the ablation, each at the ratio it was trained with: closed
# form, the attacker who knows MJP, APRIL's matching, Inverting Gradients and GradViT.
#   scripts/reproduce/ablation.sh && scripts/reproduce/trained_attacks.sh          # digits; about 15 minutes
#   RUNS=runs/ablation_gpu LABEL=CIFAR-10 IMAGES=CIFAR10/val ITERATIONS=20000 PRIOR=resnet18.pt scripts/reproduce/trained_attacks.sh
# PRIOR is a CNN with BatchNorm for GradViT's image prior; without one it goes without. Finished attacks are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/ablation_cpu}
IMAGES=${IMAGES:-datasets/digits/val}
LABEL=${LABEL:-digits} # the data, in words
NUM=${NUM:-4}
RATIO=${RATIO:-0.5}
SEED=${SEED:-0}
ITERATIONS=${ITERATIONS:-1000}
BLOCKS=${BLOCKS---min_block 2 --max_block 8}
OUT=${OUT:-runs/trained_attacks}
prior=(--attack_options.image_prior 0)
[ -z "${PRIOR:-}" ] || prior=(--attack_options.image_prior_checkpoint "$PRIOR")

[ -f "$RUNS/unknown_nonlinear/$SEED/last.pt" ] || { echo "error: '$RUNS' has no trained models: run scripts/reproduce/ablation.sh first, or set RUNS" >&2; exit 2; }

for model in plain shuffle unknown_nonlinear; do
    ratio=$RATIO
    [ "$model" != plain ] || ratio=0
    for attack in closed_form mjp_aware april_matching inverting_gradients gradvit; do
        options=()
        case $attack in *_matching | inverting_gradients | gradvit) options=(--attack_options.iterations "$ITERATIONS" --victims_at_once "$NUM") ;; esac
        [ "$attack" != gradvit ] || options+=("${prior[@]}")
        # shellcheck disable=SC2086
        once "$OUT/$model: $attack/$ratio/$SEED" attack.py --attack $attack --checkpoint "$RUNS/$model/$SEED/last.pt" \
            --images "$IMAGES" --num_images "$NUM" --mask_ratio "$ratio" $BLOCKS "${options[@]}" --resume auto
    done
done
"$PYTHON" scripts/attack_table.py --runs "$OUT" --by "model: attack" --data "$LABEL" --output "${OUT}_table"
