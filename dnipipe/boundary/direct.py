"""The paired exchange between two GPUs of one host: a note over gloo says that data is there, copy engines fetch it.

    sender     copies what it sends into a slot of its own, records ready[n], posts note n: where the slot lies
    receiver   has note n: its side stream waits for ready[n], copies out of the slot, records taken[n]
    sender     writes to a slot again once a later note has said that exchange n was fetched, behind taken[n]

Nobody occupies a multiprocessor while it waits. NCCL's receive is a kernel that spins until it is met, and a matrix
product that was cut up for all multiprocessors then takes up to twice as long. Besides, what has been posted is a
message of the host and no work of the GPU, so torch.cuda.synchronize() never waits for a neighbour.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .arrival import comes_true
from .base import Boundary, BoundaryError, Exchange, reason_of
from .ipc import HANDLE_BYTES, Place, address_of, copy, place_of
from .paired import PairedBoundary

# number of the exchange; exchanges fetched; bytes sent; the slot's allocation and the offset in it
NOTE = struct.Struct(f"<qqq{HANDLE_BYTES}sq")
ALIGN = 16


@dataclass
class _Slot:
    """Memory that the neighbour reads. exchange: that used it last."""

    memory: Tensor
    place: Place
    exchange: int


class DirectBoundary(Boundary):
    """One side of a cut between two GPUs of one host. Both sides must be made at the same time.

    Args: group: of gloo, of exactly this rank and `peer`. device: of this side. depth: exchanges that may be posted and
          not fetched. The rest as in Boundary.
    Raises: BoundaryError: no answer. RuntimeError: the neighbour's memory cannot be reached.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        depth: int,
        *,
        rank: int,
        stage: int,
        peer: int,
        peer_stage: int,
        timeout_s: float,
    ) -> None:
        super().__init__(rank=rank, stage=stage, peer=peer, peer_stage=peer_stage, timeout_s=timeout_s)
        self.notes = PairedBoundary(
            group, rank=rank, stage=stage, peer=peer, peer_stage=peer_stage, timeout_s=timeout_s
        )
        self.device, self.depth = device, depth
        self.stream = torch.cuda.Stream(device)
        self.posted = self.fetched = self.fetched_by_peer = 0
        self._slots: list[_Slot] = []
        self.ready = [torch.cuda.Event(interprocess=True) for _ in range(depth)]
        self.taken = [torch.cuda.Event(interprocess=True) for _ in range(depth)]
        self._probe = torch.empty(1, dtype=torch.uint8, device=device)
        try:
            events = self._meet()
        except RuntimeError as error:
            if isinstance(error, BoundaryError):
                raise
            raise RuntimeError(
                f"rank {rank} and rank {peer} cannot copy directly between their GPUs' memories ({reason_of(error)}): "
                f"choose transport='group'"
            ) from error
        self.ready_of_peer, self.taken_of_peer = events[:depth], events[depth:]

    def watch(self) -> None:
        self.notes.watch()

    def _meet(self) -> list[torch.cuda.Event]:
        """Swaps the handles of all events, and tries whether the neighbour's memory can be reached."""
        mine: list[bytes] | RuntimeError
        try:
            place = place_of(self._probe)
            mine = [event.ipc_handle() for event in [*self.ready, *self.taken]] + [place.handle]
        except RuntimeError as error:
            mine = error
        num_handles = 2 * self.depth + 1
        own = b"".join(mine) if isinstance(mine, list) else bytes(num_handles * HANDLE_BYTES)
        swapped = torch.empty(len(own), dtype=torch.uint8)
        self.notes.exchange([_bytes_tensor(own)], [swapped], microbatch=0).wait()
        if isinstance(mine, RuntimeError):
            raise mine
        if not swapped.any():
            raise RuntimeError(f"rank {self.peer} cannot share its memory")
        data = swapped.numpy().tobytes()
        *theirs, place_of_probe = (data[at : at + HANDLE_BYTES] for at in range(0, len(data), HANDLE_BYTES))
        address_of(Place(place_of_probe, 0))
        return [torch.cuda.Event.from_ipc_handle(self.device, handle) for handle in theirs]

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], *, microbatch: int) -> Exchange:
        number, self.posted = self.posted, self.posted + 1
        assert number - self.fetched_by_peer < self.depth, f"{self.depth} exchanges posted that nobody fetched"
        num_bytes = sum(_padded(tensor) for tensor in send)
        place = Place(bytes(HANDLE_BYTES), 0)
        if num_bytes:
            slot = self._free_slot(num_bytes, number)
            at, place = slot.memory.data_ptr(), slot.place
            for tensor in send:
                copy(at, tensor.data_ptr(), tensor.nbytes)
                at += _padded(tensor)
            self.ready[number % self.depth].record()
        own = _bytes_tensor(NOTE.pack(number, self.fetched, num_bytes, *place))
        return _DirectExchange(self, number, microbatch, own, receive)

    def _free_slot(self, num_bytes: int, number: int) -> _Slot:
        """A slot whose data has been fetched; the current stream waits for the end of that, the host does not."""
        for slot in self._slots:
            if slot.exchange < self.fetched_by_peer and slot.memory.numel() >= num_bytes:
                torch.cuda.current_stream().wait_event(self.taken_of_peer[slot.exchange % self.depth])
                slot.exchange = number
                return slot
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self._slots.append(_Slot(memory, place_of(memory), number))
        return self._slots[-1]


