"""All forwards, then all backwards: a stage holds the activations of every microbatch.

Source: GPipe, Huang et al. 2019.

    stage 0   F0 F1 F2 F3          B0 B1 B2 B3
    stage 1      F0 F1 F2 F3    B0 B1 B2 B3
    stage 2         F0 F1 F2 F3 B0 B1 B2 B3
"""

from __future__ import annotations

from .action import Action, Op, Schedule, require_positive

NAME = "GPipe"


def build(num_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of one step. Backwards come in the order of the forwards, as in torch."""
    require_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    stages = tuple(
        tuple(Action(stage, op, m) for op in (Op.FORWARD, Op.BACKWARD) for m in range(num_microbatches))
        for stage in range(num_stages)
    )
    return Schedule(NAME, num_microbatches, stages)
