#!/usr/bin/env bash
# A grid on a Slurm allocation; details: docs/cluster_slurm.md. In this folder, which all nodes must see, after `make setup`:
#
#   sbatch --nodes=2 --cpus-per-task=8 --gpus-per-task=1 --time=4:00:00 cluster-slurm.sh --grid full
#
# Options before the script are sbatch's, those after it are those of `python -m grid.run`. Ray runs on all nodes of the
# job; the first one drives. A job that is preempted, or whose time is nearly up, goes back into the queue and continues;
# after `scancel`, the same sbatch continues it. Either way a trial loses at most one rung.

#SBATCH --job-name=factorial-grid
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# Five minutes before the time limit: enough to end an epoch, save, and report.
#SBATCH --signal=B:USR1@300

set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 2
source .venv/bin/activate || exit 2

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
export RAY_enable_metrics_collection=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
# The nodes share the home folder and so the token, without which nobody else on them can use this Ray.
[ -s ~/.ray/auth_token ] || ray get-auth-token --generate >/dev/null
chmod 600 ~/.ray/auth_token

# On each node's own disk, and short: Ray puts sockets there, whose paths may have 107 bytes.
folder=/tmp/ray-$SLURM_JOB_ID
# Ports of this job, since jobs may share a node; Ray takes free ones for the rest.
port=$((20000 + SLURM_JOB_ID % 1000 * 20))
address=$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$port
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
options="--block --num-cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} --min-worker-port=0 --max-worker-port=0"

# start_ray NODES OPTION...: a step that runs Ray on so many nodes, with the GPUs that Slurm gave it, and tidies up.
start_ray() {
    srun --overlap --nodes="$1" --ntasks="$1" "$2" bash -c "
        trap 'rm -rf $folder $folder.log' EXIT
        ray start $options --dashboard-agent-listen-port=\$(($port + 3 + SLURM_NODEID)) ${*:3} >$folder.log 2>&1 &
        trap 'exec 2>/dev/null; kill -KILL \$!; exit' TERM  # all that it has started ends with it, at once
        wait \$! || tail $folder.log" &
}

start_ray 1 "--nodelist=$head" --head "--temp-dir=$folder" "--port=$port" "--ray-client-server-port=$((port + 1))" \
    --dashboard-host=127.0.0.1 "--dashboard-port=$((port + 2))"
until (: <"/dev/tcp/${address/://}") 2>/dev/null; do
    kill -0 $! 2>/dev/null || exit 1
    sleep 1
done
[ "$SLURM_JOB_NUM_NODES" = 1 ] || start_ray $((SLURM_JOB_NUM_NODES - 1)) "--exclude=$head" "--address=$address"
python - "$address" "$SLURM_JOB_NUM_NODES" <<'END' || exit 1
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(1)
END

trap 'rm -rf $folder' EXIT  # what the driver wrote there after Ray had ended
python -m grid.run --address "$address" "$@" &
driver=$!
requeue=
trap 'requeue=yes; kill $driver' USR1  # the driver ends the epochs that run, and saves them
trap 'kill $driver' TERM
wait $driver
while kill -0 $driver 2>/dev/null; do wait $driver; done  # a signal ends a wait early
wait $driver
code=$?
[ -z "$requeue" ] || scontrol requeue "$SLURM_JOB_ID"
exit $code
