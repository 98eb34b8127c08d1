"""Without DeepSpeed these tests are left out; with it they run on the CPU, over gloo."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

import pytest

from tests.ranks import preload

# on a machine with GPUs too: more ranks than cards, and numbers compared bit for bit
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_BUILD_OPS", "0")

STALE_S = 600
HERE = Path(__file__).parent
collect_ignore_glob = [] if importlib.util.find_spec("deepspeed") else ["test_*.py"]

if not collect_ignore_glob:
    # DeepSpeed, and what it imports late: an engine's optimizer asks for Muon, and that for the whole of torch.compile.
    # Together they take each rank 3 s otherwise.
    preload("tests.deepspeed.jobs", "deepspeed.runtime.zero.muon.muon_optimizer")


def pytest_collection_finish(session: pytest.Session) -> None:
    """DeepSpeed's first start on a machine compiles its messages through shared memory. Here it does so before the
    first test, whose time limit this would break, and in one process, because ranks would all wait for one of them."""
    if session.config.option.collectonly or not any(HERE in item.path.parents for item in session.items):
        return
    from deepspeed.comm.torch import build_shm_op

    lock = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "")) / "deepspeed_shm_comm" / "lock"
    if "TORCH_EXTENSIONS_DIR" in os.environ and lock.exists() and time.time() - lock.stat().st_mtime > STALE_S:
        lock.unlink()  # of a compilation that was killed: torch would wait for it for ever
    print("DeepSpeed's extension for the CPU: compiled at the first time (1 to 2 minutes), else loaded", flush=True)
    start = time.perf_counter()
    build_shm_op()
    print(f"ready after {time.perf_counter() - start:.0f} s", flush=True)
