#!/usr/bin/env bash
# MJP in fine-tuning on photographs: the models of finetune.sh on photographs of ImageNet, animals against the rest.
#   IMAGES=IMAGENET/val INIT=WEIGHTS scripts/reproduce/finetune_photographs.sh
# IMAGES has a folder per class, named by its WordNet id; the first photograph of each is taken. One a class is too few to
# learn classes from, so there are two: animals (ids to n02655020) and as many of the others, spread over all of them. Of
# ten photographs three are for validation. About 3 minutes of a core for each of the 21 models (at 398 photographs).
# Finished runs are kept and a stopped training continues; SEEDS and VARIANTS choose a part.
set -euo pipefail
. "$(dirname "$0")/../need.sh"
need IMAGES "photographs of ImageNet, with a folder per class named by its WordNet id"
export INIT=${INIT:+$(realpath "$INIT")}
shopt -s nullglob
classes=("$(realpath -m "$IMAGES")"/n[0-9]*/)
cd "$(dirname "$0")/../.."
export OUT=${OUT:-runs/finetune_photographs} SKIP=0 EACH=1000
export DATA=$OUT.animals COMMAND="IMAGES=IMAGENET/val scripts/reproduce/finetune_photographs.sh"
export LABEL="photographs at 98 px, animal or not, a trained ViT-S/14 fine-tuned for 6 epochs"
export OPTIONS="--data.train_images null --optim.epochs 6"

# group NAME FOLDER...: say, for link_all, where in train/NAME or val/NAME the first photograph of each folder belongs
group() {
    local name=$1 number=0 part folder photographs
    shift
    for folder; do
        part=train
        [[ $((number % 10)) != [369] ]] || part=val
        photographs=("$folder"*)
        printf '%s\t%s\n' "$part/$name/$(basename "$folder")_$(basename "${photographs[0]}")" "${photographs[0]}"
        number=$((number + 1))
    done
}

animals=() others=() as_many=()
for class in "${classes[@]}"; do
    if [[ $(basename "$class") < n02655021 ]]; then animals+=("$class"); else others+=("$class"); fi
done
[ ${#animals[@]} -ge 10 ] && [ ${#others[@]} -ge ${#animals[@]} ] || {
    echo "error: $IMAGES has ${#animals[@]} classes of animals and ${#others[@]} others; at least 10 are needed, and as many others" >&2
    exit 2
}
for ((number = 0; number < ${#animals[@]}; number++)); do
    as_many+=("${others[number * ${#others[@]} / ${#animals[@]}]}")
done
{
    group animal "${animals[@]}"
    group other "${as_many[@]}"
} | link_all "$DATA" "$OUT.corrupted.done"
exec scripts/reproduce/finetune.sh
