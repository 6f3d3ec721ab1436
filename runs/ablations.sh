#!/usr/bin/env bash
# Same data, same seed, same number of steps, one flag changed: what each choice is worth.
#
#     bash runs/ablations.sh            # three lessons, then about 50 short runs
#
# Lessons that are there already are used again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=${ROOT:-out/ablations}
for seed in 1 2 3; do
    [ -e "$ROOT/lesson_$seed/results.json" ] || SEED=$seed OUT=$ROOT/lesson_$seed bash runs/lesson.sh
done
# One process with one thread: the runs are too small for two to be faster.
OMP_NUM_THREADS=1 python runs/ablations.py --root "$ROOT" --seeds 1 2 3
