#!/usr/bin/env bash
# Kill, stop, starve and damage small runs on a CPU; about 12 minutes. The last lines are a table.
#   bash runs/torture.sh [kills restarts stops full_disk damage hosts eight steps]
# As root it also fills a small disk and cuts the cable between two network namespaces.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:tests OMP_NUM_THREADS=1
exec python -m tests.torture "$@"
