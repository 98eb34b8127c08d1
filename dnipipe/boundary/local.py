"""A boundary between two threads of one process, which can be told to misbehave: for tests and for study.

It numbers its messages and always checks the number, so a message lost or overtaken is an error and never a wrong
value.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from .base import Boundary, Exchange

Message = tuple[int, list[Tensor]]


def local_pair(
    *,
    timeout_s: float = 10.0,
    delay_s: Callable[[int], float] = lambda number: 0.0,
    drop: Collection[int] = (),
    swap: Collection[int] = (),
) -> tuple[LocalBoundary, LocalBoundary]:
    """The two sides of one boundary: (of stage 0, of stage 1), each to be used by one thread.

    Args: timeout_s: seconds that one wait may take. delay_s: seconds that the message of exchange `number` travels
          (both directions). drop: numbers of messages that never arrive. swap: numbers of messages that the next one
          overtakes.
    """
    down: queue.SimpleQueue[tuple[float, Message]] = queue.SimpleQueue()
    up: queue.SimpleQueue[tuple[float, Message]] = queue.SimpleQueue()
    faults = {"delay_s": delay_s, "drop": drop, "swap": swap}
    first = LocalBoundary(0, down, up, timeout_s=timeout_s, **faults)  # type: ignore[arg-type]
    second = LocalBoundary(1, up, down, timeout_s=timeout_s, **faults)  # type: ignore[arg-type]
    return first, second


class LocalBoundary(Boundary):
    """One side of `local_pair`; rank and stage are the side's number."""

    def __init__(
        self,
        side: int,
        outbox: queue.SimpleQueue[tuple[float, Message]],
        inbox: queue.SimpleQueue[tuple[float, Message]],
        *,
        timeout_s: float,
        delay_s: Callable[[int], float],
        drop: Collection[int],
        swap: Collection[int],
    ) -> None:
        super().__init__(rank=side, stage=side, peer=1 - side, peer_stage=1 - side, timeout_s=timeout_s)
        self._outbox, self._inbox = outbox, inbox
        self._delay_s, self._drop, self._swap = delay_s, drop, swap
        self._posted = self._taken = 0
        self._seen: deque[tuple[float, Message]] = deque()  # out of the inbox, and not taken yet
        self._held: list[tuple[float, Message]] = []

    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], *, microbatch: int) -> Exchange:
        number, self._posted = self._posted, self._posted + 1
        # A copy, because the receiver may read it while the sender, having waited, changes its tensor.
        envelope = (time.perf_counter() + self._delay_s(number), (number, [tensor.clone() for tensor in send]))
        if number in self._swap:
            self._held.append(envelope)
        elif number not in self._drop:
            self._outbox.put(envelope)
            while self._held:
                self._outbox.put(self._held.pop())
        return _LocalExchange(self, microbatch, number, list(receive))

    def take(self, number: int) -> list[Tensor]:
        """The peer's message `number`. Raises: TimeoutError; RuntimeError if another message comes first."""
        deadline = time.perf_counter() + self.timeout_s
        try:
            due, (got, tensors) = self._seen.popleft() if self._seen else self._inbox.get(timeout=self.timeout_s)
        except queue.Empty:
            raise TimeoutError("nothing arrived") from None
        self._taken += 1
        if got != number:
            raise RuntimeError(f"message {got} arrived where message {number} was due")
        time.sleep(max(0.0, min(due, deadline) - time.perf_counter()))
        if due > deadline:
            raise TimeoutError("nothing arrived")
        return tensors

    def sees(self, number: int, within_s: float) -> bool:
        """Whether message `number` arrives within so many seconds."""
        until = time.perf_counter() + within_s
        try:
            while len(self._seen) <= number - self._taken:
                left_s = until - time.perf_counter()
                self._seen.append(self._inbox.get(timeout=left_s) if left_s > 0 else self._inbox.get_nowait())
        except queue.Empty:
            return False
        travels_s = self._seen[number - self._taken][0] - time.perf_counter()
        time.sleep(min(max(travels_s, 0.0), max(until - time.perf_counter(), 0.0)))
        return travels_s <= 0 or self._seen[number - self._taken][0] <= time.perf_counter()


class _LocalExchange(Exchange):
    boundary: LocalBoundary

    def __init__(self, boundary: LocalBoundary, microbatch: int, number: int, receive: list[Tensor]) -> None:
        super().__init__(boundary, microbatch)
        self._number, self._receive = number, receive

    def _arrived(self, within_s: float) -> bool:
        return self.boundary.sees(self._number, within_s)

    def _wait(self) -> None:
        tensors = self.boundary.take(self._number)
        sent, due = ([(tuple(t.shape), t.dtype) for t in group] for group in (tensors, self._receive))
        if sent != due:
            raise RuntimeError(f"the peer sent {sent} where {due} were due")
        for buffer, tensor in zip(self._receive, tensors, strict=True):
            buffer.copy_(tensor)
