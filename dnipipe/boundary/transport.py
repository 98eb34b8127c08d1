"""What carries the exchanges of a pipeline: the process group's backend, or copies between the GPUs of one host."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TRANSPORTS = ("auto", "group", "direct")


@dataclass(frozen=True)
class Whereabouts:
    """Of a rank. host: the machine and its namespace for shared memory. visible: the GPUs that its process sees."""

    host: str
    visible: str
    device: int | None


def where_am_i(device: torch.device) -> Whereabouts:
    """device: of the stage; None stands for one that is no GPU."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/ipc")
    host = [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]
    host.append(os.readlink(namespace) if namespace.is_symlink() else "")
    index = None
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
    return Whereabouts(" ".join(host), os.environ.get("CUDA_VISIBLE_DEVICES", ""), index)


def choose_transport(wanted: str, stages: Sequence[Whereabouts]) -> str:
    """ "group" or "direct", for all boundaries alike; the same on every rank, since all know all whereabouts.

    Args:   wanted: "direct", "group", or "auto": direct where all stages share one GPU. Between several GPUs it is not
            the default before it has been measured there.
    Raises: ValueError: "direct" where some neighbours cannot reach each other.
    """
    if wanted == "auto":
        one_gpu = len(set(stages)) == 1 and stages[0].device is not None
        return "direct" if one_gpu and len(stages) > 1 else "group"
    if wanted == "direct":
        for stage, (upper, lower) in enumerate(zip(stages, stages[1:], strict=False)):
            if not _reach(upper, lower):
                raise ValueError(
                    f"transport 'direct' needs GPUs of one host that can reach each other's memory; stage {stage} "
                    f"({upper}) and stage {stage + 1} ({lower}) cannot: choose transport='group'"
                )
    return wanted


def _reach(upper: Whereabouts, lower: Whereabouts) -> bool:
    if upper.device is None or lower.device is None:
        return False
    if (upper.host, upper.visible) != (lower.host, lower.visible):
        return False
    return upper.device == lower.device or torch.cuda.can_device_access_peer(upper.device, lower.device)
