#!/usr/bin/env bash
# The claims page from raw data: every script that a claim of docs/claims.md stands on, then the verdicts on what came out.
#   PRESET=quick scripts/reproduce/claims.sh                          # every part once, tiny; about 20 minutes of a core
#   scripts/reproduce/claims.sh                                       # embedded data; about 75 minutes of 2 idle cores
#   CIFAR10=DIR PHOTOGRAPHS=DIR WEIGHTS=FILE scripts/reproduce/claims.sh   # all of the page; about 14 hours (estimate)
#   PRESET=gpu CIFAR10=DIR PHOTOGRAPHS=DIR scripts/reproduce/claims.sh
#   PRESET=paper IMAGENET=DIR CORRUPTED=IMAGENET_C PHOTOGRAPHS=IMAGENET/val GPUS=8 scripts/reproduce/claims.sh
# CIFAR10 and IMAGENET have train/ and val/, PHOTOGRAPHS a folder per class (400 images or more), WEIGHTS is the trained
# ViT-S/14 of scripts/prepare_weights.py. A claim whose data are not given is shown as not run. PROCESSES is how many models
# are trained, and cells of a benchmark attacked, at the same time. Finished work is kept, so it can be stopped and started
# again. Nothing in docs/ is written.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
export PYTHON=${PYTHON:-.venv/bin/python} PROCESSES=${PROCESSES:-2}
PRESET=${PRESET:-cpu}
[[ $PRESET =~ ^(quick|cpu|gpu|paper)$ ]] || { echo "error: PRESET must be quick, cpu, gpu or paper, got '$PRESET'" >&2; exit 2; }
[ "$PRESET" != gpu ] || need CIFAR10 "its folder, with train/ and val/"
[ "$PRESET" != paper ] || need IMAGENET "its folder, with train/ and val/"
OUT=${OUT:-runs/claims_$PRESET}
CIFAR10=${CIFAR10:-} IMAGENET=${IMAGENET:-} PHOTOGRAPHS=${PHOTOGRAPHS:-} WEIGHTS=${WEIGHTS:-}
here=scripts/reproduce
mkdir -p "$OUT/results"

keep() { cp "$1" "$OUT/results/$2.json"; }

# part NAME: say what starts, and what all before it has cost: the second line of `times` is of finished children
part() {
    local spent
    times >"$OUT/times"
    spent=$(sed -n 2p "$OUT/times")
    echo "== $* ($(date +%H:%M), processor time so far: $spent)"
}

# ablation PRESET DATA NAME: a preset of the ablation under the name of its file; of digits and ImageNet the models of
# claims, a part of all
ablation() {
    local variants="plain no_positions shuffle unknown unknown_nonlinear mjp_0.1 mjp_0.9"
    [ "$1" != subset ] || variants=""
    part "ablation $1"
    PRESET=$1 DATA=$2 VARIANTS=${VARIANTS:-$variants} OUT="$OUT/$3" $here/ablation.sh
    keep "$OUT/$3/ablation.json" "$3"
}

[ -d datasets/photographs ] || "$PYTHON" -m data.demo --output datasets
photographs=${PHOTOGRAPHS:-datasets/photographs}
num=6 leaks=4 length=300 step="--batch 4" ats="--policies 60 --train_images 2000 --epochs 12" small=small decide=decide
case $PRESET in
    quick)
        num=1 leaks=1 length=3 step="--batch 1 --rounds 2" ats="--policies 6 --images 2 --train_images 200 --epochs 1"
        small="" decide=quick
        ablation quick "" ablation
        trained=(RUNS="$OUT/ablation" NUM=1 ITERATIONS=$length) ;;
    cpu)
        ablation cpu "" ablation
        [ -z "$CIFAR10" ] || ablation subset "$CIFAR10" ablation_cifar10
        trained=(RUNS="$OUT/ablation" ITERATIONS=$length) ;;
    gpu)
        num=50 ats="--policies 100"
        ablation gpu "$CIFAR10" ablation
        trained=(RUNS="$OUT/ablation" LABEL=CIFAR-10 IMAGES="$CIFAR10/val" BLOCKS="--min_block 3 --max_block 24" ITERATIONS=5000) ;;
    paper)
        num=50 ats="--policies 100"
        PROCESSES=1 # a training has all GPUs
        ablation paper "$IMAGENET" ablation
        trained=(RUNS="$OUT/ablation" LABEL=ImageNet IMAGES="$IMAGENET/val" BLOCKS="" RATIO=0.27 ITERATIONS=20000) ;;
