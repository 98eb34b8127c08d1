#!/usr/bin/env bash
# Every check of the repository: launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

run() {
    echo "== $*"
    "$@"
}

run ruff check .
run ruff format --check .
run mypy
run pytest "$@"
