# A Ray cluster in one allocation: a node is a task of one srun, the first one has the head. This
# script runs on the first node, as SLURM promises.
# Nobody else on these machines may use the cluster: srun hands the token to all nodes.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export RAY_AUTH_TOKEN
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun has not read the other since 22.05
host=$("${python[@]}" -c 'import ray; print(ray.util.get_node_ip_address())') || finish 1
port=$((20000 + SLURM_JOB_ID % 10000)) # another job's head may be on the same machine
# shellcheck disable=SC2016  # the task's variables, not this script's
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
  host=$1 port=$2
  shift 2
  if [ "$SLURM_PROCID" -eq 0 ]; then
    exec "$@" --head --node-ip-address="$host" --port="$port" --include-dashboard=false
  fi
  for _ in {1..120}; do
    (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null && break
    sleep 1
  done
  exec "$@" --address="$host:$port"
' node "$host" "$port" "${ray_start[@]}" &
cluster=$! # not among those that a notice stops: the driver leaves first
begin "${python[@]}" -c '
import sys, time, ray
address, nodes = sys.argv[1], int(sys.argv[2])
for attempt in range(120):
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR")
        break
    except ConnectionError:
        time.sleep(1)
for attempt in range(600):
    alive = sum(node["Alive"] for node in ray.nodes())
    if alive >= nodes:
        break
    time.sleep(1)
else:
    sys.exit(f"telescope: {alive} of {nodes} nodes joined the Ray cluster in ten minutes")
' "$host:$port" "$SLURM_JOB_NUM_NODES"
if await "$begun"; then
  begin "${run[@]}" --ray-address "$host:$port"
fi
await "$begun"
code=$?
kill -TERM "$cluster" 2>/dev/null
wait "$cluster"
finish "$code"
