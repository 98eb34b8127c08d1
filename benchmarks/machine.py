"""Facts of the run, as every row carries them, and sums over its ranks."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import date
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


def synchronize(device: torch.device) -> None:
    """Waits for all that a GPU has to do; on a CPU nothing is outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of this process on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def of_all(value: Any) -> list[Any]:
    """Of each rank, in order. Every rank must call it."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def largest(value: Any) -> Any:
    """Over the ranks, which must all call it; None if it is None on any."""
    values = of_all(value)
    return None if None in values else max(values)


def facts(device: torch.device | str) -> dict[str, Any]:
    """Of the machine: what a result depends on beside the commit. topology: what nvidia-smi says of the links."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    names = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())] if on_gpu else []
    return {
        "card": card(device),
        "gpus": names,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "nccl_settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")},
        "driver": _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if on_gpu else None,
        "topology": _nvidia_smi("topo", "-m") if on_gpu else None,
        "cpus": os.cpu_count(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def _nvidia_smi(*arguments: str) -> str | None:
    """What it prints; None where it is missing or fails."""
    try:
        run = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return re.sub(r"\x1b\[[0-9;]*m", "", run.stdout).rstrip() if run.returncode == 0 else None
