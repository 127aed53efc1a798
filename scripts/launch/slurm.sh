#!/usr/bin/env bash
# Runs a config on GPUs of a Slurm cluster, one process per GPU.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/launch/slurm.sh CONFIG [KEY=VALUE ...]
#
# Tasks per node and GPUs per node must be the same number, and GPUs must not be bound to tasks: each
# process takes the one with its own number. Submit from the folder that relative paths begin at, on
# a file system that all nodes share; the run folder may lie in a bucket instead, as gs://BUCKET/NAME.
# VENV names an environment with distill_jax[cuda], if there is one to activate. Processes find each
# other through Slurm. Before the time limit, and when the job is pre-empted, the run is saved and the
# job queued again: it goes on where it was.
#SBATCH --job-name=distill-jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --wait-all-nodes=1
set -uo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: sbatch [OPTION ...] $0 CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi
if [ -n "${VENV:-}" ]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi

interrupted=14
srun --kill-on-bad-exit=0 distill-jax run "$@"
code=$?
if [ "$code" -eq "$interrupted" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
