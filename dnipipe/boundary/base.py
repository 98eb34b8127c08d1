"""The contract of a boundary: two sides, and one exchange after the other.

    stage k    exchange(send=[h0], receive=[])    exchange(send=[h2], receive=[g0])   ...
    stage k+1  exchange(send=[], receive=[h0])    exchange(send=[g0], receive=[h2])   ...

The n-th exchange of one side meets the n-th exchange of the other. What one side sends, in number, shape and dtype, is
what the other receives. Posting never blocks; `Exchange.wait` does. A boundary does not look at what it carries.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from torch import Tensor

# The host may run this many exchanges ahead of a GPU before it makes sure that the oldest has really taken place; and
# at the end of a step it makes sure of all (`confirm`). Else a dead neighbour leaves the host in whatever CUDA call the
# caller makes next, where nothing can interrupt it.
HOST_LEAD = 16


class BoundaryError(RuntimeError):
    """A neighbour did not answer: names rank, stage, microbatch, peer and the seconds waited."""


def reason_of(error: Exception) -> str:
    """One line of what torch or the system said, which may be a whole stack."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Exchange(ABC):
    """One rendezvous under way. The tensors given to `Boundary.exchange` belong to it until `wait` returns."""

    def __init__(self, boundary: Boundary, microbatch: int) -> None:
        self.boundary = boundary
        self.microbatch = microbatch
        self._done = False
        self._failure: BoundaryError | None = None

    def wait(self) -> None:
        """Blocks until what was to be received is there (on CUDA: until the current stream may read it).

        May be called again: only the first call waits, and its error is that of every call.
        Raises: BoundaryError after `timeout_s`, or when the peer is gone.
        """
        if self._done:
            return
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        try:
            self._wait()
        except BoundaryError as error:  # of an older exchange, which it names
            self._failure = error
            raise
        except (RuntimeError, TimeoutError) as error:
            seconds = time.perf_counter() - start
            self._failure = BoundaryError(self.boundary.describe_failure(self.microbatch, seconds, error))
            raise self._failure from error
        finally:
            self.boundary.wait_s += time.perf_counter() - start
        self._done = True

    def arrived(self, within_s: float = 0.0) -> bool:
        """Whether what was to be received is there, or never will be, so that `wait` need not wait for it.

        Looks for at most `within_s` seconds, which count as waited. Only where the boundary watched (Boundary.watch)
        when this was posted. Exchanges arrive in the order in which they were posted.
        """
        if self._done or self._failure is not None:
            return True
        start = time.perf_counter()
        try:
            return self._arrived(within_s)
        finally:
            self.boundary.wait_s += time.perf_counter() - start

    def confirm(self) -> None:
        """Blocks the host until the GPU has done this exchange, where `wait` did not. Raises: BoundaryError."""
        return

    @abstractmethod
    def _arrived(self, within_s: float) -> bool:
        """As `arrived`, before the first wait."""

    @abstractmethod
    def _wait(self) -> None:
        """Waits once. Raises: RuntimeError or TimeoutError; BoundaryError for another exchange than this."""


class Boundary(ABC):
    """One side of the cut between two neighbouring stages.

    Args:   rank, stage: of this side. peer, peer_stage: of the other side (global rank, stage index).
            timeout_s: seconds that one wait may take; more than 0.
    Fields: wait_s: seconds this side spent in `wait` so far (host time).
            occupies_gpu: whether what is posted is work of the GPU until the other side meets it.
    """

    occupies_gpu = False

    def __init__(self, *, rank: int, stage: int, peer: int, peer_stage: int, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be more than 0 seconds, got {timeout_s}")
        self.rank, self.stage, self.peer, self.peer_stage = rank, stage, peer, peer_stage
        self.timeout_s = timeout_s
        self.wait_s = 0.0
        self._unconfirmed: deque[Exchange] = deque()

    @abstractmethod
    def exchange(self, send: Sequence[Tensor], receive: Sequence[Tensor], *, microbatch: int) -> Exchange:
        """Posts one exchange and returns at once.

        Args: send: contiguous tensors, not to be changed before `wait` returns. receive: contiguous tensors that are
              overwritten by what the peer sends. microbatch: only named in errors.
        """

    def watch(self) -> None:
        """From now on exchanges can tell whether they have arrived."""
        return

    def confirm(self) -> None:
        """Blocks until what was waited for has really taken place, where `wait` did not block the host itself.

        Raises: BoundaryError, as `wait`.
        """
        while self._unconfirmed:
            self._unconfirmed.popleft().confirm()

    def bound_host_lead(self, newest: Exchange) -> None:
        """To be told of each wait that did not block the host: it goes no further than HOST_LEAD beyond the GPU."""
        self._unconfirmed.append(newest)
        if len(self._unconfirmed) > HOST_LEAD:
            self._unconfirmed.popleft().confirm()

    def describe_failure(self, microbatch: int, seconds: float, error: Exception) -> str:
        return (
            f"rank {self.rank} (stage {self.stage}) waited {seconds:.1f} s, at most {self.timeout_s:g} s, for rank "
            f"{self.peer} (stage {self.peer_stage}) at microbatch {microbatch}: that rank is stopped, dead or far "
            f"behind. Look at its log first. ({reason_of(error)})"
        )
