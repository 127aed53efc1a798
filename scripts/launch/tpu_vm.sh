#!/usr/bin/env bash
# Runs a config on all hosts of a TPU VM slice, over ssh.
#
#   TPU=name ZONE=us-west4-a scripts/launch/tpu_vm.sh CONFIG [KEY=VALUE ...]
#
# TPU and ZONE name a slice that is there already; PROJECT too, if it is not gcloud's default. The
# last commit is copied to every host and installed there with the extras `tpu` and `bucket`, then
# each host runs the same command, and JAX asks the slice who is who. The run folder lies in a bucket
# (folder=gs://BUCKET/NAME), or on a file system that all hosts mount. Variables named in PASS, such as
# PASS="OPENAI_API_KEY", are handed over in a file that only its owner reads, and that is gone once
# read. After a pre-emption the same command goes on where the run was.
set -euo pipefail

if [ "$#" -lt 1 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "usage: TPU=name ZONE=zone $0 CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi
cd "$(dirname "$0")/../.."

place=(--zone="$ZONE" --worker=all)
if [ -n "${PROJECT:-}" ]; then
  place+=(--project="$PROJECT")
fi
on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --command="$1"
}

umask 077
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
git archive --format=tar.gz --output="$files/distill_jax.tar.gz" HEAD
: >"$files/variables"
for name in ${PASS:-}; do
  printf 'export %s=%q\n' "$name" "${!name}" >>"$files/variables"
done

on_all_hosts 'umask 077 && mkdir -p distill_jax'
gcloud compute tpus tpu-vm scp "$files/distill_jax.tar.gz" "$files/variables" \
  "$TPU:distill_jax/" "${place[@]}"
command=$(printf '%q ' .venv/bin/distill-jax run --in-cluster "$@")
on_all_hosts "cd distill_jax && source variables && rm variables && tar -xzf distill_jax.tar.gz &&
  python3 -m venv .venv && .venv/bin/pip install -q -e '.[tpu,bucket]' && exec $command"