class _DirectExchange(Exchange):
    boundary: DirectBoundary

    def __init__(
        self, boundary: DirectBoundary, number: int, microbatch: int, own: Tensor, receive: Sequence[Tensor]
    ) -> None:
        super().__init__(boundary, microbatch)
        self.number, self.receive = number, receive
        self.note = torch.empty_like(own)
        self.noted = boundary.notes.exchange([own], [self.note], microbatch=microbatch)
        # what is received into may still be read by work that is under way now
        self.memory_is_free = torch.cuda.Event()
        self.memory_is_free.record()
        self.there: torch.cuda.Event | None = None

    def _wait(self) -> None:
        boundary = self.boundary
        self.noted.wait()
        number, boundary.fetched_by_peer, num_bytes, handle, offset = NOTE.unpack(self.note.numpy().tobytes())
        due = sum(_padded(tensor) for tensor in self.receive)
        if (number, num_bytes) != (self.number, due):
            raise RuntimeError(f"exchange {number} of {num_bytes} bytes came where {self.number} of {due} was due")
        slot = number % boundary.depth
        with torch.cuda.stream(boundary.stream):
            if due:
                self.memory_is_free.wait()
                boundary.ready_of_peer[slot].wait()
                at = address_of(Place(handle, offset))
                for tensor in self.receive:
                    copy(tensor.data_ptr(), at, tensor.nbytes)
                    at += _padded(tensor)
            boundary.taken[slot].record()
            self.there = torch.cuda.Event()
            self.there.record()
        torch.cuda.current_stream().wait_event(self.there)
        boundary.fetched = number + 1
        boundary.bound_host_lead(self)
        self.receive = ()

    def _arrived(self, within_s: float) -> bool:
        until = time.perf_counter() + within_s
        if not self.noted.arrived(within_s):
            return False
        # the note is sent when the neighbour's host has come so far, the data is there when its GPU has
        ready = self.boundary.ready_of_peer[self.number % self.boundary.depth]
        return not self.receive or comes_true(ready.query, until - time.perf_counter())

    def confirm(self) -> None:
        assert self.there is not None, "only what was waited for is confirmed"
        start = time.perf_counter()
        if not comes_true(self.there.query, self.boundary.timeout_s):
            late, seconds = TimeoutError("the GPU did not finish the transfer"), time.perf_counter() - start
            raise BoundaryError(self.boundary.describe_failure(self.microbatch, seconds, late))


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGN) * ALIGN


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
