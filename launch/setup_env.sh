# Makes .venv at the repository's root, once, with the exact versions of constraints.txt. Sourced by quickstart.sh and test.sh.
#
# PYTHON=python3.12 chooses the interpreter. On Linux, torch from PyPI is the CUDA build: what a GPU machine needs, several
# GB more than a CPU-only one does. Where that matters, let PIP_EXTRA_INDEX_URL name an index that holds a CPU build.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "dnipipe needs Python 3.10 or newer, and $PYTHON is not: set PYTHON=/path/to/another" >&2
    exit 1
}

wanted="$("$PYTHON" --version) $(cat pyproject.toml launch/constraints.txt | cksum)"
if [[ ! -x .venv/bin/python || "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]]; then
    echo "setting up .venv with $("$PYTHON" --version) (the first time takes minutes: torch is large)"
    # --clear: what a broken or older set-up left behind must not mix with this one
    "$PYTHON" -m venv --clear .venv
    # DeepSpeed comes as source: DS_BUILD_OPS=0 compiles none of its extensions now, and without DS_ACCELERATOR its set-up
    # does without torch, which pip's isolated build does not have
    env -u DS_ACCELERATOR DS_BUILD_OPS=0 \
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c launch/constraints.txt -e '.[dev]'
    echo "$wanted" > .venv/installed  # last, so that a set-up cut short is done again
fi

export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread a rank: more would fight over the cores
# DeepSpeed's compiled extension in this environment's own folder: in the common one, environments with other versions
# would each compile over the other's, a minute at a time
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
