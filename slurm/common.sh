# shellcheck shell=bash
# What every job script here does: check the settings, start Ray and the learner's ranks as steps of this allocation,
# hand signals on, and put the job back into the queue if it was stopped. What runs where is Python's to say
# (`ee-megatron slurm-spec`); this file starts, watches and ends processes.
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  { echo "error: $(hostname): bash $BASH_VERSION: job scripts need 4.4 or newer; name one in their first line" >&2; exit 2; }
set -euo pipefail

STOPPED=85 # exit code of a stage that was told to stop (ee_megatron/training/ranks.py)

KEYS=(nodes learner_nodes ranks ranks_per_node rollout_nodes ray_cpus ray_gpus start_timeout_s directory requeue_limit 'done')

declare -A job=()     # what `ee-megatron slurm-spec` says
declare -A steps=()   # process id of a background srun -> what it is
declare -a hosts=()   # nodes of the allocation
declare -a container=() # srun's options for a container (pyxis)
declare -a within=()    # the command that a step's own is put behind (Apptainer)
# A step of one task with all cores of the job on its node: srun counts a task's cores by each of these variables, which the
# batch script has from sbatch.
declare -a whole_node=(env -u SRUN_CPUS_PER_TASK -u SLURM_CPUS_PER_TASK -u SLURM_TRES_PER_TASK -u RAY_ADDRESS
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --overlap)
learner='' told='' logs=''

say() { echo "[$(date +%H:%M:%S)] $*"; }

fail() {
  echo "error: $*" >&2
  exit 2
}

# number NAME TEXT: a whole number, or the end. bash's arithmetic runs commands that it finds in a text.
number() { [[ $2 =~ ^[0-9]{1,9}$ ]] || fail "$1: expected a whole number, found '$2'"; }

# run_stage STAGE [key=value ...]
run_stage() {
  local stage=$1
  shift
  prepare
  trap hand_on USR1 USR2 TERM
  read_job "$stage" "$@"
  if [[ ${job[done]} == yes ]]; then
    say "$stage: finished before, in ${job[directory]}"
    exit 0
  fi
  logs=${job[directory]}/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  mkdir -p "$logs"
  say "$stage: ${job[ranks]} rank(s) on ${job[learner_nodes]} node(s), actors on ${job[rollout_nodes]}; logs in $logs"
  if ((job[rollout_nodes] > 0)); then start_ray; fi
  start_ranks "$stage" "$@"
  if [[ -n $told ]]; then hand_on; fi
  local code=0
  watch || code=$?
  trap '' USR1 USR2 TERM
  end_ray
  finish "$stage" "$code"
}

