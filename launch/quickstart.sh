#!/usr/bin/env bash
# Trains the embedded example on two ranks: launch/quickstart.sh [section.field=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

# --standalone: torchrun chooses a free port, so that two runs on one machine never meet
exec torchrun --standalone --nproc-per-node 2 launch/train.py launch/configs/quickstart.yaml "$@"
