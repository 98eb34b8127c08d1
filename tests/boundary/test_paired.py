"""The paired exchange beyond the contract: several transfers in one wait, a GPU, a peer that has left."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch

from dnipipe.boundary import Boundary, BoundaryError, PairedBoundary
from dnipipe.boundary.arrival import Arrival
from dnipipe.boundary.base import HOST_LEAD
from dnipipe.boundary.paired import _PairedExchange
from tests.boundary.sides import number, on_ranks, unconnected


class _Work:
    """Stands for a transfer that takes some seconds, by itself, once somebody waits for it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self, timeout: timedelta | None = None) -> None:
        if timeout is not None and timeout.total_seconds() < self.seconds:
            time.sleep(timeout.total_seconds())
            raise RuntimeError("Timed out")
        time.sleep(self.seconds if timeout is not None else 0)

    def is_completed(self) -> bool:
        return self.seconds == 0


class _Arrival(Arrival):
    def __init__(self, works: list[_Work]) -> None:
        self.works = works  # type: ignore[assignment]

    def is_there(self) -> bool:
        return all(work.seconds == 0 for work in self.works)  # type: ignore[attr-defined]


class _OnStream(_PairedExchange):
    """As on a GPU: waiting takes no time, and what arrived is known from the transfers."""

    def _mark_arrival(self) -> Arrival:
        return _Arrival(self.works)


def _posted(boundary: PairedBoundary, microbatch: int, works: list[_Work], *, on_gpu: bool) -> _PairedExchange:
    exchange = (_OnStream if on_gpu else _PairedExchange)(boundary, microbatch, [])
    exchange.works, exchange.on_gpu = works, on_gpu  # type: ignore[assignment]
    return exchange


def test_the_timeout_holds_for_all_tensors_of_a_wait_together() -> None:
    start = time.perf_counter()
    with pytest.raises(BoundaryError, match=r"waited 0\.[5-9] s, at most 0\.5 s, .* at microbatch 2: .* \(Timed out\)"):
        _posted(unconnected(0.5), 2, [_Work(0.2)] * 10, on_gpu=False).wait()
    assert time.perf_counter() - start < 1.2


class _GivenUp(_Work):
    """What NCCL makes of a transfer whose peer is gone: completed, though nothing came."""

    def is_completed(self) -> bool:
        return True


def test_a_transfer_that_nccl_gave_up_is_not_taken_for_done() -> None:
    boundary = unconnected(5.0)
    _posted(boundary, 7, [_GivenUp(9.0)], on_gpu=True).wait()
    start = time.perf_counter()
    with pytest.raises(BoundaryError, match=r"at microbatch 7: .* \(NCCL gave the transfer up\)"):
        boundary.confirm()
    assert time.perf_counter() - start < 2.0


def test_the_host_leads_a_gpu_by_a_bounded_number_of_exchanges_and_names_the_one_that_hangs() -> None:
    boundary = unconnected(0.3)
    for n in range(HOST_LEAD + 5):
        _posted(boundary, n, [_Work(0.0 if n < 5 else 9.0)], on_gpu=True).wait()
    newest = _posted(boundary, HOST_LEAD + 5, [_Work(9.0)], on_gpu=True)
    for _ in range(2):
        with pytest.raises(BoundaryError) as caught:
            newest.wait()
        assert re.match(
            r"rank 0 \(stage 3\) waited 0\.[3-9] s, at most 0\.3 s, for rank 1 \(stage 4\) at microbatch 5: ",
            str(caught.value),
        )
    assert 0.3 <= boundary.wait_s < 0.95


def _lose_the_peer(boundary: Boundary, side: int) -> tuple[list[str], float] | None:
    """Side 1 says who it is and leaves. Returns what side 0's waits said, and after how many seconds."""
    pid = torch.tensor([os.getpid()])
    boundary.exchange([pid] if side == 1 else [], [pid] if side == 0 else [], microbatch=0).wait()
    if side == 1:
        return None
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{int(pid)}") and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    start, said = time.perf_counter(), []
    posted = [boundary.exchange([number(n)], [number(n)], microbatch=n) for n in range(1, 4)]
    for exchange in posted:
        with pytest.raises(BoundaryError) as caught:
            exchange.wait()
        said.append(str(caught.value))
    return said, time.perf_counter() - start


def test_posting_to_a_peer_that_has_left_is_no_error_and_waiting_is() -> None:
    said, seconds = on_ranks(_lose_the_peer)[0]
    for n, message in enumerate(said, start=1):
        assert re.match(
            rf"rank 0 \(stage 3\) waited 0\.\d s, at most 10 s, for rank 1 \(stage 4\) at microbatch {n}: ", message
        )
    assert seconds < 2


def test_the_thread_of_a_boundary_that_is_gone_ends_when_what_was_posted_is_over() -> None:
    threads = set(threading.enumerate())
    boundary = unconnected(5.0)
    boundary.watch()
    (thread,) = set(threading.enumerate()) - threads
    assert boundary._bystander is not None
    bystander, transfer = weakref.ref(boundary._bystander), boundary._bystander.watch([_Work(0.3)])  # type: ignore[list-item]
    del boundary
    gc.collect()
    assert thread.is_alive(), "something is still posted"
    transfer.wait(5.0)
    thread.join(5.0)
    assert not thread.is_alive()
    gc.collect()
    assert bystander() is None, "what is to be done at the exit keeps it"
