"""A thread that waits for gloo's transfers, so that whoever needs them can ask whether they are over.

gloo carries a transfer out while somebody waits for it: `is_completed()` stays False until `wait` returns, even where
the data is there (torch 2.13), and a `wait` that runs out of time breaks the connection.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

EXIT_S = 10.0
FOREVER = timedelta(days=30)  # the owner bounds its own wait; between its steps nobody waits, however long that takes


class Transfer:
    """Works that are waited for. over: they have ended. failure: how, if not well; to be read once over."""

    def __init__(self, works: Sequence[dist.Work]) -> None:
        self.works = list(works)
        self.over = threading.Event()
        self.failure: Exception | None = None

    def wait(self, timeout_s: float) -> None:
        """Raises: TimeoutError after timeout_s; RuntimeError, gloo's own."""
        if not self.over.wait(timeout_s):
            raise TimeoutError("nothing arrived")
        if self.failure is not None:
            raise self.failure


class Bystander:
    """Waits for one transfer after the other, in the order in which they were posted.

    Args: name: of the thread. owner: when it is gone the thread ends, once what is posted is over.
    """

    def __init__(self, name: str, owner: object) -> None:
        self._transfers: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        # daemon: what is still posted when a run ends may never be met, and must not keep the process
        self._thread = threading.Thread(target=self._stand_by, name=name, daemon=True)
        self._thread.start()
        # a thread that is in gloo when the interpreter goes aborts the process; the neighbour's exit frees it
        atexit.register(self.close)
        # nobody closes a boundary, and a process may make many; here nobody waits for the thread, whose last receive
        # may never be met
        weakref.finalize(owner, self._transfers.put, None).atexit = False

    def close(self) -> None:
        """Ends the thread when what is posted is over, at the latest after EXIT_S."""
        self._transfers.put(None)
        self._thread.join(EXIT_S)

    def watch(self, works: Sequence[dist.Work]) -> Transfer:
        transfer = Transfer(works)
        self._transfers.put(transfer)
        return transfer

    def _stand_by(self) -> None:
        while (transfer := self._transfers.get()) is not None:
            try:
                for work in transfer.works:
                    work.wait(FOREVER)
            except Exception as error:  # whatever it is, its owner hears it, and the next transfer is waited for
                transfer.failure = error
            transfer.works = []
            transfer.over.set()
            del transfer  # not kept while waiting for the next
        atexit.unregister(self.close)
