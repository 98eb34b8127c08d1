"""What dnipipe adds to a checkpoint of DeepSpeed: a file of its own for each rank, beside the others.

TAG/layer_00-model_states.pt ... mp_rank_00_model_states.pt ...      DeepSpeed's, untouched
TAG/dnipipe_stage_00_replica_00.pt                                   predictors, counters, what is in flight
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def path_of(folder: Path, stage: int, replica: int) -> Path:
    return folder / f"dnipipe_stage_{stage:02d}_replica_{replica:02d}.pt"


def save(folder: Path, stage: int, replica: int, state: dict[str, Any]) -> None:
    """Every rank must call it; returns once all files are there."""
    path = path_of(folder, stage, replica)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)
    dist.barrier()


def load(folder: Path, stage: int, replica: int) -> dict[str, Any] | None:
    """None: plain DeepSpeed made this checkpoint. Every rank must call it.

    Raises: ValueError on every rank: the files of some ranks are missing.
    """
    path = path_of(folder, stage, replica)
    there: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(there, path.exists())
    if not any(there):
        return None
    if not all(there):
        missing = [rank for rank, found in enumerate(there) if not found]
        raise ValueError(
            f"{folder} has no dnipipe file for ranks {missing}: it was saved with fewer stages or replicas, or not "
            f"copied whole. Remove dnipipe_*.pt from it, and predictors begin anew"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
