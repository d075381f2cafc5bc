#!/usr/bin/env bash
# Real sentences and a trained text model: MiniLM-L6 with a new classifier, sentences of Python's docstrings (data/docstrings.py),
# with and without MJP. About 5 minutes of a core, and 3 more for every sentence of TAG; finished runs are kept.
#   scripts/reproduce/text_minilm.sh          # after: python scripts/prepare_weights.py minilm_l6
# DATA is a folder with train.csv and val.csv of your own sentences.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/once.sh
PYTHON=${PYTHON:-.venv/bin/python}
WEIGHTS=${WEIGHTS:-datasets/weights/minilm_l6.safetensors}
OUT=${OUT:-runs/text_minilm}
DATA=${DATA:-datasets/docstrings}
NUM=${NUM:-20}    # sentences for token_rows
DAGER=${DAGER:-8} # sentences for dager
TAG=${TAG:-8}     # sentences for tag, at its own 1,000 iterations

export OMP_NUM_THREADS=1 # the same bits on any number of cores
[ -f "$DATA/train.csv" ] || "$PYTHON" -m data.docstrings --output "$DATA"

attack() { # NAME SENTENCES MASK_RATIO OPTIONS...
    once "$OUT/MiniLM/$1-$3" attack.py --attack "$1" --checkpoint "$WEIGHTS" --model_options.num_classes 2 \
        --data.kind text --data.path "$DATA" --num_images "$2" --mask_ratio "$3" "${@:4}" --resume auto
}
attack token_rows "$NUM" 0
attack token_rows "$NUM" 0.27 --model_options.unknown true
attack dager "$DAGER" 0
attack dager "$DAGER" 0.27 --model_options.unknown true
attack tag "$TAG" 0
attack tag "$TAG" 0.27 --model_options.unknown true
"$PYTHON" scripts/text_table.py --runs "$OUT" --output "$OUT.json" --command scripts/reproduce/text_minilm.sh \
    --data "MiniLM-L6 with a new classifier, first sentences of docstrings of Python's standard library"
