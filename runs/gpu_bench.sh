#!/usr/bin/env bash
# GPT-2 124M, T=1024, bfloat16 on one GPU, in under 10 minutes: training, evaluation and generation,
# then nanosft beside a compiled nanoGPT-style loop with full logits, and beside TRL with packing,
# FlashAttention and Liger (which has no kernels for GPT-2); a peer that is not installed is left
# out, and the table says so.
# bash runs/gpu_bench.sh                  tables on the screen, JSON lines in out/gpu_bench.jsonl
# DATA=openai/gsm8k:main bash runs/gpu_bench.sh      the same, with real rows beside the peers
# QUICK=1 bash runs/gpu_bench.sh          the same commands on a tiny model: a rehearsal on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
JSON=${JSON:-out/gpu_bench.jsonl}
mkdir -p "$(dirname "$JSON")"
# --batch_size: rows of 1024 tokens per forward pass; without --accumulate, that is a whole step
flags=(--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 --steps 10 --json "$JSON"
  ${QUICK:+--quick})

# compiled blocks: pretraining beside `fit`, isolated; peak memory; then with gradient accumulation,
# which spreads the optimizer's share over more tokens, and where one step's time goes
python -m tools.bench "${flags[@]}" --only pretrain,sft --compile --batch_size 64
python -m tools.bench "${flags[@]}" --only pretrain,sft --compile --batch_size 32 --accumulate 4 \
  --profile
# not compiled
python -m tools.bench "${flags[@]}" --only sft,evaluate,generate --batch_size 32
# all contenders in turn, twice
python -m tools.compare_peers "${flags[@]}" --only sft --compile --batch_size 32 --repeats 2 \
  ${DATA:+--data "$DATA"}
