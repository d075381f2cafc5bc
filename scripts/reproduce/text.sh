#!/usr/bin/env bash
# Sentences with and without MJP: accuracy over 3 seeds and recovery from gradients, the tables of docs/results.md. An hour or
# two on one core, most of it for text_dlg and tag. Finished runs are kept. PYTHON, OUT, DATA, NUM and MATCHED may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/text}
DATA=${DATA:-datasets/reviews}
NUM=${NUM:-50}         # sentences for the exact attacks
MATCHED=${MATCHED:-10} # sentences for gradient matching

export OMP_NUM_THREADS=1 # the same bits on any number of cores

[ -f "$DATA/train.csv" ] || "$PYTHON" -m data.demo --output datasets
declare -A options=(
    [plain]="--jigsaw.mask_ratio 0 --model.unknown false --model.localization none"
    [shuffle]="--model.unknown false --model.localization none"
    [mjp]=""
)
for seed in 0 1 2; do
    for model in plain shuffle mjp; do
        run="$OUT/$model/$seed"
        # shellcheck disable=SC2086
        once "$run" train.py --config configs/train/text_demo.yaml --data.path "$DATA" ${options[$model]} \
            --seed $seed --resume auto
        once "$run/eval" eval.py --data.kind text --data.path "$DATA" --data.workers 0 \
            --mask_ratios 0,0.3,0.5,0.9 --seeds 3 --checkpoint "$run/last.pt"
    done
done

attack() { # VICTIM NAME CONFIG OPTIONS...: a victim is random (the config's), or a trained model of seed 0
    local victim=$1 name=$2 config=$3 checkpoint=()
    [ "$victim" = random ] || checkpoint=(--model null --model_options '{}' --checkpoint "$OUT/$victim/0/last.pt")
    once "$OUT/attacks/$victim/$name" attack.py --config "configs/attack/$config.yaml" \
        --data.path "$DATA" "${checkpoint[@]}" --resume auto "${@:4}"
}
for config in text_token_rows text_dager; do
    for victim in random plain; do attack $victim $config-0 $config --num_images "$NUM" --mask_ratio 0; done
    attack shuffle $config-0.5 $config --num_images "$NUM" --mask_ratio 0.5
    for victim in random mjp; do
        for known in none method; do attack $victim $config-0.5-$known $config --num_images "$NUM" --mask_ratio 0.5 --attacker_knowledge $known; done
        attack $victim $config-0.5-public $config --num_images "$NUM" --mask_ratio 0.5 --data.public "$DATA/train.csv"
    done
done
for config in text_dlg text_tag; do
    attack random $config-0 $config --num_images "$MATCHED"
    for known in none method; do attack random $config-0.5-$known $config --num_images "$MATCHED" --mask_ratio 0.5 --attacker_knowledge $known; done
done
"$PYTHON" -m eval.report --runs "plain=$OUT/plain" "shuffle=$OUT/shuffle" "mjp=$OUT/mjp" --output "$OUT/tables"
"$PYTHON" scripts/text_table.py --runs "$OUT/attacks"
