#!/usr/bin/env bash
# Accuracy and consistency against mask ratio of several models: tables and one figure in the layout of the MJP paper.
#   MODELS="DeiT-S=deit.pth MJP=runs/mjp/last.pt Mixer=timm:mixer_b16_224" DATA=IMAGENET scripts/reproduce/ratio_curves.sh
# A model is NAME=CHECKPOINT, NAME=timm:MODEL (weights downloaded by timm) or NAME=timm:MODEL@CHECKPOINT. Default: the
# three models of `make demo`, seconds; ImageNet takes 36 forward passes a model. Finished runs are kept, so it can be
# stopped and started again. Arguments, like --limit 1000, go to both scripts.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/need.sh
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/ratio_curves}
if [ -n "${MODELS:-}" ]; then
    need DATA "the folder of the data set"
    options=(--config "${CONFIG:-configs/eval/ratio_curve.yaml}" --data.path "$DATA")
else
    MODELS="DeiT=runs/demo/deit/last.pt shuffle=runs/demo/shuffle/last.pt MJP=runs/demo/mjp/last.pt"
    options=(--config configs/eval/digits.yaml)
    [ -f runs/demo/mjp/last.pt ] || { echo "error: set MODELS and DATA, or run make demo first" >&2; exit 2; }
fi

runs=()
for entry in $MODELS; do
    name=${entry%%=*} model=${entry#*=} known=${entry#*=timm:}
    case $model in
        timm:*@*) model=(--timm "${known%%@*}" --checkpoint "${known#*@}") ;;
        timm:*) model=(--timm "$known" --pretrained) ;;
        *) model=(--checkpoint "$model") ;;
    esac
    for script in eval consistency; do
        once "$OUT/$name/$script" $script.py "${options[@]}" "${model[@]}" "$@"
    done
    runs+=("$name=$OUT/$name")
done
"$PYTHON" -m eval.report --runs "${runs[@]}" --output "$OUT/tables"
echo "tables and ratio_curves.png, ratio_curves.pdf: $OUT/tables"
