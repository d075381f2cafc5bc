#!/usr/bin/env bash
# All that is to be measured on a GPU, on one device in under 25 minutes. Every part writes OUT/PART.json; a part that has
# one is not run again, and one that was stopped continues, so that several short leases do as well as a long one.
#   DATA=CIFAR10 IMAGES=IMAGENET_SAMPLE/val scripts/gpu.sh [PART ...]      parts: see PARTS below; default all
#   PRESET=tiny DEVICE=cpu scripts/gpu.sh                                  embedded data and tiny sizes, in minutes on a CPU
# DATA: CIFAR-10 as train/ and val/ of class folders. IMAGES: photographs. PRIOR: an image prior for GradViT as
# timm:NAME=FILE (scripts/prepare_weights.py efficientnet_lite0 writes one); without it that part is left out, and said so.
# breaching, where installed, is timed beside the victims. PYTHON, OUT, DEVICE (cuda or cpu) and PRESET (full or tiny) may be set.
set -muo pipefail
cd "$(dirname "$0")/.."
. scripts/need.sh
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/gpu}
DEVICE=${DEVICE:-cuda}
PRESET=${PRESET:-full}
PARTS=(sync nccl step pipeline victims joint inverting gradvit mjp plain ats)
case $PRESET in full | tiny) ;; *) echo "PRESET '$PRESET' is neither full nor tiny" >&2; exit 2 ;; esac
case $DEVICE in cuda | cpu) ;; *) echo "DEVICE '$DEVICE' is neither cuda nor cpu" >&2; exit 2 ;; esac
for part in "$@"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "no part '$part': ${PARTS[*]}" >&2; exit 2; }
done
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "no GPU is found by torch: DEVICE=cpu runs on the processor, with PRESET=tiny" >&2
    exit 2
fi
if [ "$PRESET" = full ]; then
    need DATA "the folder of CIFAR-10, with train/ and val/"
    need IMAGES "a folder of photographs"
fi
mkdir -p "$OUT" || exit 2
if [ "$PRESET" = tiny ]; then
    [ -d "$OUT/data/digits" ] || "$PYTHON" -m data.demo --output "$OUT/data" >"$OUT/data.log" 2>&1 || exit 1
    DATA=$OUT/data/digits IMAGES=$OUT/data/photographs
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

tiny() { [ "$PRESET" = tiny ]; }
bench() { "$PYTHON" -m "benchmarks.$1" "${@:2}" --device "$DEVICE" --json "$TO.part" && mv "$TO.part" "$TO"; }
# run FOLDER COMMAND: a command with a run folder, whose results become those of the part
run() { "${@:2}" --device "$DEVICE" --resume auto --output "$OUT/$1" && cp "$OUT/$1/results.json" "$TO"; }

