"""What a schedule holds: a microbatch's activations from its forward to its last action on that stage.

Counted in microbatches of one stage. Not counted: weights, gradients, optimizer, buffers of messages, the boundary
activations from which predictors learn, and the old weights that `stale` and `corrected` keep.
"""

from __future__ import annotations

from .action import Op, Schedule


def in_flight(schedule: Schedule, stage: int) -> list[int]:
    """Microbatches that a stage holds during each of its actions, in order."""
    last = Op.WEIGHT if schedule.splits_backward else Op.BACKWARD
    held, during = 0, []
    for action in schedule.stages[stage]:
        held += action.op is Op.FORWARD
        during.append(held)
        held -= action.op is last
    return during


def peak_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """The most microbatches that each stage holds at once."""
    return tuple(max(in_flight(schedule, stage), default=0) for stage in range(schedule.num_stages))


def activation_bytes(schedule: Schedule, bytes_per_microbatch: int) -> tuple[int, ...]:
    """The largest activation memory of each stage.

    Args:   bytes_per_microbatch: what one microbatch leaves on one stage between forward and backward; 1 gives the
            memory in units of a microbatch.
    Raises: ValueError: fewer than 1 byte.
    """
    if bytes_per_microbatch < 1:
        raise ValueError(f"bytes_per_microbatch must be at least 1, got {bytes_per_microbatch}")
    return tuple(held * bytes_per_microbatch for held in peak_in_flight(schedule))
