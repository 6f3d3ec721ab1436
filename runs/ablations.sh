#!/usr/bin/env bash
# Same data, same seed, same number of steps, one thing changed: what a choice or a mistake costs.
#
#     bash runs/ablations.sh                      # three lessons, then about 50 short runs
#     bash runs/ablations.sh --experiment bugs    # about 70: mistakes that real projects shipped
#
# Finished lessons are reused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=${ROOT:-out/ablations}
for seed in 1 2 3; do
    lesson=$ROOT/lesson_$seed
    [ -e "$lesson/results.json" ] || SEED=$seed OUT=$lesson bash runs/lesson.sh
done
# One process with one thread: the runs are too small for a second one to help.
OMP_NUM_THREADS=1 python -m tools.ablations --root "$ROOT" --seeds 1 2 3 "$@"
