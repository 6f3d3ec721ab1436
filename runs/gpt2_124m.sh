#!/usr/bin/env bash
# Pretrain GPT-2 124M on 10 B tokens of FineWeb-Edu, on one machine with 8 GPUs.
# N=1 BATCH=32 bash runs/gpt2_124m.sh   on one GPU: the same global batches, in more micro-batches.
set -euo pipefail
cd "$(dirname "$0")/.."
N=${N:-8} BATCH=${BATCH:-32}

[ -f data/fineweb/meta.json ] || python fineweb.py --out data/fineweb
# 512 rows of 1024 tokens = 0.5 M tokens per step, GPT-3's batch for this size
torchrun --standalone --nproc_per_node="$N" train_gpt2.py \
  --data data/fineweb --out out/gpt2_124m --batch_size "$BATCH" --keep 2 "$@"
