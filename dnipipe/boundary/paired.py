"""The paired exchange over torch.distributed: all that crosses at one time goes in one `batch_isend_irecv`.

Each boundary has a process group of its own two ranks, so that a slow neighbour on one side never blocks the other.
One group carries both directions in one fixed order, because NCCL ignores tags and gives each pair of ranks one stream:
a gradient posted out of order would wait behind the activation it should have passed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from .arrival import Arrival, comes_true
from .base import Boundary, BoundaryError, Exchange
from .bystander import Bystander, Transfer


class PairedBoundary(Boundary):
    """One side of a cut over a two-rank process group.

    Args: group: holds exactly this rank and `peer`. The rest as in Boundary.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, rank: int, stage: int, peer: int, peer_stage: int, timeout_s: float
    ) -> None:
        super().__init__(rank=rank, stage=stage, peer=peer, peer_stage=peer_stage, timeout_s=timeout_s)
        self.group = group
        self.occupies_gpu = group is not None and dist.get_backend(group) == "nccl"
        self._bystander: Bystander | None = None

    def watch(self) -> None:
        self._bystander = self._bystander or Bystander(f"dnipipe boundary {self.stage}-{self.peer_stage}", self)

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], *, microbatch: int) -> Exchange:
        operations = [dist.P2POp(dist.isend, tensor, self.peer, self.group) for tensor in send]
        operations += [dist.P2POp(dist.irecv, tensor, self.peer, self.group) for tensor in receive]
        exchange = _PairedExchange(self, microbatch, [*send, *receive])
        try:
            exchange.works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            # A peer that has finished its last step may be gone while the last gradients are still offered to it. Only
            # who still needs something from it, and so waits, has been let down.
            exchange.refused = error
        if self._bystander is not None and exchange.works and not exchange.on_gpu:
            exchange.transfer, exchange.works = self._bystander.watch(exchange.works), []
        return exchange

    @cached_property
    def side_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()


class _PairedExchange(Exchange):
    boundary: PairedBoundary

    def __init__(self, boundary: PairedBoundary, microbatch: int, tensors: list[Tensor]) -> None:
        super().__init__(boundary, microbatch)
        self.works: list[dist.Work] = []
        self.refused: RuntimeError | None = None
        # gloo cancels a send whose Work is dropped, and reads the tensor as late as the peer's receive: keep both.
        self._tensors = tensors
        self.on_gpu = bool(tensors) and tensors[0].is_cuda
        self.transfer: Transfer | None = None
        self._arrival: Arrival | None = None

    def _wait(self) -> None:
        if self.refused is not None:
            raise self.refused
        if self.on_gpu:
            self._arrival = self._mark_arrival()
            self.boundary.bound_host_lead(self)
        elif self.transfer is not None:
            self.transfer.wait(self.boundary.timeout_s)
        else:
            # gloo blocks until its timeout when a finished Work is waited for again, even to learn that it failed.
            works, self.works = self.works, []
            deadline = time.perf_counter() + self.boundary.timeout_s
            for work in works:
                left_s = max(deadline - time.perf_counter(), 0.001)  # 0 would mean no timeout
                work.wait(timedelta(seconds=left_s))
        self._tensors = []

    def _arrived(self, within_s: float) -> bool:
        if self.refused is not None:
            return True
        if self.on_gpu:
            return comes_true(lambda: all(work.is_completed() for work in self.works), within_s)
        assert self.transfer is not None or not self.works, "posted before anybody watched"
        return self.transfer is None or self.transfer.over.wait(within_s)

    def _mark_arrival(self) -> Arrival:
        return Arrival(self.works, self.boundary.side_stream)

    def confirm(self) -> None:
        assert self._arrival is not None, "only what was waited for is confirmed"
        start = time.perf_counter()
        try:
            self._arrival.wait_on_host(self.boundary.timeout_s)
        except TimeoutError as error:
            seconds = time.perf_counter() - start
            raise BoundaryError(self.boundary.describe_failure(self.microbatch, seconds, error)) from error
        self.works, self._arrival = [], None
