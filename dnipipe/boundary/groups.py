"""A process group of its own for each boundary, made by the pipeline's ranks alone.

torch names a group made with `use_local_synchronization` after its ranks and the number of groups that the process is
in. Two ranks that are in different numbers of groups look for each other under different names, and hang. So the ranks
first level their numbers, then make the groups in two rounds in which every rank makes exactly one:

    round 0   (0 1) (2 3) (4)
    round 1   (0) (1 2) (3 4)
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def boundary_groups(
    ranks: Sequence[int], stage: int, group: dist.ProcessGroup | None, timeout_s: float, device: torch.device
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups of (the boundary above `stage`, the boundary below it); None at the ends of the pipeline.

    Args: ranks: global ranks of the stages, in order. group: of all of them; every one must call this at the same time.
          device: where the tensors are that will cross.
    """
    options = _options(group, device)
    _level(group, timeout_s)
    by_round: list[dist.ProcessGroup] = []
    for first_upper in (0, 1):
        upper = stage if (stage - first_upper) % 2 == 0 else stage - 1
        members = [ranks[each] for each in (upper, upper + 1) if 0 <= each < len(ranks)]
        by_round.append(_new_group(members, timeout_s, **options))
    below, above = by_round if stage % 2 == 0 else reversed(by_round)
    return (above if stage > 0 else None), (below if stage < len(ranks) - 1 else None)


def in_meeting_order(
    stage: int, above: dist.ProcessGroup | None, below: dist.ProcessGroup | None
) -> list[tuple[int, dist.ProcessGroup]]:
    """(Neighbour of a stage, the group with it), in the order in which to make boundaries whose sides meet for that.

    Even stages meet the next one first, odd ones the one before: neighbours come together, none waits in a circle.

    Args: above, below: from boundary_groups().
    """
    sides = [(stage - 1, above), (stage + 1, below)]
    return [(there, group) for there, group in (sides if stage % 2 else sides[::-1]) if group is not None]


def _level(group: dist.ProcessGroup | None, timeout_s: float) -> None:
    """Puts every rank into the same number of groups, by groups of itself alone."""
    own = len(distributed_c10d._world.pg_names)
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, own, group=group)
    for _ in range(max(counts) - own):
        _new_group([dist.get_rank()], timeout_s)


def _options(group: dist.ProcessGroup | None, device: torch.device) -> dict[str, Any]:
    backends = dist.get_backend_config(group)
    if device.type == "cpu":
        return {} if "cpu:" in backends else {"backend": "gloo"}
    if "cuda:nccl" not in backends:
        return {}
    # A transfer that takes as few multiprocessors from the computation beside it as NCCL can do with, and that starts
    # at once when it can.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = 1
    return {"backend": "nccl", "pg_options": options}


def _new_group(ranks: list[int], timeout_s: float, **options: Any) -> dist.ProcessGroup:
    timeout = timedelta(seconds=timeout_s)
    group = dist.new_group(sorted(ranks), timeout=timeout, use_local_synchronization=True, **options)
    assert isinstance(group, dist.ProcessGroup), "new_group of the own rank returns a group"
    return group
