"""Facts of the run, as every row carries them, and sums over its ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def card(device: torch.device) -> str:
    """Name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def commit() -> str:
    """Of the repository that this file is in; "+" if it has changes of its own. Empty outside a repository."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip()


def allocated(device: torch.device) -> int:
    """Bytes of this process on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def largest(value: Any) -> Any:
    """Over the ranks, which must all call it; None if it is None on any."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return None if None in values else max(values)
