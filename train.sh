#!/usr/bin/env bash
# The ImageNet recipe (300 epochs, global batch 1024) on one node or several; further options go to train.py.
#
#   DATA=/path/to/imagenet OUT=runs/deit_small_mjp ./train.sh
#   CONFIG=configs/train/deit_small.yaml DATA=... OUT=... ./train.sh --optim.amp bf16
#   NNODES=2 MASTER=host0 DATA=... OUT=... ./train.sh --data.batch_size 64        # the same command on every node
#
# GPUS processes per node (default: all GPUs, or 1), NNODES nodes (1:2 goes on with what is left), MASTER host of the
# rendezvous, PORT its port.
# Keep GPUS x NNODES x --data.batch_size at 1024 for the recipe's batch; the learning rate follows it in any case.
# An interrupted run is continued by the same command. When a process dies (a GPU fault, memory), torchrun starts all of
# them again from last.pt, at most RESTARTS times (default 3); options and losses that are wrong are not tried again.
set -euo pipefail
cd "$(dirname "$0")"
. scripts/need.sh
need DATA "the ImageNet folder that holds train/ and val/"
need OUT "the run folder"
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
CONFIG=${CONFIG:-configs/train/deit_small_mjp.yaml}
NNODES=${NNODES:-1}
RESTARTS=${RESTARTS:-3}
GPUS=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
[ "$GPUS" -gt 0 ] || GPUS=1

if [ "$NNODES" != 1 ]; then
    need MASTER "the host name of the first node"
    rendezvous=(--nnodes="$NNODES" --rdzv_backend=c10d --rdzv_endpoint="$MASTER:${PORT:-29500}" --rdzv_id="$(basename "$OUT")")
else
    rendezvous=(--standalone)
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store for every start: in the old one are the addresses of the dead
exec "$PYTHON" -m utils.launch "${rendezvous[@]}" --nproc_per_node="$GPUS" --max-restarts="$RESTARTS" \
    train.py --config "$CONFIG" --data.path "$DATA" --output "$OUT" --resume auto "$@"
