#!/usr/bin/env bash
# Fine-tune on several machines: run this on each, with the same arguments except RANK_OF_MACHINE.
#   MACHINES=2 RANK_OF_MACHINE=0 HEAD=10.0.0.1 bash runs/multinode.sh --data data/sft \
#     --out out/sft --batch_size 2
# --rows_per_step (32) must be a multiple of machines x GPUs x --batch_size, here 2 x 8 x 2.
# Every machine reads the same --data and --init; the first one writes --out.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nnodes="${MACHINES:?how many machines}" --node_rank="${RANK_OF_MACHINE:?0 is the first}" \
  --nproc_per_node="${N:-8}" --master_addr="${HEAD:?address of the first machine}" \
  --master_port="${PORT:-29500}" train_sft.py "$@"
