"""Runs one function on both sides of a boundary, of each kind: it is given its boundary and its side, 0 or 1.

local    two threads of this process          paired    two ranks over gloo
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dnipipe.boundary import Boundary, PairedBoundary, local_pair
from tests.ranks import run_ranks

Body = Callable[[Boundary, int], Any]
Run = Callable[..., list[Any]]

# Of side 0. A paired boundary's stages differ from its ranks, so that an error cannot mix them up.
FIRST_STAGE = {"local": 0, "paired": 3}


def on_threads(body: Body, timeout_s: float = 10.0, **faults: Any) -> list[Any]:
    pair = local_pair(timeout_s=timeout_s, **faults)
    with ThreadPoolExecutor(2) as pool:
        return [each.result() for each in [pool.submit(body, pair[side], side) for side in (0, 1)]]


def on_ranks(body: Body, timeout_s: float = 10.0) -> list[Any]:
    return run_ranks(2, _rank, body, timeout_s)


def _rank(rank: int, world: int, body: Body, timeout_s: float) -> Any:
    group, stage, peer_stage = dist.group.WORLD, FIRST_STAGE["paired"] + rank, FIRST_STAGE["paired"] + 1 - rank
    assert group is not None
    boundary = PairedBoundary(group, rank=rank, stage=stage, peer=1 - rank, peer_stage=peer_stage, timeout_s=timeout_s)
    return body(boundary, rank)


KINDS: dict[str, Run] = {"local": on_threads, "paired": on_ranks}


def number(value: float) -> Tensor:
    return torch.tensor([value])


def unconnected(timeout_s: float) -> PairedBoundary:
    """One without a group, for what needs no peer."""
    return PairedBoundary(None, rank=0, stage=3, peer=1, peer_stage=4, timeout_s=timeout_s)  # type: ignore[arg-type]
