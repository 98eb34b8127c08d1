"""Cuts a row of layers into stages so that the dearest stage is as cheap as can be.

Source: the ordered partition problem of Skiena, The Algorithm Design Manual (its chapter on dynamic programming), with
the inner minimum found by bisection: Pinar and Aykanat, Fast Optimal Load Balancing Algorithms for 1D Partitioning,
J. Parallel Distrib. Comput. 64(8), 2004.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

from torch import nn


def split_sequential(
    model: nn.Sequential, num_stages: int, *, weights: Sequence[float] | None = None
) -> list[nn.Sequential]:
    """Splits a model into contiguous stages; no other contiguous split has a cheaper dearest stage.

    The stages hold the model's own layers, not copies, under their own names: the stages' state_dicts together are the
    model's.

    Args:
        model: at least num_stages layers.
        num_stages: how many stages, each of at least one layer.
        weights: the cost of each layer in any one unit, 0 or more; by default its number of parameters, at least 1.

    Returns: num_stages sequentials; chained, they compute what the model computes.
    Raises:  ValueError: fewer layers than stages, weights that do not fit the model, or a parameter of two stages.
             TypeError: the model is no nn.Sequential.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(
            f"split_sequential() splits an nn.Sequential, got {type(model).__name__}: wrap its layers in one"
        )
    layers = named_layers(model)
    costs = [_default_cost(layer) for _, layer in layers] if weights is None else list(weights)
    if len(costs) != len(layers):
        raise ValueError(
            f"weights has {len(costs)} numbers, the model has {len(layers)} layers: give one for each layer"
        )
    cuts = balanced_cuts(costs, num_stages)
    stages = [nn.Sequential(OrderedDict(layers[a:b])) for a, b in zip([0, *cuts], [*cuts, len(layers)], strict=True)]
    _refuse_shared_parameters(stages)
    return stages


def balanced_cuts(costs: Sequence[float], num_stages: int) -> list[int]:
    """Where to cut a row of costs into num_stages runs, none empty, so that the largest sum of a run is smallest.

    Returns: num_stages - 1 growing indices; run k is costs[cuts[k - 1]:cuts[k]].
    Raises:  ValueError: fewer costs than stages, or a cost that is negative or not finite.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(
            f"num_stages = {num_stages}; {len(costs)} layers make at least 1 and at most {len(costs)} stages"
        )
    for index, cost in enumerate(costs):
        if not (cost >= 0 and math.isfinite(cost)):
            raise ValueError(f"the cost of layer {index} is {cost}; it must be finite and at least 0")
    total = [0.0, *accumulate(costs)]
    ends = range(len(costs) + 1)
    # dearest[end]: the smallest possible cost of the dearest stage when layers 0..end-1 make the stages so far
    dearest = list(total)
    last_cuts: list[list[int]] = []
    for stage in range(1, num_stages):
        # As the cut moves right the stages before it grow and the stage after it shrinks: the best cut is beside the
        # first at which they cross. The first `stage` layers are one stage each, so no cut lies before `stage`.
        cuts = [_best_cut(dearest, total, stage, end) for end in ends[stage + 1 :]]
        later = [max(dearest[cut], total[end] - total[cut]) for cut, end in zip(cuts, ends[stage + 1 :], strict=True)]
        dearest = [math.inf] * (stage + 1) + later
        last_cuts.append([0] * (stage + 1) + cuts)
    found = [len(costs)]
    for row in reversed(last_cuts):
        found.append(row[found[-1]])
    return found[:0:-1]


def _best_cut(dearest: Sequence[float], total: Sequence[float], first: int, end: int) -> int:
    """The cut in first..end-1 that makes max(stages before, stage after) smallest."""
    cut = bisect_left(range(end), True, lo=first, hi=end - 1, key=lambda cut: dearest[cut] >= total[end] - total[cut])
    if cut > first and total[end] - total[cut - 1] <= max(dearest[cut], total[end] - total[cut]):
        return cut - 1
    return cut


def named_layers(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """The layers in their row, each as often as it stands there."""
    # not named_children(): it passes over a layer that stands in the row a second time, such as one shared ReLU
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if name and "." not in name]


def _default_cost(layer: nn.Module) -> float:
    return max(1, sum(parameter.numel() for parameter in layer.parameters()))


def _refuse_shared_parameters(stages: Sequence[nn.Sequential]) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for stage, module in enumerate(stages):
        for name, parameter in module.named_parameters():
            first_stage, first_name = owner.setdefault(id(parameter), (stage, name))
            if first_stage != stage:
                raise ValueError(
                    f"stages {first_stage} and {stage} share one parameter, {first_name} and {name}: each process "
                    "would train a copy of its own; untie it, or choose weights that put both layers into one stage"
                )
