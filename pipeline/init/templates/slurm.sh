#!/bin/bash
#SBATCH --job-name=dtpipe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{ gpus }}
#SBATCH --cpus-per-task={{ cpus }}
#SBATCH --time={{ hours }}:00:00      # {{ time_why }}
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --signal=TERM@120             # two minutes before the time is over: what is in hand is brought to a good end
# Run with: sbatch {{ slurm }}. Every command goes on where it stopped, so the job may be preempted or submitted again.
# #SBATCH --partition=... --account=...
set -u
cd {{ folder }}

step() {
    srun --ntasks=1 "$@"
    local code=$?
    if [ $code -eq 143 ]; then  # stopped cleanly by SIGTERM: the rest in another allocation
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    [ $code -eq 0 ] || exit $code
}

step dtpipe extract -c {{ config }}
step dtpipe verify {{ features_word }}
{% if gpus > 1 %}
step torchrun --standalone --nproc-per-node {{ gpus }} --no-python dtpipe distill -c {{ config }}
{% else %}
step dtpipe distill -c {{ config }}
{% endif %}
