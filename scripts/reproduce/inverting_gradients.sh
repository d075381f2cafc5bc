#!/usr/bin/env bash
# Inverting Gradients on the networks of its paper, CIFAR-10 images, alone, in batches and behind FedAvg, and what an ATS
# policy changes on single ones.
#   DATA=CIFAR10 scripts/reproduce/inverting_gradients.sh               # PLAN=cpu, two and a half hours of a core
#   DATA=CIFAR10 PLAN=long scripts/reproduce/inverting_gradients.sh     # 20 images, about 15 hours of a core
#   DATA=CIFAR10 PLAN=paper scripts/reproduce/inverting_gradients.sh    # the paper's lengths: a GPU
# Untrained victims; CHECKPOINTS="NAME=FILE ..." attacks trained ones too. TRUNK: AlexNet for LPIPS
# (python scripts/prepare_weights.py lpips_alex). Width 32 is at the paper's settings where its name does not say
# otherwise. Every image, or batch, is kept as it is finished: stop when you like, and start again. ONLY: begin of the
# names of the victims to attack, a regular expression ('ConvNet$'). NUM: pictures of a victim, in place of the plan's;
# ITERATIONS: on single pictures and on batches at width 64, in place of the plan's.
# PRECISION=bf16 halves the time on some processors and reaches the same pictures (docs/matching.md).
# RESULT.json holds the table of what is finished; KEPT=FILE also takes in the victims of an earlier RESULT.json whose
# runs are not at hand.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
need_folder DATA "the folder of CIFAR-10, with train/ and val/"
need_counts NUM ITERATIONS
need_files KEPT TRUNK
PYTHON=${PYTHON:-.venv/bin/python}
PLAN=${PLAN:-cpu}
OUT=${OUT:-runs/inverting_gradients}
RESULT=${RESULT:-$OUT.json}
TRUNK=${TRUNK:-datasets/weights/lpips_alex.safetensors}
CHECKPOINTS=${CHECKPOINTS:-}
ONLY=${ONLY:-}
PRECISION=${PRECISION:-highest}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $PLAN in # images; iterations on ConvNet, on batches of it, on its narrow form, on ResNet20-4; images and
    # iterations of the sweep
    cpu) images=6 several=8 wide=500 batched=600 narrow=300 resnet=800 sweep=2 short=150 ;;
    long) images=20 several=24 wide=500 batched=2400 narrow=300 resnet=1600 sweep=5 short=300 ;;
    paper) images=100 several=104 wide=24000 batched=24000 narrow=24000 resnet=24000 sweep=5 short=24000 ;;
    *) echo "error: PLAN is '$PLAN': choose cpu, long or paper" >&2; exit 2 ;;
esac
images=${NUM:-$images} several=${NUM:-$several}
wide=${ITERATIONS:-$wide} batched=${ITERATIONS:-$batched} resnet=${ITERATIONS:-$resnet} single=${ITERATIONS:-$narrow}
kept=()
[ -z "${KEPT:-}" ] || kept=(--kept "$KEPT")
lpips=()
[ ! -f "$TRUNK" ] || lpips=(--lpips alex --lpips_trunk "$TRUNK")

# attack NAME IMAGES ITERATIONS [options]: the same images for every name, spread over the classes, in batches of $batch
batch=1
attack() {
    local first place run index
    [[ "$1" =~ ^($ONLY) ]] || return 0
    for ((first = 0; first < $2; first += batch)); do
        run="$OUT/$1, $3 iterations/$first"
        index=
        for ((place = first; place < first + batch; place++)); do index+=${index:+,}$((833 * place % 5000)); done
        once "$run" attack.py --config configs/attack/inverting_gradients.yaml --images "$DATA/val" \
            --index "$index" --batch_size "$batch" "${lpips[@]}" \
            --attack_options.iterations "$3" --attack_options.precision "$PRECISION" "${@:4}" --resume auto
        if [ "$run/results.json" -nt "$OUT.md" ]; then table >"$OUT.md"; fi
    done
}

data="untrained networks and batch 1 unless said, CIFAR-10, labels known, one start; width 32 at the settings of the "
data+="paper, tv 1e-4, best iterate, unless 'at the configuration'; precision $PRECISION but for those under 'kept'"
table() {
    "$PYTHON" scripts/inverting_gradients_table.py --runs "$OUT" --output "$RESULT" "${kept[@]}" --data "$data"
}

paper=(--attack_options.tv 1e-4 --attack_options.tv_form anisotropic --attack_options.lr 0.1 --attack_options.schedule step)
best=(--attack_options.keep best)
narrowed=(--model_options.width 32 "${paper[@]}" "${best[@]}")

mkdir -p "$OUT"
attack "ConvNet" $images $wide
attack "ATS 3-1-7+43-18-18, ConvNet" $images $wide --defense ats --defense_options.policies 3-1-7+43-18-18
attack "ConvNet of width 32" $images $single "${narrowed[@]}"
attack "ATS 3-1-7+43-18-18, ConvNet of width 32" $images $single "${narrowed[@]}" \
    --defense ats --defense_options.policies 3-1-7+43-18-18
configured="ConvNet of width 32 at the configuration"
attack "$configured" $images $single --model_options.width 32
attack "ResNet20-4" $images $resnet --model resnet20_4
attack "ResNet20-4, tv 1e-3" $images $resnet --model resnet20_4 --attack_options.tv 1e-3
batch=4
attack "ConvNet, batches of 4" $several $batched
attack "ConvNet of width 32, batches of 4" $several $narrow "${narrowed[@]}"
attack "$configured, batches of 4" $several $short --model_options.width 32
attack "$configured, batches of 4" $several $((4 * short)) --model_options.width 32
batch=2
fedavg=(--local_steps 2 --local_batch_size 1 --local_lr 1e-2)
attack "ConvNet, FedAvg of 2 images in 2 steps" $several $batched "${fedavg[@]}"
attack "$configured, FedAvg of 2 images in 2 steps" $several $short --model_options.width 32 \
    "${fedavg[@]}"
batch=8
attack "ConvNet, batches of 8" $several $batched
attack "$configured, batches of 8" $several $short --model_options.width 32
batch=1
for one in $CHECKPOINTS; do # NAME without blanks; the configuration's own model gives way to the checkpoint
    own=(--checkpoint "${one#*=}" --model null --model_options {})
    attack "${one%%=*} at the configuration, trained" $images $wide "${own[@]}"
    attack "${one%%=*} at the configuration, tv 1e-3, trained" $images $wide "${own[@]}" --attack_options.tv 1e-3
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
