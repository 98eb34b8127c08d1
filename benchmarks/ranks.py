"""Starts one process per stage on this machine. On one GPU the ranks share the card.

NCCL refuses two ranks on one card unless it takes them for two hosts; it then talks over sockets. Each rank's share of
the card is the business of an MPS daemon, if one runs (launch/one_card.sh).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run_ranks(num_ranks: int, device: str, timeout_s: float, body: Callable[..., Any], *args: Any) -> None:
    """Runs body(rank, device, *args) on every rank, each on one CPU thread; raises the first failure."""
    with tempfile.TemporaryDirectory(prefix="dnipipe-") as folder:
        spawn(_rank, (num_ranks, device, timeout_s, Path(folder) / "store", body, args), nprocs=num_ranks)


def _rank(
    rank: int, num_ranks: int, kind: str, timeout_s: float, store: Path, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    device, backend = torch.device("cpu"), "gloo"
    if kind == "cuda":
        if torch.cuda.device_count() < num_ranks:
            os.environ.update(NCCL_HOSTID=f"host{rank}", NCCL_SOCKET_IFNAME="lo")
        device, backend = torch.device("cuda", rank % torch.cuda.device_count()), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s)
    )
    body(rank, device, *args)
    dist.barrier()
    dist.destroy_process_group()
