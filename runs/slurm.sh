#!/usr/bin/env bash
#SBATCH --job-name=nanosft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue
# Fine-tune on several machines under Slurm. --data, --init and --out are on a shared file system.
#   sbatch runs/slurm.sh --data data/sft --out out/sft --batch_size 2
# One torchrun per machine; the first machine of the job hosts the rendezvous. A job that was killed
# and requeued continues from its latest checkpoint, because of --resume.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${N:-8}" --rdzv_backend=c10d \
  --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$HEAD:${PORT:-29500}" train_sft.py --resume "$@"
