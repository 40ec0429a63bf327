#!/bin/bash
# ray_node.sh head|worker CPUS GPUS SECONDS: Ray on this node until it is ended. It hands out CPUS cores and GPUS (4,5,6,7
# or nothing: places among those that the job has here); a worker waits SECONDS for the head.
set -euo pipefail
# Meant for the ranks, who need their actors until they have stopped.
trap '' USR1 USR2
role=$1 cpus=$2 gpus=$3 patience=$4
if ! [[ $cpus =~ ^[0-9]+$ && $patience =~ ^[0-9]+$ && $gpus =~ ^([0-9]+(,[0-9]+)*)?$ && $EE_RAY_HEAD =~ ^[^:]+:[0-9]+$ ]]; then
  echo "error: ray_node.sh: expected head|worker CPUS GPUS SECONDS and EE_RAY_HEAD=address:port, found: $* ${EE_RAY_HEAD:-}" >&2
  exit 2
fi
address=$(slurm/node_address.sh)
devices=()
if [[ -n $gpus ]]; then
  IFS=, read -ra devices <<<"$gpus"
  # By Slurm's own names, where it gives any: on a node that jobs share, this job's GPUs need not begin with 0, and slices
  # (MIG) have no number.
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra names <<<"$CUDA_VISIBLE_DEVICES"
    for place in "${!devices[@]}"; do
      if [[ -z ${names[devices[place]]:-} ]]; then
        echo "error: $(hostname): GPUs $gpus asked for, CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#names[@]};" \
          "let every step see all GPUs of its node (no --gpus-per-task, no --gpu-bind)" >&2
        exit 2
      fi
      devices[place]=${names[devices[place]]}
    done
  fi
fi
CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${devices[*]}")
export CUDA_VISIBLE_DEVICES
# Ended at the job's end, when nobody needs the actors: nothing to wait for.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
options=(--node-ip-address="$address" --num-cpus="$cpus" --num-gpus="${#devices[@]}" --min-worker-port=0 --max-worker-port=0
  --disable-usage-stats --block)
if [[ $role == head ]]; then
  # Ray's own server for clients starts wherever grpc is installed and then needs a port that no other job has; without
  # grpc Ray refuses the option.
  if python -c 'import grpc' 2>/dev/null; then options+=(--ray-client-server-port="$((${EE_RAY_HEAD##*:} + 1))"); fi
  # The workers take the directory over from the head.
  exec ray start --head --port="${EE_RAY_HEAD##*:}" --include-dashboard=false --temp-dir="$EE_RAY_TEMP" "${options[@]}"
fi
deadline=$((SECONDS + patience))
until (exec 3<>"/dev/tcp/${EE_RAY_HEAD%:*}/${EE_RAY_HEAD##*:}") 2>/dev/null; do
  if ((SECONDS > deadline)); then
    echo "error: $(hostname): Ray's head at $EE_RAY_HEAD did not answer within $patience s" >&2
    exit 1
  fi
  sleep 0.5
done
# Ray gives itself a fixed 30 s to start, which a busy node or a slow file system may miss: again, as long as there is time.
# The signal that ends the step reaches Ray too, which then ends by itself.
ended=''
trap 'ended=yes' TERM
until ray start --address="$EE_RAY_HEAD" "${options[@]}"; do
  code=$?
  if [[ -n $ended ]] || ((SECONDS > deadline)); then exit "$code"; fi
  echo "$(hostname): Ray ended with exit code $code; once more"
  sleep 0.5
done
