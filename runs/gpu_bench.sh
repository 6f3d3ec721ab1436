#!/usr/bin/env bash
# GPT-2 124M, T=1024, bfloat16 on one GPU, in under 10 minutes: training, evaluation and generation;
# then nanosft beside a compiled nanoGPT-style loop with full logits, and beside TRL with packing,
# FlashAttention and Liger (without effect here: it has no kernels for GPT-2). The table names each
# peer that was left out because it is not installed.
# bash runs/gpu_bench.sh                  tables on the screen, JSON lines in out/gpu_bench.jsonl
# DATA=openai/gsm8k:main bash runs/gpu_bench.sh      the same, comparing with peers on real rows
# QUICK=1 bash runs/gpu_bench.sh          the same commands, a tiny model: a rehearsal on a CPU
set -euo pipefail
cd "$(dirname "$0")/.."
JSON=${JSON:-out/gpu_bench.jsonl}
mkdir -p "$(dirname "$JSON")"
# --batch_size: rows of 1024 tokens per forward pass; without --accumulate, that is a whole step
flags=(--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 --steps 10 --json "$JSON"
  ${QUICK:+--quick})

# compiled blocks: pretraining, and SFT with `fit`, isolated; then with gradient accumulation, which
# spreads the optimizer's share over more tokens, and a profile of one step
python -m tools.bench "${flags[@]}" --only pretrain,sft --compile --batch_size 64
python -m tools.bench "${flags[@]}" --only pretrain,sft --compile --batch_size 32 --accumulate 4 \
  --profile
# not compiled
python -m tools.bench "${flags[@]}" --only sft,evaluate,generate --batch_size 32
# nanosft and its peers, taking turns, twice
python -m tools.compare_peers "${flags[@]}" --only sft --compile --batch_size 32 --repeats 2 \
  ${DATA:+--data "$DATA"}
