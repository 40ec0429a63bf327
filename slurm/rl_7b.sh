#!/bin/bash
# Stage 2 of the 7B run, learner on one node and rollouts on another: sbatch slurm/rl_7b.sh [key=value ...]
#SBATCH --job-name=ee-rl-7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=slurm/common.sh
. slurm/common.sh || exit 2
run_stage rl experiment=rl_7b "$@"
