#!/usr/bin/env bash
# Runs a config on the GPUs of one machine, all in one process.
#
#   scripts/launch/gpus.sh CONFIG [KEY=VALUE ...]
#   GPUS=0,1 scripts/launch/gpus.sh CONFIG [KEY=VALUE ...]
#
# GPUS names those to use, all of them if it is not set. Needs distill_jax[cuda]. An interrupted run
# goes on with the same command.
set -euo pipefail

if [ "$#" -lt 1 ]; then
  echo "usage: [GPUS=0,1,...] $0 CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi
if [ -n "${GPUS:-}" ]; then
  export CUDA_VISIBLE_DEVICES="$GPUS"
fi
export JAX_PLATFORMS=cuda                   # no GPU is an error, not a run on the CPU
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 # of each GPU; the usual three quarters waste the rest
exec distill-jax run "$@"
