#!/usr/bin/env bash
# The lesson, on a CPU in about two minutes: a model knows the answers but does not give them;
# fine-tuning on half of the questions makes it answer the other half, too.
#
#     bash runs/lesson.sh                       # into out/lesson, which it replaces
#     SEED=2 OUT=/tmp/lesson bash runs/lesson.sh
#
# Sizes and steps were tuned on 2 cores (see LOG.md). The same seed gives the same result.
set -euo pipefail
SEED=${SEED:-1}
case ${OUT:=} in "" | /*) ;; *) OUT=$PWD/$OUT ;; esac # relative to where the caller is
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-out/lesson}
if [ -n "$(ls -A "$OUT" 2>/dev/null)" ] && [ ! -e "$OUT/text/corpus.jsonl" ]; then
    echo "error: $OUT has files but is not a lesson of ours; choose another OUT" >&2
    exit 2
fi
rm -rf "$OUT"

say() { printf '\n# %s\n' "$1"; }
run() { printf '$ %s\n' "$*"; "$@"; }
both() { # one thread each for the two processes, or they compete for the two cores
    run env OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 "$@"
}
common=(--device cpu --seed "$SEED" --block_size 64 --eval_every 0 --log_every 100)
asked=(--data "$OUT/text/questions.jsonl" --batch_size 128 --max_new_tokens 32 --device cpu)
START=$SECONDS

say "Worksheets that only ask, notes that state the facts, chats that answer half of the questions."
run python -m data.worksheet --out "$OUT/text" --seed "$SEED"

say "Text to token ids, one per byte."
run python fineweb.py --source "$OUT/text/corpus.jsonl" --encoding bytes --val_tokens 8000 \
    --out "$OUT/shards"

say "Pretraining: learn P(text)."
both train_gpt2.py --data "$OUT/shards" --out "$OUT/base" "${common[@]}" \
    --n_layer 3 --n_head 4 --n_embd 128 --batch_size 8 --rows_per_step 16 \
    --max_steps 900 --learning_rate 3e-3 --warmup_steps 30

say "Ask the base all questions as plain text: it continues as its corpus does."
run python evaluate.py --model "$OUT/base" "${asked[@]}" --template raw \
    --save "$OUT/answers/base_raw.jsonl"

say "Ask the base in the chat template, which it has never seen."
run python evaluate.py --model "$OUT/base" "${asked[@]}" --template chat \
    --save "$OUT/answers/base.jsonl"

say "Chats to token ids, with a second row for the loss weight of each."
run python sft_data.py --source "$OUT/text/sft_train.jsonl" --val_source "$OUT/text/heldout.jsonl" \
    --encoding bytes --template chat --block_size 64 --out "$OUT/sft_shards"

say "Fine-tuning: the same loop on those chats; learn P(response | prompt)."
both train_sft.py --data "$OUT/sft_shards" --init "$OUT/base" --out "$OUT/sft" "${common[@]}" \
    --layout fit --batch_size 4 --rows_per_step 8 --max_steps 200 --learning_rate 3e-4 \
    --warmup_steps 10

say "Ask the fine-tuned model the same questions."
run python evaluate.py --model "$OUT/sft" "${asked[@]}" --save "$OUT/answers/sft.jsonl"

say "Loss, learning rate and gradient norm of both runs."
run python -m tools.plot "$OUT/base/metrics.jsonl" "$OUT/sft/metrics.jsonl" --out "$OUT/loss.png"

say "The same questions, before and after; and the table."
run python -m data.worksheet --report "$OUT" --picture "$OUT/before_after.svg"
echo "$((SECONDS - START)) s"
