#!/usr/bin/env bash
# Fine-tune OpenAI's GPT-2 124M on GSM8K from the hub, then measure it on the unseen test split.
# N=1 bash runs/sft_gpt2.sh   on one GPU, or on a CPU if you are patient.
set -euo pipefail
cd "$(dirname "$0")/.."
N=${N:-8}

[ -f data/gsm8k/meta.json ] || python sft_data.py --source openai/gsm8k:main --out data/gsm8k
torchrun --standalone --nproc_per_node="$N" train_sft.py \
  --data data/gsm8k --init gpt2 --out out/gsm8k --eval_every 100 "$@"
torchrun --standalone --nproc_per_node="$N" evaluate.py \
  --model out/gsm8k --data openai/gsm8k:main:test --save out/gsm8k_test.jsonl
python chat.py --model out/gsm8k --prompt "Tom has 3 boxes of 12 eggs. He uses 5 eggs. How many are left?"
