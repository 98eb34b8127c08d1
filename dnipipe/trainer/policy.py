"""The policy of a config, as a schedule takes it and as the planner knows it."""

from __future__ import annotations

import math

import torch

from ..config import Config
from ..plan import Schedule, dni
from ..plan.phases import AUTO, LATE, parse_phases, text_of
from ..schedule.choose import choose_late_weights, resolve
from ..schedule.policy import Policy


def policy_of(config: Config) -> Policy:
    """Its steps are step() calls, of which an optimizer step has several where gradients are accumulated."""
    pipeline, calls = config.pipeline, config.pipeline.accumulate
    name = pipeline.policy if pipeline.policy == AUTO else text_of(parse_phases(pipeline.policy), times=calls)
    unlock = None if name == "wait" else pipeline.unlock_after_steps
    unlock = unlock and unlock * calls
    late_weights = choose_late_weights(pipeline.late_weights, config.optim.name)
    return Policy(name, pipeline.lag, unlock, None, pipeline.in_flight, late_weights, calls)


def planned_policy(config: Config, num_stages: int) -> Policy:
    """As policy_of(), with what `auto` will choose where every stage can hold graphs."""
    policy, pipeline = policy_of(config), config.pipeline
    if policy.name != AUTO:
        return policy
    given = None if pipeline.interface == AUTO else 0
    return resolve(policy, num_stages, pipeline.num_microbatches, config.optim.name, interface_on=given)[0]


def late_sets(config: Config, num_stages: int) -> float:
    """Sets of weights that the fullest stage keeps for late backwards, beside those it trains."""
    policy, pipeline = planned_policy(config, num_stages), config.pipeline
    if not policy.late or pipeline.schedule != "DNI" or policy.late_weights == "new":
        return 0.0
    old = math.ceil(policy.delay(0, num_stages) / (pipeline.num_microbatches * pipeline.accumulate))
    if policy.late_weights == "old":
        return float(old)
    # weight_prediction.py: the present ones in float32, and forecasts, of which one is made before the oldest is done
    return 4 / getattr(torch, config.model.dtype).itemsize + old + 1


def plans_of(config: Config, num_stages: int) -> list[Schedule]:
    """What the planner makes of each phase, in order."""
    policy, num_microbatches = planned_policy(config, num_stages), config.pipeline.num_microbatches
    return [_plan(phase.policy, policy, num_stages, num_microbatches) for phase in policy.phases]


def _plan(name: str, policy: Policy, num_stages: int, num_microbatches: int) -> Schedule:
    if name == "wait":
        return dni.wait(num_stages, num_microbatches)
    if name in LATE:
        # before it is measured: the most, so that there is room
        in_flight = 2 * num_stages - 1 if policy.in_flight == AUTO else policy.held(num_stages)[:-1]
        return dni.stale(num_stages, num_microbatches, in_flight=in_flight)
    return dni.synthetic(num_stages, num_microbatches, lag=policy.lag)
