#!/bin/bash
#SBATCH --job-name=dtpipe-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --signal=B:TERM@120           # two minutes before the time is over, to this script
# Ray on all nodes of an allocation, and one command on it:
#   sbatch --nodes 4 examples/cluster/slurm_ray.sh dtpipe extract -c project/config.yaml
# Every command goes on where it stopped, so the job may be preempted or submitted again. `dtpipe init` writes the settings,
# and a script for a single node, which needs none of this.
set -eu

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs of others may share a node
export RAY_ADDRESS="$head:$port" RAY_AUTH_MODE=token RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(head -c 24 /dev/urandom | base64 | tr -d '+/=')}"

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap env -u RAY_ADDRESS \
    ray start --head --port="$port" --disable-usage-stats --block &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" --overlap env -u RAY_ADDRESS \
        bash -c "until ray start --address='$RAY_ADDRESS' --disable-usage-stats --block; do sleep 5; done" &
fi
until srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap ray status > /dev/null 2>&1; do sleep 5; done

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap "$@" &
command=$!
trap 'kill -TERM "$command"' TERM  # srun hands it on
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
code=0
wait "$command" || code=$?
while kill -0 "$command" 2> /dev/null; do  # a trap ends `wait`, not the command
    code=0
    wait "$command" || code=$?
done
if [ "$code" -eq 143 ]; then  # stopped cleanly by SIGTERM: the rest in another allocation
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
