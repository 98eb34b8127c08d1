"""A checkpoint goes on in any number of stages: what belongs to a parameter finds its stage by the parameter's name.

A stage is a run of the model's layers under the model's own names, so all stages' weights together are the model's, and
so are an optimizer's moments once they are kept by name. Predictors belong to a cut: where it moves, they begin anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .folder import CheckpointFolder

State = dict[str, Any]


def load_stage(
    checkpoints: CheckpointFolder, step: int, stage: int, module: nn.Module, cut: list[list[str]]
) -> tuple[State, str | None]:
    """The state of a stage after a step, from a checkpoint of as many stages or of any other number.

    States hold at least "model", "optimizer" (by name) and "cut", and with ScheduleDNI its "schedule".

    Args:    module: this stage. cut: the names of the layers of every stage, as they are now.
    Returns: the state, and one sentence for the user where the cut has moved.
    Raises:  ValueError: the checkpoint lacks a parameter.
    """
    num_before = checkpoints.stages_of(step)
    if num_before == len(cut):
        state = checkpoints.load(step, stage)
        if state["cut"] == cut:
            return state, None
    state = reshard((checkpoints.load(step, each) for each in range(num_before)), module)
    told = f"a checkpoint of {num_before} stages goes on in {len(cut)}, by the names of its layers"
    if "schedule" in state:
        told += "; predictors begin anew, for they belong to the old cut"
    return {**state, "cut": cut}, told


def reshard(states: Iterable[State], module: nn.Module) -> State:
    """One state for a module out of those of all stages, whose layers it may have from any of them.

    What belongs to no parameter is the first stage's. A schedule keeps its counters alone.

    Args:   states: in the order of the stages; each is dropped before the next is taken.
    Raises: ValueError: a parameter or buffer that no stage has.
    """
    weights, moments = list(module.state_dict()), [name for name, _ in module.named_parameters()]
    model: State = {}
    optimizer: State = {}
    first: State = {}
    flow: State | None = None
    for state in states:
        first = first or {name: value for name, value in state.items() if name not in ("model", "optimizer")}
        model |= {name: state["model"][name] for name in weights if name in state["model"]}
        kept = state["optimizer"]["state"]
        optimizer |= {name: kept[name] for name in moments if name in kept}
        flow = state.get("schedule", {}).get("flow")
    whole = {**first, "model": _pick(weights, model), "optimizer": {"state": optimizer}}
    if flow is not None:  # the last stage's: it knows the newest loss
        whole["schedule"] = {"flow": {**flow, "pending": [], "learner": None}, "watch": {}}
    return whole


def _pick(names: list[str], found: State) -> State:
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"the checkpoint holds no {', '.join(missing)}: it is of another model")
    return {name: found[name] for name in names}
