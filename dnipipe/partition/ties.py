"""Weights that several layers of a row share: which they are, and a copy for each of two stages.

Two stages are trained by two processes, which share no memory: a weight of both must be there twice, and whoever trains
them keeps the copies equal (dnipipe.schedule.TiedWeights).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Tie:
    """One weight on two stages. Names are those of the whole model, which are the stages' own.

    Of a weight that one of the stages has in several places the name is that of its named_parameters(): the first.
    """

    first_stage: int
    first_name: str
    last_stage: int
    last_name: str


def part_ties(stages: Sequence[nn.Sequential]) -> list[Tie]:
    """Gives the later of two stages that share a parameter a copy of its own, in every place where it has it.

    A parameter that only one stage has, in however many places, stays shared. Where both stages have the very module
    that holds the parameter, the later one gets a copy of that, too.

    Args:    stages: of one model, in order, as from cut_sequential(). They are changed in place.
    Returns: a tie for each such parameter, in the order of the first stages' parameters.
    Raises:  ValueError: a parameter of three or more stages; then nothing is changed.
    """
    places = {parameter: by_stage for parameter, by_stage in _places(stages).items() if len(by_stage) > 1}
    for by_stage in places.values():
        if len(by_stage) > 2:
            _refuse(by_stage)
    ties = []
    _part_modules(stages, places)
    for parameter, by_stage in places.items():
        (first_stage, first_names), (last_stage, last_names) = by_stage.items()
        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        for name in last_names:
            path, _, attribute = name.rpartition(".")
            setattr(stages[last_stage].get_submodule(path), attribute, own)
        ties.append(Tie(first_stage, first_names[0], last_stage, last_names[0]))
    return ties


def shared_names(model: nn.Module) -> dict[str, str]:
    """The name of every further place of a shared parameter -> the name that named_parameters() gives it: the first."""
    first: dict[nn.Parameter, str] = {}
    everywhere = model.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in everywhere if first.setdefault(parameter, name) != name}


_Places = Mapping[nn.Parameter, Mapping[int, list[str]]]
"""Of each parameter, by the stages that have it: its names there."""


def _places(stages: Sequence[nn.Sequential]) -> _Places:
    places: dict[nn.Parameter, dict[int, list[str]]] = {}
    for stage, module in enumerate(stages):
        for name, parameter in module.named_parameters(remove_duplicate=False):
            places.setdefault(parameter, {}).setdefault(stage, []).append(name)
    return places


def _part_modules(stages: Sequence[nn.Sequential], places: _Places) -> None:
    """Gives later stages copies of the modules that they share with an earlier one and that hold what is tied.

    Else the copy of a weight would be set in the earlier stage, too. Their parameters are still the same ones.
    """
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    memos: list[dict[int, Any]] = [{id(parameter): parameter for parameter in parameters} for _ in stages]
    for by_stage in places.values():
        (first_stage, _), (last_stage, names) = by_stage.items()
        earlier = set(stages[first_stage].modules())
        for name in names:
            parent: nn.Module = stages[last_stage]
            for step in name.split(".")[:-1]:
                child = parent.get_submodule(step)
                if child in earlier:
                    # one memo per stage: what stands there twice is one copy
                    parent.add_module(step, copy.deepcopy(child, memos[last_stage]))
                    break
                parent = child


def _refuse(by_stage: Mapping[int, list[str]]) -> None:
    names = ", ".join(names[0] for names in by_stage.values())
    raise ValueError(
        f"stages {', '.join(map(str, by_stage))} share one parameter, {names}: copies of a weight are kept equal on "
        "two stages only; untie it, or cut the model so that at most two stages have it"
    )
