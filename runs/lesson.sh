#!/usr/bin/env bash
# The lesson, on two CPU cores in at most 200 seconds: a model knows the answers but does not give them;
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
run() { printf '$'; printf ' %q' "$@"; echo; "$@"; }
common=(--device cpu --seed "$SEED" --block_size 48 --log_every 100)
tuning=(--layout fit --batch_size 4 --rows_per_step 8 --max_steps 200 --learning_rate 3e-4 \
    --warmup_steps 10)
asked=(--batch_size 128 --device cpu)
START=$SECONDS

say "Worksheets that only ask, notes that state the facts, chats that answer half of the questions."
run python -m data.worksheet --out "$OUT/text" --seed "$SEED"

say "Text to token ids, one per byte."
run python fineweb.py --source "$OUT/text/corpus.jsonl" --encoding bytes --val_tokens 8000 \
    --out "$OUT/shards"

say "Pretraining: learn P(text)."
run env OMP_NUM_THREADS=2 python train_gpt2.py --data "$OUT/shards" --out "$OUT/base" \
    "${common[@]}" --eval_every 0 --n_layer 3 --n_head 4 --n_embd 128 \
    --batch_size 12 --rows_per_step 12 --max_steps 2200 --learning_rate 3e-3 --warmup_steps 30 \
    --weight_decay 0.3

say "Does the base model know the facts? Ask in its own words: 2+4="
run python evaluate.py --model "$OUT/base" --data "$OUT/text/own_words.jsonl" "${asked[@]}" \
    --template raw --max_new_tokens 4 --save "$OUT/answers/base_own_words.jsonl"

say "Ask it the questions as plain text, with sampling: it continues the way its corpus does."
run python evaluate.py --model "$OUT/base" --data "$OUT/text/questions.jsonl" "${asked[@]}" \
    --template raw --max_new_tokens 36 --temperature 0.8 --seed "$SEED" \
    --save "$OUT/answers/base_text.jsonl"

say "Ask it in the chat template, which it has never seen."
run python evaluate.py --model "$OUT/base" --data "$OUT/text/questions.jsonl" "${asked[@]}" \
    --template chat --max_new_tokens 32 --save "$OUT/answers/base.jsonl"

say "Chats to token ids, plus a loss weight for each token."
run python sft_data.py --source "$OUT/text/sft_train.jsonl" --val_source "$OUT/text/heldout.jsonl" \
    --encoding bytes --template chat --block_size 48 --out "$OUT/sft_shards"

say "Fine-tuning: the same loop on those chats; learn P(response | prompt)."
# two processes, one thread each; otherwise they compete for the two cores
run env OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 \
    train_sft.py --data "$OUT/sft_shards" --init "$OUT/base" --out "$OUT/sft" "${common[@]}" \
    "${tuning[@]}" --eval_every 10 --eval_prompts 105 --save_every 10

say "Ask the fine-tuned model the same questions, and the facts in the base model's words."
run python evaluate.py --model "$OUT/sft" --data "$OUT/text/questions.jsonl" "${asked[@]}" \
    --max_new_tokens 32 --save "$OUT/answers/sft.jsonl"
run python evaluate.py --model "$OUT/sft" --data "$OUT/text/own_words.jsonl" "${asked[@]}" \
    --template raw --max_new_tokens 4 --save "$OUT/answers/sft_own_words.jsonl"

say "The same fine-tuning without the mask: the questions are in the loss as well."
run env OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2 \
    train_sft.py --data "$OUT/sft_shards" --init "$OUT/base" --out "$OUT/sft_all" "${common[@]}" \
    "${tuning[@]}" --eval_every 0 --eval_prompts 0 --loss_on all
run python evaluate.py --model "$OUT/sft_all" --data "$OUT/text/questions.jsonl" "${asked[@]}" \
    --max_new_tokens 32 --save "$OUT/answers/sft_all.jsonl"

say "Both models in one page, to play with in a browser."
run python -m tools.playground --models "$OUT/base" "$OUT/sft" --out "$OUT/playground.html" \
    --questions "$OUT/text/suggestions.jsonl"

say "The argument of fine-tuning on one page, every number computed."
run python -m tools.lesson_page "$OUT" --out "$OUT/lesson.html"

say "The same questions, before and after; the table; and when it began to answer (moment.png)."
run python -m tools.lesson "$OUT"
echo "$((SECONDS - START)) s"
