"""1F1B whose weight gradients wait for a bubble: stage i keeps i of them back and runs them at the end.

Source: Zero Bubble Pipeline Parallelism, Qi et al. 2023 (arXiv 2401.10241), schedule ZB-H1.

    stage 0   F0 F1 F2       B0 W0 F3 B1 W1    B2 W2    B3 W3
    stage 1      F0 F1    B0 F2    B1 W0 F3 B2 W1    B3 W2 W3
    stage 2         F0 B0 F1 B1 F2    B2 W0 F3 B3 W1 W2 W3

Only B is on the way to the previous stage, so the bubble before each first B shrinks by W per stage below, and the
stages that finish first find work in their last one. A stage lets go of an activation after W: each holds num_stages
of them, as many as the first stage of 1F1B does and no stage of 1F1B exceeds.
"""

from __future__ import annotations

from .action import Action, Op, Schedule, one_forward_one_backward, require_positive

NAME = "ZB-H1"


def build(num_stages: int, num_microbatches: int) -> Schedule:
    """The schedule of one step."""
    require_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    stages = tuple(_stage(stage, num_stages, num_microbatches) for stage in range(num_stages))
    return Schedule(NAME, num_microbatches, stages)


def _stage(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    actions: list[Action] = []
    for action in one_forward_one_backward(stage, num_stages - 1 - stage, num_microbatches):
        actions.append(action)
        if action.op is Op.BACKWARD and action.microbatch >= stage:
            actions.append(Action(stage, Op.WEIGHT, action.microbatch - stage))
    kept_back = range(max(num_microbatches - stage, 0), num_microbatches)
    return (*actions, *(Action(stage, Op.WEIGHT, m) for m in kept_back))
