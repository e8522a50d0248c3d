#!/usr/bin/env bash
# A grid on a Slurm allocation; details: docs/cluster_slurm.md. In this folder, which all nodes must see, after `make setup`:
#
#   sbatch --nodes=2 --cpus-per-task=8 --gpus-per-task=1 --time=4:00:00 cluster-slurm.sh --grid full
#
# Options before the script are sbatch's, those after it are those of `python -m grid.run`. Ray runs on all nodes of the
# job; the first one drives. A job whose time is nearly up goes back into the queue and continues; after `scancel`, the
# same sbatch continues it. Either way a trial loses at most one rung.

#SBATCH --job-name=factorial-grid
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Five minutes before the time limit: enough to end an epoch, save, and report.
#SBATCH --signal=B:USR1@300

set -uo pipefail
give_up() { echo "cluster-slurm.sh: $1" >&2; exit 2; }
time_is_up= driver=
trap 'time_is_up=yes; [ -z "$driver" ] || kill $driver' USR1  # the driver ends the epochs that run, and saves them
trap '[ -z "$driver" ] || kill -KILL $driver 2>/dev/null; exit 143' TERM  # it has no Ray any more, and would wait for it

cd "$SLURM_SUBMIT_DIR" || exit 2
source .venv/bin/activate || give_up "no .venv in $PWD; run make setup there"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
export RAY_enable_metrics_collection=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# The nodes share the home folder and so the token, without which nobody else on them can use this Ray.
[ -s ~/.ray/auth_token ] || (umask 077 && ray get-auth-token --generate >/dev/null) || give_up "can't write ~/.ray"
chmod 600 ~/.ray/auth_token || give_up "can't protect ~/.ray/auth_token"

# On each node's own disk, closed to its other users, and short: sockets are in it, whose paths may have 107 bytes.
export folder=/tmp/ray-$SLURM_JOB_ID
# Ports of this job, since jobs may share a node, below those that Linux gives to connections; the rest are free ones.
port=$((20000 + SLURM_JOB_ID % 1000 * 12))
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# address_of NODE: where Slurm reaches it.
address_of() {
    getent ahostsv4 "$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\(\S*\).*/\1/p')" | awk '{print $1; exit}'
}
export -f address_of
address=$(address_of "$head"):$port

# remove_folder: for four seconds, as what writes there may be about to end.
remove_folder() { for _ in {1..20}; do rm -rf "$folder" 2>/dev/null && break; sleep 0.2; done; }
export -f remove_folder

# start_ray NODES OPTION...: a step that runs Ray on so many nodes, with the GPUs that Slurm gave it, and tidies up.
start_ray() {
    srun --overlap --nodes="$1" --ntasks="$1" --cpus-per-task="$cpus" "$2" bash -c '
        mkdir -m 700 $folder 2>/dev/null || { [ -O $folder ] && [ ! -L $folder ] && chmod 700 $folder; } || exit 1
        trap remove_folder EXIT
        log=$folder/$SLURMD_NODENAME.log
        ray start --block --node-ip-address="$(address_of $SLURMD_NODENAME)" "$@" >$log 2>&1 &
        trap "exec 2>/dev/null; kill -KILL $!; wait; exit" TERM  # all that it has started ends with it, at once
        wait $! || tail $log >&2' ray "${@:3}" \
        --num-cpus="$cpus" --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 &
}

start_ray 1 "--nodelist=$head" --head --temp-dir=$folder/r --port=$port --ray-client-server-port=$((port + 1)) \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 2))
until (: <"/dev/tcp/${address/://}") 2>/dev/null; do
    kill -0 $! 2>/dev/null || give_up "Ray did not start on $head"
    sleep 1
done
[ "$SLURM_JOB_NUM_NODES" = 1 ] || start_ray $((SLURM_JOB_NUM_NODES - 1)) "--exclude=$head" "--address=$address"
python - "$address" "$SLURM_JOB_NUM_NODES" <<'END' || give_up "not all nodes came up within five minutes"
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + 300
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    if time.monotonic() > deadline:
        sys.exit(1)
    time.sleep(1)
END
[ -z "$time_is_up" ] || give_up "the time was up before anything trained; give --time=15:00 or more"

trap remove_folder EXIT  # what the driver wrote there after Ray had ended
python -m grid.run --address "$address" "$@" &
driver=$!
wait $driver
while kill -0 $driver 2>/dev/null; do wait $driver; done  # a signal ends a wait early
wait $driver
code=$?
[ "$time_is_up $code" != "yes 130" ] || scontrol requeue "$SLURM_JOB_ID"  # 130: interrupted
exit $code
