"""Runs one function on both sides of a boundary, of each kind: it is given its boundary and its side, 0 or 1.

local    two threads of this process          paired    two ranks over gloo
direct   two ranks that share a GPU, where there is one: what the body has on the CPU is copied there and back
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dnipipe.boundary import Boundary, DirectBoundary, Exchange, PairedBoundary, local_pair
from tests.ranks import run_ranks

Body = Callable[[Boundary, int], Any]
Run = Callable[..., list[Any]]

# Of side 0. A paired boundary's stages differ from its ranks, so that an error cannot mix them up.
FIRST_STAGE = {"local": 0, "paired": 3, "direct": 3}


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


def on_one_gpu(body: Body, timeout_s: float = 10.0) -> list[Any]:
    return run_ranks(2, _gpu_rank, body, timeout_s)


def _gpu_rank(rank: int, world: int, body: Body, timeout_s: float) -> Any:
    group, stage, peer_stage = dist.group.WORLD, FIRST_STAGE["direct"] + rank, FIRST_STAGE["direct"] + 1 - rank
    assert group is not None
    names = {"rank": rank, "stage": stage, "peer": 1 - rank, "peer_stage": peer_stage}
    return body(_OnGpu(DirectBoundary(group, torch.device("cuda"), 16, timeout_s=timeout_s, **names)), rank)


class _OnGpu(Boundary):
    """A direct boundary for tensors on the CPU."""

    def __init__(self, inner: DirectBoundary) -> None:
        names = {"rank": inner.rank, "stage": inner.stage, "peer": inner.peer, "peer_stage": inner.peer_stage}
        super().__init__(timeout_s=inner.timeout_s, **names)
        self.inner = inner

    def watch(self) -> None:
        self.inner.watch()

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], *, microbatch: int) -> Exchange:
        targets = [tensor.cuda() for tensor in receive]
        inner = self.inner.exchange([tensor.cuda() for tensor in send], targets, microbatch=microbatch)
        return _BackToCpu(self, microbatch, inner, targets, receive)


class _BackToCpu(Exchange):
    def __init__(
        self, boundary: Boundary, microbatch: int, inner: Exchange, sources: list[Tensor], targets: Sequence[Tensor]
    ) -> None:
        super().__init__(boundary, microbatch)
        self.inner, self.sources, self.targets = inner, sources, targets

    def _arrived(self, within_s: float) -> bool:
        return self.inner.arrived(within_s)

    def _wait(self) -> None:
        self.inner.wait()
        for source, target in zip(self.sources, self.targets, strict=True):
            target.copy_(source)


KINDS: dict[str, Run] = {"local": on_threads, "paired": on_ranks}
if torch.cuda.is_available():
    KINDS["direct"] = on_one_gpu


def number(value: float) -> Tensor:
    return torch.tensor([value])


def unconnected(timeout_s: float) -> PairedBoundary:
    """One without a group, for what needs no peer."""
    return PairedBoundary(None, rank=0, stage=3, peer=1, peer_stage=4, timeout_s=timeout_s)  # type: ignore[arg-type]
