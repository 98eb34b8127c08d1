"""The boundaries of a stage to its neighbours, made by all ranks of a pipeline at the same time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..boundary import Boundary, DirectBoundary, PairedBoundary, boundary_groups, in_meeting_order
from .announce import Announcer


class Connections:
    """Args: stage: torch's. timeout_s: that a neighbour is waited for."""

    def __init__(self, stage: Any, timeout_s: float) -> None:
        of_group = dist.get_process_group_ranks(stage.group or dist.group.WORLD)
        self.here, self.group, self.timeout_s = stage.stage_index, stage.group, timeout_s
        self.device = torch.device(stage.device)
        self.ranks = [of_group[stage.stage_index_to_group_rank[each]] for each in range(stage.num_stages)]

    def boundaries(self, *, direct: bool, depth: int) -> dict[int, Boundary]:
        """By the stage on the other side. depth: of DirectBoundary."""
        groups = self._groups(torch.device("cpu") if direct else self.device)
        if not direct:
            return {there: PairedBoundary(group, **self._names(there)) for there, group in groups}
        return {there: DirectBoundary(group, self.device, depth, **self._names(there)) for there, group in groups}

    def announcers(self) -> dict[int, Announcer]:
        """The same, for what is said of shapes beforehand, over groups of their own."""
        groups = self._groups(torch.device("cpu"))
        return {there: Announcer(PairedBoundary(group, **self._names(there))) for there, group in groups}

    def _groups(self, device: torch.device) -> list[tuple[int, dist.ProcessGroup]]:
        groups = boundary_groups(self.ranks, self.here, self.group, self.timeout_s, device)
        return in_meeting_order(self.here, *groups)

    def _names(self, there: int) -> dict[str, Any]:
        here = {"rank": self.ranks[self.here], "stage": self.here}
        return {**here, "peer": self.ranks[there], "peer_stage": there, "timeout_s": self.timeout_s}
