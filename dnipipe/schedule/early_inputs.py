"""The boundary to the previous stage where a microbatch may start before its input is here (forward_unlocked.py).

It posts what Upward posts. What comes late is kept until the model of the inputs has learned from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .ledger import Upward


class EarlyUpward(Upward):
    """As Upward. Every activation is taken once, by take(); receive() leaves it here."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.boundary.watch()
        self._arrived: dict[int, list[Tensor]] = {}

    def is_here(self, microbatch: int, within_s: float) -> bool:
        """Whether its activation is, or comes within so many seconds."""
        if microbatch in self._arrived:
            return True
        exchange = next(exchange for number, exchange, _ in self._under_way if number == microbatch)
        return exchange.arrived(within_s)

    def receive(self, microbatch: int) -> list[Tensor]:
        """Waits for the activation of `microbatch` and all before it."""
        while self._under_way and self._under_way[0][0] <= microbatch:
            number, exchange, received = self._under_way.popleft()
            exchange.wait()
            self._arrived[number] = received
        return list(self._arrived[microbatch])

    def take(self, microbatch: int) -> list[Tensor]:
        """The same for the last time."""
        self.receive(microbatch)
        return self._arrived.pop(microbatch)

    def put_back(self, microbatch: int, received: Sequence[Tensor]) -> None:
        """It has arrived before, in another process."""
        self._arrived[microbatch] = list(received)

    def drain(self, end: int) -> None:
        """As Upward: what lies beyond `end` is void, what came late is not."""
        if self._under_way and self._under_way[0][0] < end:
            self.receive(end - 1)
        super().drain(end)
