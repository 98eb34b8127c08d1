"""The process groups of a run, made once, by all ranks together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist

from .layout import Layout


@dataclass(frozen=True)
class Groups:
    """Who talks with whom.

    Fields: pipeline: the stages of this replica, over the device's backend. replicas: this stage in all replicas; None:
            there is one. The others are gloo's, for small things on the CPU. everyone: clocks and facts. writers: of
            all ranks, too, for the threads that write checkpoints. stages: of this replica, for a text that they write
            together. norms: the same, for a clip over all of them.
    """

    layout: Layout
    pipeline: dist.ProcessGroup
    replicas: dist.ProcessGroup | None
    everyone: dist.ProcessGroup
    writers: dist.ProcessGroup
    stages: dist.ProcessGroup
    norms: dist.ProcessGroup
    pairs: dict[tuple[int, int], dist.ProcessGroup | None] = field(default_factory=dict)

    @classmethod
    def make(cls, num_stages: int) -> Groups:
        """Every rank must call it at the same time."""
        layout = Layout(dist.get_rank(), num_stages, dist.get_world_size() // num_stages)
        several = layout.num_replicas > 1
        return cls(
            layout=layout,
            pipeline=layout.pipeline_group(),
            replicas=layout.replica_group() if several else None,
            everyone=dist.new_group(backend="gloo"),
            writers=dist.new_group(backend="gloo"),
            stages=layout.pipeline_group("gloo"),
            norms=layout.pipeline_group("gloo"),
        )

    def pair(self, stages: tuple[int, int]) -> dist.ProcessGroup | None:
        """Of two stages of this replica, over the device's backend; None where it is neither of them.

        Every rank must call it at the same time, for the same stages.
        """
        if stages not in self.pairs:
            self.pairs[stages] = self.layout.pair_group(stages)
        return self.pairs[stages]