esac

part mechanism
[ -f "$OUT/mechanism/mechanism.json" ] || "$PYTHON" scripts/mechanism.py --images datasets/photographs --num_images "$num" \
    --output "$OUT/mechanism"
keep "$OUT/mechanism/mechanism.json" mechanism

part "adaptive curve"
RATIOS="0 0.03 0.1 0.27 0.5" IMAGES=$photographs NUM=$num OUT="$OUT/adaptive" $here/adaptive_curve.sh
keep "$OUT/adaptive_table.json" attacks_deit_small

part "attacks on trained models"
env "${trained[@]}" OUT="$OUT/trained_attacks" $here/trained_attacks.sh
keep "$OUT/trained_attacks_table.json" trained_attacks

if [ -n "$PHOTOGRAPHS" ]; then
    if [ "$PRESET" != quick ]; then
        part "trained DeiT-S"
        IMAGES=$PHOTOGRAPHS NUM=$num OUT="$OUT/trained_deit_small" $here/trained_deit_small.sh
        for model in plain mjp; do keep "$OUT/trained_deit_small/${model}_attacks_table.json" "trained_deit_small_$model"; done
    fi
    part "batches, clients and classifiers"
    for number in 2 4 5 8; do
        "$PYTHON" scripts/joint_study.py --study defenses --only "batch of $number | float64" --images "$PHOTOGRAPHS" \
            --number "$leaks" --output "$OUT/results/joint_defenses.json"
    done
    for number in 2 3; do
        for steps in "1" "2 | rate 1e-05"; do
            "$PYTHON" scripts/joint_study.py --study clients --only "clients $number | steps $steps" --images "$PHOTOGRAPHS" \
                --number "$leaks" --output "$OUT/results/joint_clients.json"
        done
    done
    [ -f "$OUT/results/class_features.json" ] || "$PYTHON" scripts/class_features_study.py --images "$PHOTOGRAPHS" \
        --output "$OUT/results/class_features.json"
fi

if [ -n "$CIFAR10" ]; then
    part "policies of ATS"
    # shellcheck disable=SC2086
    "$PYTHON" scripts/ats_question.py --data "$CIFAR10" --model vit --attack closed_form $ats --output "$OUT/ats_vit"
    keep "$OUT/ats_vit/results.json" ats_vit
fi
if [ -n "$CIFAR10" ] && [ "$PRESET" != quick ]; then
    part "Inverting Gradients"
    plan=paper
    [ "$PRESET" != cpu ] || plan=cpu
    PLAN=$plan DATA=$CIFAR10 OUT="$OUT/inverting_gradients" $here/inverting_gradients.sh
    keep "$OUT/inverting_gradients.json" inverting_gradients
fi
if [ -n "$CIFAR10" ] && [ -n "$WEIGHTS" ] && [ "$PRESET" != quick ]; then
    part fine-tuning
    DATA=$CIFAR10 INIT=$WEIGHTS $here/finetune.sh # in runs/finetune, where the plan of the benchmark looks for it
    keep runs/finetune_table.json finetune
fi

if [ -n "$small" ]; then
    part "benchmark of defences"
    PLAN=small OUT="$OUT/benchmark" $here/benchmark.sh
    keep "$OUT/benchmark/results.json" benchmark_small
fi
part "benchmark that decides"
models=(vit96_trained vit96_random)
# The plan looks for the first two below datasets/.
[ -z "$PHOTOGRAPHS" ] || [ ! -d datasets/imagenet_sample/val ] || models+=(deit_tiny_random vit_s14_random)
[ -z "$WEIGHTS" ] || [ ! -f datasets/weights/vit_small_patch14_saliency.safetensors ] || models+=(vit_s14_trained)
[ -z "$PHOTOGRAPHS" ] || [ ! -d datasets/imagenet_sample/val ] || [ ! -f runs/finetune/unknown_nonlinear/0/last.pt ] || models+=(vit_s14_finetuned)
PLAN=$decide OUT="$OUT/decide" $here/benchmark.sh --models "${models[@]}"
keep "$OUT/decide/results.json" benchmark_decide

part "a training step"
# shellcheck disable=SC2086
[ -f "$OUT/results/training_step.json" ] || "$PYTHON" -m benchmarks.training --only step $step --json "$OUT/results/training_step.json"

part verdicts
"$PYTHON" scripts/results_page.py --files "$OUT/results" | tee "$OUT/claims.md"
