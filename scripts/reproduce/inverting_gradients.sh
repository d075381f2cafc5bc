#!/usr/bin/env bash
# Inverting Gradients on the networks of its paper, single CIFAR-10 images, and what an ATS policy changes on them.
#   DATA=CIFAR10 scripts/reproduce/inverting_gradients.sh               # PLAN=cpu, about 80 minutes of a core
#   DATA=CIFAR10 PLAN=long scripts/reproduce/inverting_gradients.sh     # 20 images, about 6 hours of a core
#   DATA=CIFAR10 PLAN=paper scripts/reproduce/inverting_gradients.sh    # the paper's lengths: a GPU
# Untrained victims; CHECKPOINTS="NAME=FILE ..." attacks trained ones too. TRUNK: AlexNet for LPIPS
# (python scripts/prepare_weights.py lpips_alex). The rows of width 32 are at the paper's settings. Every image is kept
# as it is finished: stop when you like, and start again. ONLY: begin of the names of the victims to attack, a regular
# expression ('ConvNet$'). RESULT.json holds the table of what is finished.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${DATA:?set DATA to the folder of CIFAR-10, with train/ and val/}"
PYTHON=${PYTHON:-.venv/bin/python}
PLAN=${PLAN:-cpu}
OUT=${OUT:-runs/inverting_gradients}
RESULT=${RESULT:-$OUT.json}
TRUNK=${TRUNK:-datasets/weights/lpips_alex.safetensors}
CHECKPOINTS=${CHECKPOINTS:-}
ONLY=${ONLY:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $PLAN in # images; iterations on ConvNet, on its narrow form, on ResNet20-4; images and iterations of the sweep
    cpu) images=6 wide=500 narrow=300 resnet=800 sweep=2 short=150 ;;
    long) images=20 wide=500 narrow=300 resnet=1600 sweep=5 short=300 ;;
    paper) images=100 wide=24000 narrow=24000 resnet=24000 sweep=5 short=24000 ;;
    *) echo "error: PLAN is '$PLAN': choose cpu, long or paper" >&2; exit 2 ;;
esac
lpips=()
[ ! -f "$TRUNK" ] || lpips=(--lpips alex --lpips_trunk "$TRUNK")

# attack NAME IMAGES ITERATIONS [options]: the same images for every name, spread over the classes
attack() {
    local place run
    [[ "$1" =~ ^($ONLY) ]] || return 0
    for ((place = 0; place < $2; place++)); do
        run="$OUT/$1, $3 iterations/$place"
        [ ! -f "$run/results.json" ] || continue
        "$PYTHON" attack.py --config configs/attack/inverting_gradients.yaml --images "$DATA/val" \
            --index $((833 * place % 5000)) "${lpips[@]}" \
            --attack_options.iterations "$3" "${@:4}" --resume auto --output "$run"
        table > "$OUT.md"
    done
}

table() {
    "$PYTHON" scripts/inverting_gradients_table.py --runs "$OUT" --output "$RESULT" \
        --data "untrained networks unless said, CIFAR-10, batch 1, labels known, one start; width 32 at the settings of the paper, tv 1e-4, best iterate"
}

paper=(--attack_options.tv 1e-4 --attack_options.tv_form anisotropic --attack_options.lr 0.1 --attack_options.schedule step)
best=(--attack_options.keep best)

mkdir -p "$OUT"
attack "ConvNet" $images $wide
attack "ATS 3-1-7+43-18-18, ConvNet" $images $wide --defense ats --defense_options.policies 3-1-7+43-18-18
attack "ConvNet of width 32" $images $narrow --model_options.width 32 "${paper[@]}" "${best[@]}"
attack "ATS 3-1-7+43-18-18, ConvNet of width 32" $images $narrow --model_options.width 32 "${paper[@]}" "${best[@]}" \
    --defense ats --defense_options.policies 3-1-7+43-18-18
attack "ResNet20-4" $images $resnet --model resnet20_4
for one in $CHECKPOINTS; do
    attack "${one%%=*}, trained" $images $narrow --checkpoint "${one#*=}"
done
narrow() { attack "sweep: $1" $sweep $short --model_options.width 32 "${@:2}"; }
narrow "the configuration"
narrow "best iterate" "${best[@]}"
narrow "rate 0.1" --attack_options.lr 0.1
narrow "schedule step" --attack_options.schedule step
narrow "anisotropic" --attack_options.tv_form anisotropic
narrow "tv 3e-4" --attack_options.tv 3e-4
narrow "Adam without signs" --attack_options.signed none
narrow "the paper's, tv 1e-4" "${paper[@]}"
narrow "the paper's, tv 1e-4, best iterate" "${paper[@]}" "${best[@]}"
table
