#!/usr/bin/env bash
# The claims page from raw data: every script that a claim of docs/claims.md stands on, then the verdicts on what came out.
#   scripts/reproduce/claims.sh                                       # embedded data; about 5 hours of 2 cores (estimate)
#   CIFAR10=DIR PHOTOGRAPHS=DIR scripts/reproduce/claims.sh           # all of the page; about 8 hours (estimate)
#   PRESET=gpu CIFAR10=DIR PHOTOGRAPHS=DIR scripts/reproduce/claims.sh
#   PRESET=paper IMAGENET=DIR CORRUPTED=IMAGENET_C PHOTOGRAPHS=IMAGENET/val GPUS=8 scripts/reproduce/claims.sh
# CIFAR10 and IMAGENET have train/ and val/, PHOTOGRAPHS a folder per class. A claim whose data are not given is shown as
# not run. Finished work is kept, so it can be stopped and started again. Nothing in docs/ is written.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-.venv/bin/python}
PRESET=${PRESET:-cpu}
[[ $PRESET = cpu || $PRESET = gpu || $PRESET = paper ]] || { echo "error: PRESET must be cpu, gpu or paper, got '$PRESET'" >&2; exit 2; }
OUT=${OUT:-runs/claims_$PRESET}
CIFAR10=${CIFAR10:-} IMAGENET=${IMAGENET:-} PHOTOGRAPHS=${PHOTOGRAPHS:-}
here=scripts/reproduce
mkdir -p "$OUT/results"

keep() { cp "$1" "$OUT/results/$2.json"; }

# ablation PRESET DATA NAME: a preset of the ablation under the name of its file
ablation() {
    PRESET=$1 DATA=$2 OUT="$OUT/$3" $here/ablation.sh
    keep "$OUT/$3/ablation.json" "$3"
}

[ -d datasets/photographs ] || "$PYTHON" -m data.demo --output datasets
photographs=${PHOTOGRAPHS:-datasets/photographs}
case $PRESET in
    cpu)
        num=6 ats="--policies 60 --train_images 2000 --epochs 12"
        ablation cpu "" ablation
        [ -z "$CIFAR10" ] || ablation subset "$CIFAR10" ablation_cifar10
        trained=(RUNS="$OUT/ablation" ITERATIONS=300) ;;
    gpu)
        num=50 ats="--policies 100"
        ablation gpu "${CIFAR10:?set CIFAR10 to its folder, with train/ and val/}" ablation
        trained=(RUNS="$OUT/ablation" LABEL=CIFAR-10 IMAGES="$CIFAR10/val" BLOCKS="--min_block 3 --max_block 24" ITERATIONS=5000) ;;
    paper)
        num=50 ats="--policies 100"
        ablation paper "${IMAGENET:?set IMAGENET to its folder, with train/ and val/}" ablation
        trained=(RUNS="$OUT/ablation" LABEL=ImageNet IMAGES="$IMAGENET/val" BLOCKS="" RATIO=0.27 ITERATIONS=20000) ;;
esac

[ -f "$OUT/mechanism/mechanism.json" ] || "$PYTHON" scripts/mechanism.py --images datasets/photographs --output "$OUT/mechanism"
keep "$OUT/mechanism/mechanism.json" mechanism

RATIOS="0 0.03 0.1 0.27 0.5" IMAGES=$photographs NUM=$num OUT="$OUT/adaptive" $here/adaptive_curve.sh
keep "$OUT/adaptive_table.json" attacks_deit_small

env "${trained[@]}" OUT="$OUT/trained_attacks" $here/trained_attacks.sh
keep "$OUT/trained_attacks_table.json" trained_attacks

if [ -n "$PHOTOGRAPHS" ]; then
    IMAGES=$PHOTOGRAPHS NUM=$num OUT="$OUT/trained_deit_small" $here/trained_deit_small.sh
    for model in plain mjp; do keep "$OUT/trained_deit_small/${model}_attacks_table.json" "trained_deit_small_$model"; done
fi

if [ -n "$CIFAR10" ]; then
    # shellcheck disable=SC2086
    "$PYTHON" scripts/ats_question.py --data "$CIFAR10" --model vit --attack closed_form $ats --output "$OUT/ats_vit"
    keep "$OUT/ats_vit/results.json" ats_vit
    plan=paper
    [ "$PRESET" != cpu ] || plan=cpu
    PLAN=$plan DATA=$CIFAR10 OUT="$OUT/inverting_gradients" $here/inverting_gradients.sh
    keep "$OUT/inverting_gradients.json" inverting_gradients
fi

PLAN=small OUT="$OUT/benchmark" $here/benchmark.sh
keep "$OUT/benchmark/results.json" benchmark_small

[ -f "$OUT/results/training_step.json" ] || "$PYTHON" -m benchmarks.training --only step --batch 4 --json "$OUT/results/training_step.json"

"$PYTHON" scripts/results_page.py --files "$OUT/results" | tee "$OUT/claims.md"
