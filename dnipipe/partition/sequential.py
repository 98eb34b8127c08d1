"""Cuts a row of layers into stages, by numbers of layers or so that the dearest stage is as cheap as can be."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import nn

from .balance import balanced_cuts as balanced_cuts


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
    layers = _row("split_sequential", model)
    costs = [_default_cost(layer) for _, layer in layers] if weights is None else list(weights)
    if len(costs) != len(layers):
        raise ValueError(
            f"weights has {len(costs)} numbers, the model has {len(layers)} layers: give one for each layer"
        )
    edges = [0, *balanced_cuts(costs, num_stages), len(layers)]
    stages = cut_sequential(model, [end - start for start, end in pairwise(edges)])
    _refuse_shared_parameters(stages)
    return stages


def cut_sequential(model: nn.Sequential, lengths: Sequence[int]) -> list[nn.Sequential]:
    """Cuts a model into stages of so many layers each: its own layers, not copies, under their own names.

    A parameter that two stages share stays one parameter: part_ties() gives each a copy.

    Raises: ValueError: a stage without layers, or lengths that are not all layers together.
            TypeError: the model is no nn.Sequential.
    """
    layers = _row("cut_sequential", model)
    return [nn.Sequential(OrderedDict(layers[start:end])) for start, end in runs(lengths, len(layers))]


def runs(lengths: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """Where each stage of so many layers starts and ends: stage k is layers[start:end].

    Raises: ValueError: a stage without layers, or lengths that are not all layers together.
    """
    if sum(lengths) != num_layers or any(length < 1 for length in lengths):
        raise ValueError(f"lengths = {list(lengths)}: stages of at least 1 layer, {num_layers} layers together")
    return list(pairwise([0, *accumulate(lengths)]))


def named_layers(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """The layers in their row, each as often as it stands there."""
    # not named_children(): it passes over a layer that stands in the row a second time, such as one shared ReLU
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if name and "." not in name]


def _row(caller: str, model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"{caller}() splits an nn.Sequential, got {type(model).__name__}: wrap its layers in one")
    return named_layers(model)


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
