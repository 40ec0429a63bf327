#!/bin/bash
# Whether the nodes of a job work together, in two minutes: sbatch [--nodes=2 ...] slurm/check.sh [device=cpu]
#SBATCH --job-name=ee-check
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=10
#SBATCH --output=%x-%j.log
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=slurm/common.sh
. slurm/common.sh || exit 2
device=${1:-device=cuda} failed=()
[[ $device == device=cuda || $device == device=cpu ]] || fail "$device: expected device=cuda or device=cpu"

# part NAME COMMAND...: a step of the job with a deadline, and its last line, or its first error.
part() {
  local name=$1 begun=$SECONDS log=$logs/$1.log
  shift
  if timeout --kill-after=5 120 "$@" "${container[@]}" "${within[@]}" "${command[@]}" >"$log" 2>&1; then
    say "passed  $name, $((SECONDS - begun)) s: $(tail -n 1 "$log")"
  else
    failed+=("$name")
    say "FAILED  $name, $((SECONDS - begun)) s: $(grep -m 1 '^error: ' "$log" || tail -n 1 "$log"); all of it: $log"
  fi
}

prepare
count=${#hosts[@]} each=${SLURM_NTASKS_PER_NODE:-1}
logs=$PWD/runs/check/$SLURM_JOB_ID-$(date +%m%d-%H%M%S)
mkdir -p "$logs"
say "$count node(s) with $each rank(s) each; logs in $logs"
per_node=(srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --overlap)
ranks=(srun --nodes="$count" --ntasks="$((count * each))" --ntasks-per-node="$each" --overlap --kill-on-bad-exit=1)

command=(python -m tools.gpu_check.nodes node "$device" "$each")
part nodes "${per_node[@]}"
command=(python -m tools.gpu_check.nodes reduce "$device")
part all-reduce "${ranks[@]}"

job=([nodes]=$count [rollout_nodes]=$count [ray_cpus]=2 [ray_gpus]='' [start_timeout_s]=60) learner=none
start_ray
command=(python -m tools.gpu_check.nodes ray)
part Ray srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap --nodelist="${hosts[0]}"
end_ray

# The learner as it is: tensor parallel within a node, the rest of the ranks data parallel.
tensor=$((each % 2 ? 1 : 2))
command=(ee-megatron pretrain experiment=ladder model=ladder_100k "$device" "runs=$logs" task.train=300 task.validation=30
  pretrain.steps=2 "pretrain.batch_size=$((4 * count * each))" "cluster.nodes=$count" "cluster.gpus_per_node=$each"
  "parallel.tensor=$tensor" "parallel.data=$((count * each / tensor))")
part training "${ranks[@]}"

((${#failed[@]} == 0)) || { echo "error: failed: ${failed[*]}" >&2; exit 1; }
say "all parts passed"
