#!/usr/bin/env bash
# Deep Leakage from Gradients and TAG on real sentences, docstrings of Python's standard library of 16 to 30 tokens (random
# small victim, labels known, one sentence a gradient): a table, and the first sentences as a figure.
#   scripts/reproduce/dlg_sentences.sh                  # DATA: a folder with train.csv and val.csv of your own sentences
# About 5 minutes of a core. NUM sentences are attacked, SHOWN of them drawn. Finished attacks are kept.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/dlg_sentences}
DATA=${DATA:-datasets/docstrings}
NUM=${NUM:-10}
SHOWN=${SHOWN:-7}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

[ -f "$DATA/train.csv" ] || "$PYTHON" -m data.docstrings --output "$DATA"
for attack in text_dlg text_tag; do
    once "$OUT/random/$attack" attack.py --config "configs/attack/$attack.yaml" \
        --data.path "$DATA" --num_images "$NUM" --resume auto
done
"$PYTHON" scripts/text_table.py --runs "$OUT/random" --output "$OUT.json" --command scripts/reproduce/dlg_sentences.sh \
    --data "random text_small of width 64 and depth 2, first sentences of docstrings of Python's standard library"
"$PYTHON" scripts/sentence_figure.py --runs "$OUT/random/text_dlg" "$OUT/random/text_tag" --titles DLG TAG \
    --number "$SHOWN" --output "$OUT.png"
