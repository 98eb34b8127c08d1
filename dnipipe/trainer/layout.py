"""Which rank is which stage of which replica, and the groups through which they talk.

4 stages, 2 replicas      rank 0  1  2  3      neighbours are neighbours in rank, so that a pipeline
                          rank 4  5  6  7      stays on one host as far as it can
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist


def stages_for(world_size: int, num_replicas: int) -> int:
    """How many stages so many processes make. Raises: ValueError: they do not make whole replicas."""
    if world_size % num_replicas:
        raise ValueError(
            f"pipeline.num_replicas = {num_replicas}: {world_size} processes do not make as many whole pipelines; "
            f"start a multiple of {num_replicas}"
        )
    return world_size // num_replicas


@dataclass(frozen=True)
class Layout:
    """Where this rank stands. Groups are made by all ranks together, in the same order."""

    rank: int
    num_stages: int
    num_replicas: int

    @property
    def stage(self) -> int:
        return self.rank % self.num_stages

    @property
    def replica(self) -> int:
        return self.rank // self.num_stages

    @property
    def is_last(self) -> bool:
        """Whether this rank knows a loss."""
        return self.stage == self.num_stages - 1

    def pipeline_group(self, backend: str | None = None) -> dist.ProcessGroup:
        """A new group of the stages of this rank's replica. backend: None: that of the default group."""
        return self._mine([self._ranks(replica) for replica in range(self.num_replicas)], backend)

    def replica_group(self) -> dist.ProcessGroup:
        """A new group of this rank's stage in all replicas."""
        pipelines = (self._ranks(replica) for replica in range(self.num_replicas))
        return self._mine([list(ranks) for ranks in zip(*pipelines, strict=True)], None)

    def pair_group(self, stages: tuple[int, int]) -> dist.ProcessGroup | None:
        """A new group of two stages of this rank's replica; None where it is neither of them."""
        pairs = [[self._ranks(replica)[stage] for stage in stages] for replica in range(self.num_replicas)]
        return self._mine_or_none(pairs, None)

    def rank_of(self, stage: int) -> int:
        """The global rank of a stage of the same replica."""
        return self._ranks(self.replica)[stage]

    def _ranks(self, replica: int) -> list[int]:
        return list(range(replica * self.num_stages, (replica + 1) * self.num_stages))

    def _mine(self, groups: Sequence[list[int]], backend: str | None) -> dist.ProcessGroup:
        mine = self._mine_or_none(groups, backend)
        assert mine is not None, "every rank is in one of these groups"
        return mine

    def _mine_or_none(self, groups: Sequence[list[int]], backend: str | None) -> dist.ProcessGroup | None:
        made = [(ranks, dist.new_group(ranks, backend=backend)) for ranks in groups]
        return next((group for ranks, group in made if self.rank in ranks), None)
