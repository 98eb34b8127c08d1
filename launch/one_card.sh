#!/usr/bin/env bash
# Several ranks share one GPU, each an equal part of its multiprocessors: launch/one_card.sh RANKS COMMAND...
# NVIDIA's Multi-Process Service (MPS) does the sharing; its daemon runs only as long as the command.
set -euo pipefail
ranks=$1
shift
export PATH="$PATH:/usr/local/nvidia/bin" # where containers often have it
command -v nvidia-cuda-mps-control >/dev/null || { echo "one_card.sh: no nvidia-cuda-mps-control on the PATH" >&2; exit 2; }
folder=$(mktemp -d)
export CUDA_MPS_PIPE_DIRECTORY="$folder" CUDA_MPS_LOG_DIRECTORY="$folder"
nvidia-cuda-mps-control -d
trap 'echo quit | nvidia-cuda-mps-control; rm -rf "$folder"' EXIT
export CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$((100 / ranks))
"$@"
