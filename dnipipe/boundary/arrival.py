"""When a transfer on a GPU has really taken place, seen from the host, which never blocks inside CUDA or NCCL for it.

A host that does block there, in a copy or an `.item()`, cannot be interrupted when the other side is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

GIVEN_UP_S = 0.3
POLL_S = 0.0002


def comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    """Whether it is true, or becomes so within so many seconds."""
    until = time.perf_counter() + within_s
    while not condition():
        if time.perf_counter() >= until:
            return False
        time.sleep(POLL_S)
    return True


class Arrival:
    """Marks where works of NCCL end. The current stream waits for them, the host does not.

    Args: stream: one that has no other work, so that the mark is not behind what the current stream has still to do.
    """

    def __init__(self, works: Sequence[dist.Work], stream: torch.cuda.Stream) -> None:
        self.works = works
        self._event = torch.cuda.Event()
        with torch.cuda.stream(stream):
            for work in works:
                work.wait()
            self._event.record()
        torch.cuda.current_stream().wait_event(self._event)

    def is_there(self) -> bool:
        return self._event.query()

    def wait_on_host(self, timeout_s: float) -> None:
        """Raises: TimeoutError, after timeout_s or when NCCL has given the transfer up."""
        start, completed = time.perf_counter(), None
        while not self.is_there():
            now = time.perf_counter()
            # NCCL calls a transfer completed when it has given it up, too; only then does it not arrive soon after.
            if completed is None and all(work.is_completed() for work in self.works):
                completed = now
            if completed is not None and now - completed > GIVEN_UP_S:
                raise TimeoutError("NCCL gave the transfer up")
            if now - start > timeout_s:
                raise TimeoutError("the GPU did not finish the transfer")
            time.sleep(POLL_S)
