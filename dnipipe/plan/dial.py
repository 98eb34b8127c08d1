"""How many microbatches in flight are worth their lateness, from what a transfer over each boundary takes.

Each boundary has one slot (the stage above it holds 1 more than the one below) or two. Those with the longest transfers
get two first, until as good as nothing more is won.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from . import dni
from .action import Op
from .simulate import Run, Times, simulate

TOLERANCE = Fraction(1, 100)  # of utilisation: what is not worth making gradients later for
FINEST = Fraction(1, 200)  # of a microbatch: what of a transfer is finer is noise


@dataclass(frozen=True)
class Dial:
    """in_flight: by stage, without the last. utilisation: 0 to 1, with it. most: with two slots on every boundary."""

    in_flight: tuple[int, ...]
    utilisation: float
    most: float


def choose_in_flight(microbatch_ms: float, transfers_ms: Sequence[float]) -> Dial:
    """The fewest microbatches in flight whose simulated utilisation is within TOLERANCE of that of the most.

    Args: microbatch_ms: forward and backward on the slowest stage, above 0. transfers_ms: of both ways at once, over
          each boundary.
    """
    transfers = tuple(round(Fraction(each) / Fraction(microbatch_ms) / FINEST) * FINEST for each in transfers_ms)
    third = Fraction(1, 3)
    times = Times(third, third, third, Fraction(0), transfers=transfers)
    slowest_first = sorted(range(len(transfers)), key=lambda boundary: -transfers[boundary])

    def held(doubled: int) -> tuple[int, ...]:
        slots = [2 if boundary in slowest_first[:doubled] else 1 for boundary in range(len(transfers))]
        return tuple(1 + each for each in accumulate(reversed(slots)))[::-1]

    def utilisation(doubled: int) -> Fraction:
        schedule = dni.stale(len(transfers) + 1, 1, in_flight=held(doubled), paired=True)
        return _utilisation(simulate(schedule, times))

    fewest, enough = 0, len(transfers)
    most = utilisation(enough)
    while fewest < enough:  # more slots are never slower
        middle = (fewest + enough) // 2
        if utilisation(middle) >= most * (1 - TOLERANCE):
            enough = middle
        else:
            fewest = middle + 1
    return Dial(held(enough), float(utilisation(enough)), float(most))


def _utilisation(run: Run) -> Fraction:
    """Of the slowest stage, over the last third: Run.bubble would need a steady state, which may take long to show."""
    count, slowest = run.schedule.total_microbatches // 3, 0
    for actions, ends in zip(run.schedule.stages, run.ends, strict=True):
        forwards = [end for action, end in zip(actions, ends, strict=True) if action.op is Op.FORWARD]
        slowest = max(slowest, forwards[-1] - forwards[-1 - count])
    return count * run.times.compute / (slowest * run.times.tick_ms)