prepare() {
  [[ -n ${SLURM_JOB_ID:-} ]] || fail "no SLURM_JOB_ID: submit this script with sbatch"
  number SLURM_JOB_ID "$SLURM_JOB_ID"
  number SLURM_RESTART_COUNT "${SLURM_RESTART_COUNT:-0}"
  [[ -z ${SLURM_HET_SIZE:-} ]] || fail "a heterogeneous job: the nodes of a job have to be alike; submit without ':'"
  local site=${EE_SITE_ENV:-slurm/site.env}
  if [[ -f $site ]]; then
    # What modules and conda bring reads unset variables and goes on past commands that fail.
    set +eu +o pipefail
    # shellcheck source=/dev/null
    . "$site"
    set -euo pipefail
  fi
  mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Ray's sockets, which rank 0 finds there from another container.
  local scratch=${EE_SCRATCH:-/tmp}
  within=("${EE_CONTAINER_COMMAND[@]}")
  if ((${#within[@]} == 1)); then read -ra within <<<"${within[0]}"; fi
  if [[ -n ${EE_CONTAINER_IMAGE:-} ]]; then
    container=(--container-image="$EE_CONTAINER_IMAGE" --container-workdir="$PWD"
      --container-mounts="${EE_CONTAINER_MOUNTS:-$PWD:$PWD},$scratch:$scratch")
    if [[ -n ${EE_CONTAINER_NAME:-} ]]; then name_container; fi
  elif ((${#within[@]} > 0)); then
    command -v "${within[0]}" >/dev/null || fail "EE_CONTAINER_COMMAND in $site: no ${within[0]} on $(hostname)"
    export APPTAINER_BINDPATH="$PWD,$scratch${APPTAINER_BINDPATH:+,$APPTAINER_BINDPATH}"
    export SINGULARITY_BINDPATH=$APPTAINER_BINDPATH
  else
    command -v ee-megatron >/dev/null || fail "ee-megatron is not on PATH: activate its environment in $site"
  fi
  # srun has not inherited it from sbatch since Slurm 22.05; steps that need another number say so.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-1}}
  # A rank beside a GPU has its task's cores to itself. Without GPUs sums are not to depend on how many cores there are.
  local threads=1
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then threads=$SRUN_CPUS_PER_TASK; fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} PYTHONUNBUFFERED=1
  # Memory in segments that grow: batches of ever new shapes leave no holes. Every torch since 2.1 reads this name.
  if [[ -z ${PYTORCH_ALLOC_CONF+set}${PYTORCH_CUDA_ALLOC_CONF+set} ]]; then
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
  fi
  # What is compiled on a node stays there: the home directory may be read-only, or slow for many nodes at once.
  local cache=$scratch/ee-cache-$UID
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton} VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$cache/vllm}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
  [[ -w ${HOME:-/} ]] || export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$cache}
  if [[ -n ${EE_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME=$EE_INTERFACE GLOO_SOCKET_IFNAME=$EE_INTERFACE
  fi
  # Ports of this job's own, below the ones that the system hands out, so that jobs may share a node: the ranks' meeting
  # point, Ray's head, and one for a server of Ray's that nobody asks for.
  local base=$((20000 + 3 * (SLURM_JOB_ID % 4000)))
  MASTER_ADDR=$(slurm/node_address.sh) || exit 2
  if ((${#hosts[@]} > 1)); then
    srun --quiet --nodes="${#hosts[@]}" --ntasks="${#hosts[@]}" --ntasks-per-node=1 slurm/node_address.sh >/dev/null ||
      exit 2
  fi
  export MASTER_ADDR MASTER_PORT=$base EE_RAY_PORT=$((base + 1))
}

# One container per node, unpacked once, before steps that would otherwise unpack it at the same time.
name_container() {
  container+=(--container-name="$EE_CONTAINER_NAME")
  srun --nodes="${#hosts[@]}" --ntasks="${#hosts[@]}" --ntasks-per-node=1 "${container[@]}" true ||
    fail "EE_CONTAINER_IMAGE=$EE_CONTAINER_IMAGE: no container of it on some node; srun says above why"
}

# Settings, inputs and allocation are checked before anything else starts; its lines of error are this job's. What it says
# is read key by key: only these, and numbers where numbers belong.
read_job() {
  local text key value
  text=$(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="${hosts[0]}" --time=10 "${container[@]}" \
    "${within[@]}" ee-megatron slurm-spec "$@") || exit $?
  while IFS='=' read -r key value; do
    case $key in
      nodes | learner_nodes | ranks | ranks_per_node | rollout_nodes | ray_cpus | start_timeout_s | requeue_limit)
        number "ee-megatron slurm-spec: $key" "$value"
        ;;
      ray_gpus) [[ $value =~ ^([0-9]+(,[0-9]+)*)?$ ]] || fail "ee-megatron slurm-spec: $key: expected 0,1,..., found '$value'" ;;
      done) [[ $value == yes || $value == no ]] || fail "ee-megatron slurm-spec: $key: expected yes or no, found '$value'" ;;
      directory) [[ $value == /* ]] || fail "ee-megatron slurm-spec: $key: expected a whole path, found '$value'" ;;
      # What else may speak there: a module, a container's start-up.
      *) continue ;;
    esac
    [[ -z ${job[$key]+set} ]] || fail "ee-megatron slurm-spec: $key was said twice"
    job[$key]=$value
  done <<<"$text"
  for key in "${KEYS[@]}"; do
    [[ -n ${job[$key]+set} ]] || fail "ee-megatron slurm-spec: said nothing of $key"
  done
}

# The head lives beside the learner's first rank, which the run cannot lose anyway, so that any rollout node may be lost.
start_ray() {
  # A short path, because those of sockets are; every node has this directory to itself.
  export EE_RAY_TEMP=${EE_SCRATCH:-/tmp}/ee-ray-$SLURM_JOB_ID
  local own=("${hosts[@]:job[nodes] - job[rollout_nodes]:job[rollout_nodes]}") node
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$logs/ray-token RAY_USAGE_STATS_ENABLED=0
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
  export RAY_ADDRESS=$MASTER_ADDR:$EE_RAY_PORT EE_RAY_NODES=${#own[@]}
  if [[ ${own[0]} != "${hosts[0]}" ]]; then
    EE_RAY_NODES=$((EE_RAY_NODES + 1))
    ray_node head "${hosts[0]}" 0 ''
  fi
  for node in "${own[@]}"; do
    if [[ $node == "${hosts[0]}" ]]; then
      ray_node head "$node" "${job[ray_cpus]}" "${job[ray_gpus]}"
    else
      ray_node worker "$node" "${job[ray_cpus]}" "${job[ray_gpus]}"
    fi
  done
}

# ray_node head|worker NODE CPUS GPUS: a step of its own per node, so that a node takes no other along. Ray shares the
# node with the ranks there (--overlap) and gives its actors cores and devices itself.
ray_node() {
  EE_RAY_HEAD="$RAY_ADDRESS" "${whole_node[@]}" --nodelist="$2" --cpu-bind=none --no-kill \
    --output="$logs/ray-$2.log" --error="$logs/ray-$2.log" "${container[@]}" \
    "${within[@]}" slurm/ray_node.sh "$1" "$3" "$4" "${job[start_timeout_s]}" &
  steps[$!]="Ray's $1 on $2"
}

# EE_SRUN: the site's options for this step, how its tasks are bound to cores for one.
start_ranks() {
  local nodes options
  read -ra options <<<"${EE_SRUN:-}"
  nodes=$(IFS=, && echo "${hosts[*]:0:job[learner_nodes]}")
  srun --nodes="${job[learner_nodes]}" --ntasks="${job[ranks]}" --ntasks-per-node="${job[ranks_per_node]}" \
    --nodelist="$nodes" --overlap --kill-on-bad-exit=1 --output="$logs/rank-%t.log" --error="$logs/rank-%t.log" \
    "${options[@]}" "${container[@]}" "${within[@]}" ee-megatron "$@" &
  learner=$!
  steps[$learner]='the ranks'
}

# Wait for the ranks; returns their exit code. Ray's steps may end before them: the pool knows what to do then.
# Looked at every second: bash before 5.1 doesn't say which process `wait -n` has waited for.
watch() {
  local pid code running
  while :; do
    running=$(jobs -rp)
    running=" ${running//$'\n'/ } "
    for pid in "${!steps[@]}"; do
      [[ $running != *" $pid "* ]] || continue
      code=0
      wait "$pid" || code=$?
      [[ $pid != "$learner" ]] || return "$code"
      say "${steps[$pid]} ended with exit code $code"
      unset "steps[$pid]"
    done
    sleep 1
  done
}

hand_on() {
  told=yes
  if [[ -n $learner ]]; then
    say "told to stop: the ranks finish or give up their step"
    kill -USR1 "$learner" 2>/dev/null || true
  fi
}

end_ray() {
  unset "steps[$learner]"
  ((${#steps[@]} > 0)) || return 0
  local deadline=$((SECONDS + 30))
  kill -TERM "${!steps[@]}" 2>/dev/null || true
  while [[ -n $(jobs -rp) ]] && ((SECONDS < deadline)); do sleep 0.2; done
  rm -f "$RAY_AUTH_TOKEN_PATH"
  # A step of its own per node and with a deadline: one for all would leave everything where a node was lost, and may wait
  # for that node longer than its time limit says.
  local node removals=()
  for node in "${hosts[@]}"; do
    env -u SRUN_CPUS_PER_TASK timeout --kill-after=5 30 srun --nodes=1 --ntasks=1 --ntasks-per-node=1 \
      --nodelist="$node" --overlap --time=1 rm -rf "$EE_RAY_TEMP" 2>/dev/null &
    removals+=("$!")
  done
  wait "${removals[@]}" || true
}

# finish STAGE CODE: end the job, or put it back into the queue.
finish() {
  local id=$SLURM_JOB_ID restart=${SLURM_RESTART_COUNT:-0}
  # A task of an array goes by this name: the number alone may mean the whole array.
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  if (($2 == 0)); then
    say "$1: finished; results in ${job[directory]}"
    exit 0
  fi
  if (($2 != STOPPED)); then report "$1" "$2"; fi
  # A stage of a sweep: who started it puts the job back.
  if [[ ${EE_REQUEUE:-} == no ]]; then exit "$2"; fi
  local reason
  reason=$(reason_to_requeue "$2" "$id")
  [[ -n $reason ]] || exit "$2"
  if ((restart >= job[requeue_limit])); then
    echo "error: $reason, and put back $restart time(s) before, as often as cluster.requeue_limit lets it:" \
      "submit the job again to go on" >&2
    exit "$2"
  fi
  say "$reason: back into the queue (restart $((restart + 1)) of at most ${job[requeue_limit]})"
  scontrol requeue "$id" || fail "the job could not be put back: was it submitted with --no-requeue? Submit it again"
  exit "$2"
}

# reason_to_requeue CODE JOB: nothing for a job that failed by itself, and for one that somebody cancelled.
reason_to_requeue() {
  [[ $(squeue --noheader --jobs="$2" --format=%T 2>/dev/null) == RUNNING ]] || return 0
  if (($1 == STOPPED)); then
    echo "stopped with a checkpoint"
  elif [[ -n $told ]]; then
    echo "stopped"
  elif scontrol show job --oneliner "$SLURM_JOB_ID" | grep -E 'PreemptTime=[0-9]' >/dev/null; then
    echo "preempted"
  elif sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format=%t | grep -E '^(down|fail|unk)|\*$' >/dev/null; then
    echo "a node was lost"
  fi
}

# The end of what the ranks said, where somebody looks first.
report() {
  echo "error: $1: the ranks ended with exit code $2 ($(meaning "$2")); their logs are in $logs" >&2
  # One line for each thing said, whichever ranks said it.
  grep -hE '^(error: |slurmstepd: |srun: error: )' "$logs"/rank-*.log 2>/dev/null | sort -u | tail -n 10 >&2 || true
}

meaning() {
  case $1 in
    1) echo "an error while running" ;;
    2) echo "bad settings or inputs" ;;
    134) echo "aborted" ;;
    137) echo "killed: memory, a lost rank or an administrator" ;;
    143) echo "ended by a signal" ;;
    *) echo "unknown" ;;
  esac
}
