#!/bin/bash
# Any stage of any experiment. Its nodes and GPUs come from the command line, as `ee-megatron STAGE ... --dry-run` prints
# them: sbatch --nodes=3 --ntasks-per-node=8 --gpus-per-node=8 slurm/stage.sh rl experiment=rl_32b [key=value ...]
#SBATCH --job-name=ee-stage
#SBATCH --nodes=1
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
run_stage "$@"
