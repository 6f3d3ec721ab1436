#!/usr/bin/env bash
# GPT-2 124M, T=1024, bfloat16 on one GPU, in under 10 minutes: training and generation.
# bash runs/gpu_bench.sh             table on the screen, JSON lines in out/gpu_bench.jsonl
# QUICK=1 bash runs/gpu_bench.sh     the same commands on a tiny model: a rehearsal on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
JSON=${JSON:-out/gpu_bench.jsonl}
mkdir -p "$(dirname "$JSON")"
# batch sizes: rows of 1024 tokens that go through the model at once; here a step is one of them
bench=(python -m tools.bench --n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 --lengths 1024
  --steps 10 --json "$JSON" ${QUICK:+--quick})

for batch in 16 32 64; do # compiled blocks: pretraining beside `fit`, isolated and not; peak memory
  "${bench[@]}" --only pretrain,sft --layouts fit --compile \
    --batch_size "$batch" --rows_per_step "$batch"
done
# gradient accumulation: it spreads the optimizer's share of a step over more tokens
"${bench[@]}" --only pretrain,sft --layouts fit --compile --batch_size 32 --rows_per_step 128
# not compiled: each layout, the trained share, generation; and where one step's time goes
"${bench[@]}" --only sft,share,generate --batch_size 32 --rows_per_step 32
"${bench[@]}" --only pretrain,length --batch_size 32 --rows_per_step 32 --profile
