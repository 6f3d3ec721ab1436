#!/usr/bin/env bash
#SBATCH --job-name=nanosft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
# Fine-tune on several machines under Slurm. --data, --init and --out are on a shared file system.
#   sbatch runs/slurm.sh --data data/sft --out out/sft --batch_size 2
# One torchrun per machine; the first machine of the job hosts the rendezvous. A job that was killed
# and requeued continues from its latest checkpoint, because of --resume. 10 minutes before the time
# limit, Slurm sends SIGTERM: the run saves and ends, and the same sbatch command continues it.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
# From SIGTERM to SIGKILL. GPT-2 1.5B saves 18.7 GB, so 9 minutes are enough above 35 MB/s. Read by
# torch 2.12 and later; before, torchrun kills after 30 s: use --max_minutes for a model that large.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Again, because srun of Slurm 22.05 and 23.02 does not inherit it and would give all ranks one core
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${N:-8}" --rdzv_backend=c10d \
  --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$HEAD:${PORT:-29500}" train_sft.py --resume "$@"
