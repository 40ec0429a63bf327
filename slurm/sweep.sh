#!/bin/bash
# One run per task of the array, which differ in the price of depth: sbatch slurm/sweep.sh experiment=rl_1.5b
#SBATCH --job-name=ee-sweep
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ -f slurm/site.env ]; then
  # shellcheck source=/dev/null
  . slurm/site.env
fi
lambdas=(0.1 0.25 0.5 1.0 2.0)
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-8}"
srun --kill-on-bad-exit=1 ee-megatron rl "$@" rl.lambda_exit="${lambdas[$SLURM_ARRAY_TASK_ID]}"
