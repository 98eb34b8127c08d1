"""One forward, one backward: a stage holds at most num_stages - stage activations.

Source: PipeDream-Flush, Narayanan et al. 2021.

    stage 0   F0 F1 F2       B0 F3 B1    B2    B3
    stage 1      F0 F1    B0 F2 B1 F3 B2    B3
    stage 2         F0 B0 F1 B1 F2 B2 F3 B3
"""

from __future__ import annotations

from .action import Schedule, one_forward_one_backward, require_positive

NAME = "1F1B"


def build(num_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of one step. With fewer microbatches than stages the first stages do all forwards first."""
    require_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    stages = tuple(
        one_forward_one_backward(stage, num_stages - 1 - stage, num_microbatches) for stage in range(num_stages)
    )
    return Schedule(NAME, num_microbatches, stages)
