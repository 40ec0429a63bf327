#!/bin/bash
# One run per task of the array, each with one of several values of a setting, on one node (other shapes as for stage.sh):
# sbatch --array=0-4 slurm/sweep.sh rl rl.depth_penalty.weight=0.1,0.25,0.5,1.0,2.0 experiment=rl_1.5b [key=value ...]
#SBATCH --job-name=ee-sweep
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=slurm/common.sh
. slurm/common.sh || exit 2
[[ ${2:-} == *=*,* ]] || fail "sweep.sh: expected a stage and key=value,value,..., found: $*"
stage=$1 key=${2%%=*}
IFS=, read -ra values <<<"${2#*=}"
shift 2
task=${SLURM_ARRAY_TASK_ID:?submit with sbatch --array=0-$((${#values[@]} - 1))}
number SLURM_ARRAY_TASK_ID "$task"
((task < ${#values[@]})) || fail "task $task: there are ${#values[@]} values; use --array=0-$((${#values[@]} - 1))"
run_stage "$stage" "$@" "$key=${values[task]}"
