"""Runs one function on several ranks: real processes, real torch.distributed over gloo, results by rank."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The fork server imports torch once; each rank is then a fork of it, which takes 50 ms instead of 4 s.
_CONTEXT = mp.get_context("forkserver")
_PRELOADED = ["torch", "torch.distributed.pipelining", "torch.distributed.fsdp", "tests.ranks"]
_CONTEXT.set_forkserver_preload(_PRELOADED)


def preload(*modules: str) -> None:
    """Has the fork server import these too: for a conftest.py, since it counts only before the first rank starts."""
    _PRELOADED.extend(each for each in modules if each not in _PRELOADED)
    _CONTEXT.set_forkserver_preload(_PRELOADED)


def _rank_main(
    rank: int, world: int, backend: str, body: Callable[..., Any], args: tuple[Any, ...], path: str, out: Any
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if backend == "nccl":
        if torch.cuda.device_count() < world:
            # NCCL refuses two ranks on one card unless it takes them for two hosts; it then talks over sockets.
            os.environ.update(NCCL_HOSTID=f"host{rank}", NCCL_SOCKET_IFNAME="lo")
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        store = f"file://{path}"
        timeout = timedelta(seconds=60)
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=world, timeout=timeout)
        result = body(rank, world, *args)
        # pickled here, because a queue passes a tensor's memory by a handle that dies with this process
        out.put((rank, None, pickle.dumps(result)))
        out.close()
        out.join_thread()
        dist.destroy_process_group()
    except BaseException:
        out.put((rank, traceback.format_exc(), None))
        out.close()
        out.join_thread()
        os._exit(1)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process, for the stores in which ranks find each other; gone when it ends."""
    return tempfile.TemporaryDirectory(prefix="dnipipe-")


def start_ranks(world: int, body: Callable[..., Any], *args: Any, backend: str = "gloo") -> tuple[list[Any], Any]:
    """Starts `body(rank, world, *args)` on each rank. Returns them, and a queue of (rank, error, pickled result)."""
    out = _CONTEXT.Queue()
    path = os.path.join(tempfile.mkdtemp(dir=_folder().name), "store")
    processes = [
        _CONTEXT.Process(target=_rank_main, args=(rank, world, backend, body, args, path, out)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes, out


def wait_for(path: Path, timeout_s: float = 60.0) -> None:
    """Until a rank has made the file: a machine under load takes its time to start."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no rank made {path} within {timeout_s} s"
        time.sleep(0.05)


def run_ranks(
    world: int, body: Callable[..., Any], *args: Any, timeout_s: float = 100.0, backend: str = "gloo"
) -> list[Any]:
    """What `body(rank, world, *args)` returned on each rank. The first rank to fail ends the others and the test."""
    processes, out = start_ranks(world, body, *args, backend=backend)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < world:
            try:
                rank, error, result = out.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                missing = sorted(set(range(world)) - set(results))
                raise TimeoutError(f"ranks {missing} did not finish within {timeout_s} s") from None
            if error is not None:
                raise RuntimeError(f"rank {rank} of {world} failed:\n{error}")
            results[rank] = pickle.loads(result)
        for process in processes:
            process.join(timeout=20)
            assert process.exitcode == 0, f"a rank left with exit code {process.exitcode}"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [results[rank] for rank in range(world)]
