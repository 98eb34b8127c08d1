"""A checkpoint goes on in any number of stages: what belongs to a parameter finds its stage by the parameter's name.

A stage is a run of the model's layers under the model's own names, so all stages' weights together are the model's, and
so are an optimizer's moments once they are kept by name. Predictors belong to a cut: where it moves, they begin anew.

A weight that the model has in two layers is two equal copies where these are on two stages, with moments of each; on
one stage it is one, with moments under its first name alone. So either name goes on with the moments of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from .folder import CheckpointFolder

State = dict[str, Any]
OF_A_STAGE = ("inputs", "input_learner", "early_starts", "num_early_starts")
"""What a schedule whose inputs are unlocked keeps of its own stage's input."""
NOTHING_SHARED: Mapping[str, str] = MappingProxyType({})


def load_stage(
    checkpoints: CheckpointFolder,
    step: int,
    stage: int,
    module: nn.Module,
    cut: list[list[str]],
    *,
    shared: Mapping[str, str] = NOTHING_SHARED,
    replica: int = 0,
    num_replicas: int = 1,
) -> tuple[State, str | None]:
    """The state of a stage after a step, from a checkpoint of as many stages and replicas or of any other number.

    States hold at least "model", "optimizer" (by name), "cut" and "num_replicas", and with ScheduleDNI its "schedule".
    Rank after rank they are those of the first replica's stages, then those of the others, which hold their own
    schedule and no model: what is on its way belongs to a replica.

    Args:    module: this stage. cut: the names of the layers of every stage. replica, num_replicas: all as it is now.
             shared: dnipipe.partition.shared_names() of the whole model.
    Returns: the state, and one sentence for the user where it is not as it was left.
    Raises:  ValueError: the checkpoint lacks a parameter.
    """
    first = checkpoints.load(step, 0)
    before, replicas_before = len(first["cut"]), first.get("num_replicas", 1)
    if first["cut"] != cut:
        state = reshard((checkpoints.load(step, each) for each in range(before)), module, shared)
        told = f"a checkpoint of {before} stages goes on in {len(cut)}, by the names of its layers"
        if "schedule" in state:
            told += "; predictors begin anew, for they belong to the old cut"
        return {**state, "cut": cut}, told
    state = checkpoints.load(step, stage)
    if num_replicas == replicas_before:
        return (state if replica == 0 else {**state, **checkpoints.load(step, replica * before + stage)}), None
    told = f"a checkpoint of {replicas_before} replicas goes on in {num_replicas}"
    if "schedule" in state:
        flow = {**state["schedule"]["flow"], "pending": [], "carried": []}
        state = {**state, "schedule": {**state["schedule"], "flow": flow}}
        told += "; true gradients that were on their way are dropped"
    return state, told


def reshard(states: Iterable[State], module: nn.Module, shared: Mapping[str, str] = NOTHING_SHARED) -> State:
    """One state for a module out of those of all stages, whose layers it may have from any of them.

    What belongs to no parameter is the first stage's. A schedule keeps its counters alone; an optimizer its moments,
    for a clip over all stages belongs to the cut. "tied", of dnipipe.schedule.TiedWeights, is that of the first stage
    that has one; a checkpoint of one stage has no two ends to hand on.

    Args:   states: in the order of the stages; each is dropped before the next is taken.
            shared: dnipipe.partition.shared_names() of the whole model.
    Raises: ValueError: a parameter or buffer that no stage has.
    """
    weights, moments = list(module.state_dict()), _Moments(module, shared)
    model: State = {}
    first: State = {}
    ties: list[State | None] = []
    flow: State | None = None
    for state in states:
        first = first or {name: value for name, value in state.items() if name not in ("model", "optimizer", "tied")}
        ties.append(state.get("tied"))
        model |= {name: state["model"][name] for name in weights if name in state["model"]}
        moments.take(state["optimizer"]["state"])
        flow = state.get("schedule", {}).get("flow")
    whole = {**first, "model": _pick(weights, model), "optimizer": {"state": moments.found()}}
    tied = next((each for each in ties if each is not None), None)
    if tied is not None and len(ties) > 1:
        whole["tied"] = tied
    if flow is not None:  # the last stage's: it knows the newest loss
        kept = {name: value for name, value in flow.items() if name not in OF_A_STAGE}
        whole["schedule"] = {"flow": {**kept, "pending": [], "carried": [], "learner": None}, "watch": {}}
    return whole


class _Moments:
    """What is kept of each parameter of a module, under its own name or, for want of that, any other of its names."""

    def __init__(self, module: nn.Module, shared: Mapping[str, str]) -> None:
        self._shared, self._names = shared, [name for name, _ in module.named_parameters()]
        self._wanted = {self._first(name) for name in self._names}
        self._kept: State = {}

    def take(self, kept: State) -> None:
        """What one stage kept."""
        self._kept |= {name: entry for name, entry in kept.items() if self._first(name) in self._wanted}

    def found(self) -> State:
        by_first = {self._first(name): entry for name, entry in self._kept.items()}
        found = {name: self._kept.get(name, by_first.get(self._first(name))) for name in self._names}
        return {name: entry for name, entry in found.items() if entry is not None}

    def _first(self, name: str) -> str:
        return self._shared.get(name, name)


def _pick(names: list[str], found: State) -> State:
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"the checkpoint holds no {', '.join(missing)}: it is of another model")
    return {name: found[name] for name in names}
