"""One way of getting a tensor to another rank, and how long it takes."""

from __future__ import annotations

import time
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dnipipe.boundary import Boundary, Exchange


class Wire(Protocol):
    """Between this rank and one other. What this one sends the other receives, in the same order."""

    def send(self, tensor: Tensor) -> None: ...

    def receive(self, tensor: Tensor) -> None: ...

    def finish(self) -> None:
        """Returns when all is done, on the device too."""
        ...


class GroupWire:
    """Over the process group of all ranks, whose communicator must be open."""

    def __init__(self, peer: int) -> None:
        self.peer = peer

    def send(self, tensor: Tensor) -> None:
        self._do(dist.isend, tensor)

    def receive(self, tensor: Tensor) -> None:
        self._do(dist.irecv, tensor)

    def _do(self, operation: object, tensor: Tensor) -> None:
        # batched, as in torch's schedules: that uses the communicator of all, and opens none for the pair
        for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, self.peer)]):  # type: ignore[arg-type]
            work.wait()

    def finish(self) -> None:
        _synchronize()


class BoundaryWire:
    """Over a boundary of a pipeline."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary, self._number = boundary, 0

    def send(self, tensor: Tensor) -> None:
        self._exchange([tensor], [])

    def receive(self, tensor: Tensor) -> None:
        self._exchange([], [tensor])

    def _exchange(self, send: list[Tensor], receive: list[Tensor]) -> None:
        exchange: Exchange = self.boundary.exchange(send, receive, microbatch=self._number)
        self._number += 1
        exchange.wait()

    def finish(self) -> None:
        self.boundary.confirm()
        _synchronize()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def trip_s(wire: Wire, is_first: bool, tensor: Tensor, trips: int) -> float:
    """Seconds of one way, of `trips` there and back; one more before, which opens connections. Both must call it."""
    start_s = 0.0
    for trip in range(trips + 1):
        if trip == 1:
            wire.finish()
            start_s = time.perf_counter()
        for turn in (is_first, not is_first):
            wire.send(tensor) if turn else wire.receive(tensor)
    wire.finish()
    return (time.perf_counter() - start_s) / trips / 2


def stream_s(wire: Wire, is_sender: bool, tensor: Tensor, sends: int) -> float:
    """Seconds of one transfer, of `sends` in a row, all of the same tensor; one more before. Both must call it.

    The receiver's time counts: a sender may be done when its data is only on the way.
    """
    start_s = 0.0
    for number in range(sends + 1):
        if number == 1:
            wire.finish()
            start_s = time.perf_counter()
        wire.send(tensor) if is_sender else wire.receive(tensor)
    wire.finish()
    return (time.perf_counter() - start_s) / sends
