#!/bin/bash
# Training on a Cloud TPU slice without Kubernetes: the same command on every host of the slice, started again until it is done.
#   launch/tpu-vm.sh TPU_NAME ZONE configs/30b-v5p-4x4x4.yaml --run gs-mount/runs/30b
# The repository is installed on every host in the same place (REMOTE_DIR), and the run lies on a file system that all of them see.
set -euo pipefail

if [[ $# -lt 3 ]]; then
  echo "usage: $0 TPU_NAME ZONE CONFIG.yaml [--dotted.key value ...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

printf -v arguments '%q ' "$@"
# `always`: a TPU VM has no variables that tell of the other hosts; jax asks the metadata server.
command="cd ${REMOTE_DIR:-qvlmoe_jax} && exec ${PYTHON:-python3} -m train ${arguments}--distributed.initialize always"

for ((attempt = 0; attempt <= ${MAX_RESTARTS:-20}; attempt++)); do
  status=0
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command" || status=$?
  if [[ $status -eq 0 || $status -eq 2 ]]; then # done, or an error that another attempt would meet again
    exit "$status"
  fi
  echo "ended with status $status; starting again, the run goes on from its newest checkpoint" >&2
  sleep "${RESTART_DELAY:-30}"
done
exit "$status"
