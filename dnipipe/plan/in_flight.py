"""How many microbatches each stage holds where gradients may be late (dni.stale): a dial for each boundary.

    S = 4, by stage   4 3 2 1     1F1B's order without its flush: a transfer finds no time of its own
                      7 5 3 1     each way over each boundary has a slot of its own, at up to twice the lateness
                      5 4 3 1     that for the lowest boundary alone

Stage i + 1 gives a gradient when it has n(i+1) microbatches in flight, and stage i, from where they came, has one more
by then. So n falls from stage to stage, down to the 1 of the last; where it falls by 2 a boundary has its slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

InFlight: TypeAlias = int | Sequence[int] | None


def in_flight_by_stage(num_stages: int, in_flight: InFlight) -> tuple[int, ...]:
    """Microbatches that each stage holds at most.

    Args:   in_flight: of each stage but the last, i in num_stages - i to 2 (num_stages - i) - 1, falling; or of the
            first alone, and then of each next one 1 less, as far as it may have so many; None: num_stages.
    Raises: ValueError for numbers out of range, too many or too few, or that do not fall.
    """
    lowest, highest = range(num_stages, 0, -1), range(2 * num_stages - 1, 0, -2)
    if isinstance(in_flight, int):
        _check_range("in_flight", in_flight, lowest[0], highest[0], f"for {num_stages} stages")
        return tuple(min(in_flight - stage, most) for stage, most in enumerate(highest))
    if in_flight is None:
        return tuple(lowest)
    if len(in_flight) != num_stages - 1:
        raise ValueError(
            f"in_flight = {list(in_flight)}: {num_stages} stages take {num_stages - 1} numbers, one for each but the "
            f"last, as {list(lowest[:-1])}; or one for the first stage"
        )
    held = (*in_flight, 1)
    for stage, each in enumerate(in_flight):
        where = f"on stage {stage} of {num_stages}"
        _check_range(f"in_flight = {list(in_flight)}", each, lowest[stage], highest[stage], where)
    for stage, (above, below) in enumerate(pairwise(held)):
        if above <= below:
            raise ValueError(
                f"in_flight = {list(in_flight)}: it must fall from stage to stage, got {above} on stage {stage} and "
                f"{below} on stage {stage + 1}, which gives no gradient back before stage {stage} has {below + 1}"
            )
    return held


def _check_range(name: str, value: int, lowest: int, highest: int, where: str) -> None:
    if not lowest <= value <= highest:
        raise ValueError(
            f"{name} must be from {lowest} to {highest} microbatches {where}, got {value}: with fewer every stage "
            f"waits, and more hide nothing more"
        )
