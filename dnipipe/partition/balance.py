"""Cuts a row of costs into stages so that the dearest stage is as cheap as can be, and none is too large.

Source: the ordered partition problem of Skiena, The Algorithm Design Manual (its chapter on dynamic programming), with
the inner minimum found by bisection: Pinar and Aykanat, Fast Optimal Load Balancing Algorithms for 1D Partitioning,
J. Parallel Distrib. Comput. 64(8), 2004.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


def balanced_cuts(
    costs: Sequence[float],
    num_stages: int,
    *,
    extra: float = 0.0,
    sizes: Sequence[int] | None = None,
    max_size: float = math.inf,
) -> list[int]:
    """Where to cut a row of costs into num_stages runs, none empty, so that the dearest run is as cheap as can be.

    Args:
        costs: of each layer, in any one unit.
        extra: what every stage but the last costs on top, in the same unit, such as predicting a gradient.
        sizes: of each layer, such as the bytes that it needs.
        max_size: no stage's sizes may sum to more.

    Returns: num_stages - 1 growing indices; run k is costs[cuts[k - 1]:cuts[k]].
    Raises:  ValueError: fewer costs than stages, a number that is negative or not finite, sizes that are not as many
             as the costs, or no split within max_size; it says what the best would need.
    """
    _check(costs, num_stages, extra, sizes, max_size)
    if sizes is not None:
        _refuse_too_large(sizes, num_stages, max_size)
    row = _Row([0.0, *accumulate(costs)], [0, *accumulate(sizes or [0] * len(costs))], max_size)
    return _best_cuts(row, [extra] * (num_stages - 1) + [0.0])


@dataclass(frozen=True)
class _Row:
    """What the first 0, 1, 2, ... layers cost together, and how large they are together."""

    cost: Sequence[float]
    size: Sequence[int]
    max_size: float

    def stage(self, start: int, end: int, extra: float) -> float:
        """The cost of the stage of layers start..end-1; infinite if it is too large."""
        if self.size[end] - self.size[start] > self.max_size:
            return math.inf
        return self.cost[end] - self.cost[start] + extra


def _best_cuts(row: _Row, extras: Sequence[float]) -> list[int]:
    """extras: of each stage, what it costs on top; all but the last are equal."""
    ends = range(len(row.cost))
    # dearest[end]: the smallest possible cost of the dearest stage when layers 0..end-1 make the stages so far. It does
    # not fall as the end moves right: without its last layer a split costs no more, and if that layer was a stage by
    # itself, another is halved. That also holds of infinity, where a stage would be too large.
    dearest = [row.stage(0, end, extras[0]) for end in ends]
    last_cuts: list[list[int]] = []
    for stage, extra in enumerate(extras[1:], start=1):
        # As the cut moves right the stages before it grow and the stage after it shrinks: the best cut is beside the
        # first at which they cross. The first `stage` layers are one stage each, so no cut lies before `stage`.
        cuts = [_best_cut(dearest, row, extra, stage, end) for end in ends[stage + 1 :]]
        pairs = zip(cuts, ends[stage + 1 :], strict=True)
        later = [max(dearest[cut], row.stage(cut, end, extra)) for cut, end in pairs]
        dearest = [math.inf] * (stage + 1) + later
        last_cuts.append([0] * (stage + 1) + cuts)
    found = [ends[-1]]
    for cuts in reversed(last_cuts):
        found.append(cuts[found[-1]])
    return found[:0:-1]


def _best_cut(dearest: Sequence[float], row: _Row, extra: float, first: int, end: int) -> int:
    """The cut in first..end-1 that makes max(stages before, stage after) smallest."""
    cut = bisect_left(
        range(end), True, lo=first, hi=end - 1, key=lambda cut: dearest[cut] >= row.stage(cut, end, extra)
    )
    if cut > first and row.stage(cut - 1, end, extra) <= max(dearest[cut], row.stage(cut, end, extra)):
        return cut - 1
    return cut


def _check(costs: Sequence[float], num_stages: int, extra: float, sizes: Sequence[int] | None, max_size: float) -> None:
    if not 1 <= num_stages <= len(costs):
        raise ValueError(
            f"num_stages = {num_stages}; {len(costs)} layers make at least 1 and at most {len(costs)} stages"
        )
    for what, numbers in (("cost", costs), ("size", sizes or [])):
        for index, number in enumerate(numbers):
            if not (number >= 0 and math.isfinite(number)):
                raise ValueError(f"the {what} of layer {index} is {number}; it must be finite and at least 0")
    if not (extra >= 0 and math.isfinite(extra)):
        raise ValueError(f"extra = {extra}; it must be finite and at least 0")
    if not max_size >= 0:
        raise ValueError(f"max_size = {max_size}; it must be at least 0")
    if sizes is None and max_size != math.inf:
        raise ValueError(f"max_size = {max_size} limits nothing without sizes: give one for each layer")
    if sizes is not None and len(sizes) != len(costs):
        raise ValueError(f"sizes has {len(sizes)} numbers, costs has {len(costs)}: give one for each layer")


def _refuse_too_large(sizes: Sequence[int], num_stages: int, max_size: float) -> None:
    """Raises: ValueError: no split into so many stages keeps every one to max_size."""
    edges = [0, *balanced_cuts(sizes, num_stages), len(sizes)]
    needed = max(sum(sizes[start:end]) for start, end in pairwise(edges))
    if needed <= max_size:
        return
    cure, largest = "use more stages", max(sizes)
    if largest > max_size:
        cure = f"layer {sizes.index(largest)} alone is of size {largest}, so more stages do not help: make it smaller"
    raise ValueError(
        f"of {num_stages} stages the largest is of size {needed} or more in every split, and max_size = {max_size}: "
        f"{cure}"
    )
