#!/bin/bash
# A sweep in one Slurm allocation: a Ray head on its first node, workers on the others, the sweep on the head.
#
#   sbatch --nodes=4 --gpus-per-node=4 --cpus-per-task=32 --time=04:00:00 cluster/launch/slurm.sh \
#       --data folder --data-dir /shared/PHOTOS --run /shared/runs/NAME --minutes 225
#
# Submit it from this repository, on a file system that all nodes see; what follows the script's name goes to
# python -m search.run. A node's CPUs are shared out to its GPUs: with fewer CPUs than GPUs some would stay idle.
# PYTHON names the interpreter of an environment with Ninefold in it (default: .venv/bin/python).
# Two minutes before the time limit the sweep is stopped; the same command goes on with it.
#SBATCH --job-name=ninefold
#SBATCH --ntasks-per-node=1
#SBATCH --output=ninefold-%j.log
#SBATCH --signal=B:TERM@120
set -euo pipefail

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
ray="$(dirname "$python")/ray"
PATH="$(dirname "$python"):$PATH"
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
# Several jobs may share a node. Ray's workers are below 20000, and outgoing connections of anybody from 32768 on.
port=$((20000 + SLURM_JOB_ID % 4000 * 3))

# Only whoever has the token, which is new for every job, can use the cluster.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
# Every node has its own numbers of CPUs and GPUs, which Slurm tells the task that runs there.
start='exec "$0" start "$@" --num-cpus="${SLURM_CPUS_ON_NODE:-1}" ${SLURM_GPUS_ON_NODE:+--num-gpus="$SLURM_GPUS_ON_NODE"}'
common=(--block --disable-usage-stats --temp-dir="$RAY_TMPDIR")
on=(srun --overlap --nodes=1 --ntasks=1 --export=ALL)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || on+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")  # srun does not inherit it

pids=()
"${on[@]}" --nodelist="$head" bash -c "$start" "$ray" --head --node-ip-address="$ip" --port="$port" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) "${common[@]}" &
pids+=($!)
for node in "${nodes[@]:1}"; do
    "${on[@]}" --nodelist="$node" \
        bash -c "until \"\$0\" health-check --address $ip:$port 2>/dev/null; do sleep 1; done; $start" \
        "$ray" --address="$ip:$port" "${common[@]}" &
    pids+=($!)
done
until "$ray" health-check --address "$ip:$port" 2>/dev/null; do
    kill -0 "${pids[0]}"                                  # the head has ended: so does this script
    sleep 1
done

# The sweep runs in the background, so that this shell hears Slurm's signal and can pass it on.
RAY_ADDRESS="$ip:$port" "$python" -m search.run "$@" &
sweep=$!
trap 'kill -TERM $sweep' TERM
code=0
wait $sweep || code=$?
if kill -0 $sweep 2>/dev/null; then                       # `wait` was cut short by the signal
    code=0
    wait $sweep || code=$?
fi
kill "${pids[@]}" 2>/dev/null || true
wait || true
exit $code
