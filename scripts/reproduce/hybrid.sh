#!/usr/bin/env bash
# R-GAP and the hybrid on every target, PSNR against the security index, and the comparison with DLG and cosine matching
# in the manner of Chen and Campbell's figure: the table and figures of docs/results.md.
# IMAGES is a folder of CIFAR photographs in class folders (default: the six embedded ones). NUM: images for a target;
# EXACT_NUM: for R-GAP where linear systems determine the image; ITERATIONS, DEEPER: of the hybrid (the paper: 10000 and
# 2000). About 40 minutes on 2 cores as it stands. OPEN, EXACT, COMPARED: some of the targets (OPEN="cnn4_c3" EXACT=
# COMPARED=); KEPT=FILE takes the rows of the others from an earlier FILE.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
need_counts NUM EXACT_NUM ITERATIONS DEEPER
need_files KEPT
PYTHON=${PYTHON:-.venv/bin/python}
IMAGES=${IMAGES:-datasets/photographs}
NUM=${NUM:-5}
EXACT_NUM=${EXACT_NUM:-20}
ITERATIONS=${ITERATIONS:-2000}
DEEPER=${DEEPER:-500}
OUT=${OUT:-runs/hybrid}
FIGURES=${FIGURES:-$OUT/figures}
EXACT=${EXACT-cnn2_c1 cnn2_c5 cnn2_c11 cnn3_c3 cnn3_c9 cnn3_c31 cnn3_c32 lenet_leaky lenet2 cnn6 fcn3}
OPEN=${OPEN-cnn2_c0 cnn2_c2 cnn2_c4 cnn2_c6 cnn2_c21 cnn2_c41 cnn3_c1 cnn3_c2 cnn3_c4 cnn3_c5 cnn3_c6 cnn3_c7 cnn3_c8 cnn3_c11
    cnn3_c12 cnn3_c13 cnn3_c14 cnn3_c15 cnn3_c21 cnn3_c22 cnn3_c41 cnn3_c42 cnn4_c1 cnn4_c2 cnn4_c3 cnn6d}
COMPARED=${COMPARED-cnn2_c1 cnn2_c2 cnn4_c1 cnn4_c3}

[ -d "$IMAGES" ] || "$PYTHON" -m data.demo --output datasets

attack() { # folder, target, images, then options of attack.py
    once "$1/$2" attack.py --model "$2" --model_options.num_classes 10 --image_size 32 --mean 0.5,0.5,0.5 --std 1,1,1 \
        --seed 10 --images "$IMAGES" --num_images "$3" --resume auto "${@:4}"
}
hybrid=(--attack hybrid --attack_options.iterations "$ITERATIONS" --attack_options.deeper_iterations "$DEEPER")

for target in $EXACT; do
    attack "$OUT/index/rgap" "$target" "$EXACT_NUM" --attack rgap --dtype float64
done
for target in $OPEN; do
    attack "$OUT/index/rgap" "$target" "$NUM" --attack rgap
    attack "$OUT/index/hybrid" "$target" "$NUM" "${hybrid[@]}"
done
for target in $COMPARED; do
    attack "$OUT/compare/dlg" "$target" 2 --attack dlg --attack_options.iterations 3000
    # The hybrid's own baseline: cosine per tensor, TV at 0.01 a tensor, Adam at 1e-3 without sign, decay or box.
    attack "$OUT/compare/cosine" "$target" 2 --attack inverting_gradients --attack_options.objective local_cosine \
        --attack_options.tv 0.03 --attack_options.signed none --attack_options.boxed false --attack_options.lr 1e-3 \
        --attack_options.schedule constant --attack_options.restarts 1 --attack_options.iterations 4800
    attack "$OUT/compare/inverting_gradients" "$target" 2 --attack inverting_gradients --attack_options.restarts 1 \
        --attack_options.iterations 4800
    attack "$OUT/compare/rgap" "$target" 2 --attack rgap
    attack "$OUT/compare/hybrid" "$target" 2 --attack hybrid
done
kept=()
[ -z "${KEPT:-}" ] || kept=(--kept "$KEPT")
"$PYTHON" scripts/hybrid_figures.py --runs "$OUT" --output "$FIGURES" "${kept[@]}"
