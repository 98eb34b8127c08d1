"""The one collective that crosses all stages, bounded in time like every other wait for another rank."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .arrival import Arrival
from .base import BoundaryError, reason_of


def reduce_within(tensor: Tensor, group: dist.ProcessGroup | None, timeout_s: float, who: str) -> None:
    """Takes the maximum over the ranks of `group`, in place.

    Args: timeout_s: seconds to wait for the others, more than 0. who: names this rank and the occasion in the error.
    Raises: BoundaryError, when a rank does not come in time, or is gone.
    """
    start = time.perf_counter()
    try:
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None, "an asynchronous collective returns its handle"
        if tensor.is_cuda:
            Arrival([work], torch.cuda.Stream()).wait_on_host(timeout_s)
        else:
            work.wait(timedelta(seconds=timeout_s))
    except (RuntimeError, TimeoutError) as error:
        seconds = time.perf_counter() - start
        raise BoundaryError(
            f"{who} waited {seconds:.1f} s, at most {timeout_s:g} s: some rank is stopped, dead or far behind. "
            f"({reason_of(error)})"
        ) from error
