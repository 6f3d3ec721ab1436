#!/usr/bin/env bash
# GPT-2 124M, T=1024, bfloat16 on one GPU, in one call of at most 6 minutes: is it right, how fast
# are training, evaluation, and generation, and how fast is what people would run instead?
# Tables on the screen, JSON lines in $JSON; needs neither data nor a network.
# bash runs/gpu_bench.sh
# QUICK=1 bash runs/gpu_bench.sh      the same commands, a tiny model: a rehearsal on a CPU
# DATA=openai/gsm8k:main PEERS=full_logits,trl,transformers bash runs/gpu_bench.sh    real rows and
#     a slower peer: more than the last step has time for
# STRETCH=160 bash runs/gpu_bench.sh     160% of each limit, so 9.6 minutes: for a first, cold start
set -uo pipefail
cd "$(dirname "$0")/.." || exit
JSON=${JSON:-out/gpu_bench.jsonl}
mkdir -p "$(dirname "$JSON")"
# --batch_size: rows of 1024 tokens per forward pass; without --accumulate, that is a whole step
flags=(--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 --steps 5 --json "$JSON"
  ${QUICK:+--quick})
small=(${QUICK:+--device cpu --n_layer 1 --n_embd 32 --block_size 128})
peers=(tools.compare_peers "${flags[@]}" --compile --repeats 1)
bad=() end=0

# step NAME SECONDS MODULE FLAG…: one that fails or runs out of time does not stop the next; the
# seconds that one leaves go to the next
step() {
  local name=$1 code=0
  end=$((end + $2 * ${STRETCH:-100} / 100))
  printf '\n===== %s: from second %s to at most %s\n' "$name" "$SECONDS" "$end"
  timeout --kill-after 5 $((end - SECONDS)) python -m "${@:3}" || code=$?
  case $code in
    0) ;;
    124) bad+=("$name: out of time") ;;
    137) bad+=("$name: out of time, or killed") ;;
    *) bad+=("$name: exit code $code") ;;
  esac
}

step "versions" 20 tools.bench "${flags[@]}" --only machine
step "the GPU against the CPU" 55 tests.check_gpu --steps 10 "${small[@]}"
step "4 micro-batches of 32 rows" 75 tools.bench "${flags[@]}" --compile --batch_size 32 \
  --only pretrain,sft,evaluate,loss --accumulate 4 --profile
step "one micro-batch of 64 rows" 40 tools.bench "${flags[@]}" --compile --batch_size 64 \
  --only pretrain,sft --profile
for dtype in float32 bfloat16; do
  step "generation in $dtype" 35 "${peers[@]}" --dtype $dtype --steps 1 \
    --only generate_1,generate_16,generate_64
done
step "NCCL" 20 tests.check_nccl ${QUICK:+--device cpu}
step "training beside peers" 80 "${peers[@]}" --batch_size 32 --only sft,pretrain \
  --peers "${PEERS:-full_logits,trl}" ${DATA:+--data "$DATA"}

printf '\n===== %s seconds\n' "$SECONDS"
printf 'not complete: %s\n' "${bad[@]:-nothing}"
[ ${#bad[@]} -eq 0 ]
