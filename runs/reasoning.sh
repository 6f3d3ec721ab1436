#!/usr/bin/env bash
# Does a model answer better if it writes down its steps? At most 10 minutes on 2 cores.
# A base model that knows single sums is fine-tuned to add up five numbers, with steps and without,
# on more and fewer examples, and with wrong answers among them.
#
#     bash runs/reasoning.sh                          # into out/reasoning, which it replaces
#     SEED=2 OUT=/tmp/reasoning bash runs/reasoning.sh
#
# SEED is that of the data and of the base model. Sizes and steps were tuned on other seeds.
set -euo pipefail
SEED=${SEED:-1}
case ${OUT:=} in "" | /*) ;; *) OUT=$PWD/$OUT ;; esac # relative to where the caller is
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-out/reasoning}
if [ -n "$(ls -A "$OUT" 2>/dev/null)" ] && [ ! -e "$OUT/text/sums.jsonl" ]; then
    echo "error: $OUT has files but is not of runs/reasoning.sh; choose another OUT" >&2
    exit 2
fi
rm -rf "$OUT"

say() { printf '\n# %s\n' "$1"; }
run() { printf '$'; printf ' %q' "$@"; echo; "$@"; }
export OMP_NUM_THREADS=1 # two processes at a time, one thread each
START=$SECONDS

say "A corpus of single sums; questions with five numbers, each with steps and with a bare answer."
run python -m data.reasoning --out "$OUT/text" --seed "$SEED"

say "Text to token ids, one per byte."
run python fineweb.py --source "$OUT/text/sums.jsonl" --encoding bytes --val_tokens 8000 \
    --out "$OUT/shards"

say "Pretraining: the model learns single sums."
run torchrun --standalone --nproc_per_node=2 train_gpt2.py --data "$OUT/shards" \
    --out "$OUT/base" --device cpu --seed "$SEED" --block_size 88 --eval_every 0 --log_every 100 \
    --n_layer 2 --n_head 4 --n_embd 128 --batch_size 7 --rows_per_step 14 --max_steps 1500 \
    --learning_rate 2e-3 --warmup_steps 100

say "The base model before fine-tuning, then each variant: chats to ids, fine-tuning, evaluation."
run python -m tools.reasoning --root "$OUT"
echo "$((SECONDS - START)) s"
