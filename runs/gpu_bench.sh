#!/usr/bin/env bash
# GPT-2 124M, T=1024, bfloat16 on one GPU, in under 10 minutes: training, evaluation and generation,
# then nanosft beside a compiled nanoGPT-style loop with full logits, and beside TRL with packing,
# FlashAttention and Liger, where they are installed.
# bash runs/gpu_bench.sh                       tables on the screen, JSON lines in out/gpu_bench.jsonl
# DATA=openai/gsm8k:main bash runs/gpu_bench.sh        the same, real rows in the comparison
# QUICK=1 bash runs/gpu_bench.sh               the same commands on a tiny model: a rehearsal on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
JSON=${JSON:-out/gpu_bench.jsonl}
mkdir -p "$(dirname "$JSON")"
size=(--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 --steps 10 --json "$JSON"
  ${QUICK:+--quick})
# batch sizes: rows of 1024 tokens that go through the model at once; here a step is one of them
bench=(python -m tools.bench "${size[@]}")

for batch in 16 64; do # compiled blocks: pretraining beside `fit`, isolated; peak memory
  "${bench[@]}" --only pretrain,sft --compile --batch_size "$batch"
done
# where one step's time goes; gradient accumulation spreads the optimizer's share over more tokens
"${bench[@]}" --only pretrain,sft --compile --batch_size 32 --profile
"${bench[@]}" --only pretrain,sft --compile --batch_size 32 --accumulate 4
# not compiled: each layout, the trained share, evaluation, generation
"${bench[@]}" --only layouts,share,evaluate,generate --batch_size 32
# the peers, in turn; a peer that is not installed is left out, and the table says so
python -m tools.compare_peers "${size[@]}" --only sft --compile --batch_size 32 \
  ${DATA:+--data "$DATA"}