# Steps of training that never wait for the GPU (with a CPU: the same on tensors without values).
part_sync() {
    "$PYTHON" -m pytest -q -p no:cacheprovider tests/training/test_training_step.py -k waits_for && echo '{"passed": true}' >"$TO"
}
# One process under torchrun, whose gradients go through nccl (gloo on a CPU).
part_nccl() {
    "$PYTHON" -m data.demo --output "$OUT/data" && run nccl "$PYTHON" -m utils.launch --standalone --nproc_per_node=1 \
        train.py --config configs/train/digits_mjp.yaml --data.path "$OUT/data/digits" --optim.epochs 1 --jigsaw.start_epoch 0 \
        --data.train_images 128
}
# The step beside timm's, compiled and in bf16 (goal: a ratio of 1.01), and the share of the products' rate that it reaches.
part_step() {
    if tiny; then
        bench training --only step,limit --model deit_tiny --batch 1 --rounds 2
    else
        bench training --only step,limit --batch 256 --amp bf16 --compile --rounds 13
    fi
}
part_pipeline() {
    local size=(--number 50 --rounds 5)
    tiny && size=(--number 2 --rounds 2)
    bench pipeline --images "$IMAGES" "${size[@]}"
}
# Goals beside breaching: 8 and 4 times its speed.
part_victims() {
    if tiny; then bench victims --lenets 4 --vits 0 --iterations 3 --rounds 2; else bench victims --rounds 5; fi
}
part_joint() {
    local size=(--model vit --model_options.patch_size 32 --batch_size 3 --num_images 6)
    tiny && size=(--model vit --image_size 16 --model_options.patch_size 4 --model_options.embed_dim 96 --model_options.depth 2
        --model_options.num_heads 3 --batch_size 2 --num_images 2)
    run joint "$PYTHON" attack.py --attack joint --dtype float64 "${size[@]}" --images "$IMAGES"
}
# Inverting Gradients at the paper's length on 100 images, 25 at once; groups that are finished stay.
part_inverting() {
    local size=(--num_images 100 --victims_at_once 25 --attack_options.iterations 24000 --attack_options.precision bf16 --model convnet)
    tiny && size=(--num_images 2 --attack_options.iterations 5 --model lenet)
    run inverting "$PYTHON" attack.py --config configs/attack/inverting_gradients.yaml "${size[@]}" --images "$DATA/val"
}
part_gradvit() {
    local prior=(--attack_options.image_prior_checkpoint "${PRIOR:-}")
    if [ -z "${PRIOR:-}" ] && tiny; then
        prior=(--attack_options.image_prior 0)
    elif [ -z "${PRIOR:-}" ]; then
        echo "PRIOR is not set: GradViT needs its image prior" >&2
        return 1
    fi
    local size=(--model deit_small --num_images 4 --victims_at_once 4 --attack_options.iterations 2000)
    tiny && size=(--model vit --image_size 32 --model_options.patch_size 16 --model_options.embed_dim 24 --model_options.depth 1
        --model_options.num_heads 3 --num_images 1 --attack_options.iterations 4)
    run gradvit "$PYTHON" attack.py --attack gradvit "${size[@]}" "${prior[@]}" --attack_options.restarts 1 \
        --attack_options.group 0 --images "$IMAGES"
}
# MJP against plain on all of CIFAR-10, 20 epochs each.
cifar() {
    local size=(--optim.epochs 20 --optim.amp bf16 --augment.where device --data.batch_size 512 --jigsaw.start_epoch 2)
    tiny && size=(--optim.epochs 1 --jigsaw.start_epoch 0 --data.train_images 64 --data.batch_size 32 --data.workers 0
        --model.depth 1 --model.embed_dim 24)
    run "$1" "$PYTHON" train.py --config "configs/train/$2.yaml" --data.path "$DATA" --optim.warmup_epochs 1 "${size[@]}"
}
part_mjp() { cifar mjp cifar10_mjp; }
part_plain() { cifar plain cifar10_deit; }
# Do policies ranked by ATS beat random ones?
part_ats() {
    local size=(--model resnet20_4 --policies 30 --images 10 --iterations 2400 --epochs 20)
    tiny && size=(--model vit --attack closed_form --policies 10 --images 1 --epochs 1 --train_images 64)
    "$PYTHON" scripts/ats_question.py --data "$DATA" "${size[@]}" --device "$DEVICE" --output "$OUT/ats" &&
        cp "$OUT/ats/results.json" "$TO"
}

# Seconds of every part at most, 24 minutes in all: what takes longer is stopped, and continues the next time.
declare -A LIMIT=([sync]=40 [nccl]=40 [step]=180 [pipeline]=60 [victims]=150 [joint]=60 [inverting]=240 [gradvit]=200
    [mjp]=150 [plain]=150 [ats]=170)
export PYTHON OUT DEVICE PRESET DATA IMAGES
started=$SECONDS failed=() child=
# A part has a process group of its own, which no Ctrl-C reaches: it ends with this script.
trap '[ -z "$child" ] || kill -- "-$child" 2>/dev/null' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for part in "${@:-${PARTS[@]}}"; do
    TO=$OUT/$part.json
    if [ -s "$TO" ]; then
        echo "$part: done before ($TO)"
        continue
    fi
    began=$SECONDS
    limit=${LIMIT[$part]}
    tiny && limit=$((4 * limit)) # of a busy CPU
    part_"$part" >"$OUT/$part.log" 2>&1 &
    child=$! # leads a process group of its own
    while kill -0 $child 2>/dev/null && [ $((SECONDS - began)) -lt "$limit" ]; do sleep 0.2; done
    if kill -- -$child 2>/dev/null; then
        echo "$part: stopped after $limit s; run this again to continue"
        for _ in {1..100}; do kill -0 -- -$child 2>/dev/null && sleep 0.2; done
        kill -9 -- -$child 2>/dev/null
    fi
    wait $child
    status=$? child=
    if [ $status = 0 ] && [ -s "$TO" ]; then
        echo "$part: $TO after $((SECONDS - began)) s"
    else
        failed+=("$part")
        echo "$part: no result, see $OUT/$part.log: $(grep -v '^ *$' "$OUT/$part.log" | tail -n 1)"
    fi
done
echo "$((SECONDS - started)) s on $DEVICE ($PRESET)"
measured=()
for part in "${PARTS[@]}"; do [ -s "$OUT/$part.json" ] && measured+=("$OUT/$part.json"); done
[ ${#measured[@]} = 0 ] || "$PYTHON" -m benchmarks.verdicts "${measured[@]}"
[ ${#failed[@]} = 0 ]
