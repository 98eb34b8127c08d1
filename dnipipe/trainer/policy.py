"""The policy of a config, as a schedule takes it and as the planner knows it."""

from __future__ import annotations

from ..config import Config
from ..plan import Schedule, dni
from ..plan.phases import AUTO, LATE, parse_phases, text_of
from ..schedule.choose import choose_policy
from ..schedule.policy import Policy


def policy_of(config: Config) -> Policy:
    """Its steps are step() calls, of which an optimizer step has several where gradients are accumulated."""
    pipeline, calls = config.pipeline, config.pipeline.accumulate
    name = pipeline.policy if pipeline.policy == AUTO else text_of(parse_phases(pipeline.policy), times=calls)
    unlock = None if name == "wait" else pipeline.unlock_after_steps
    return Policy(name, pipeline.lag, unlock and unlock * calls, in_flight=pipeline.in_flight)


def planned_policy(config: Config, num_stages: int) -> Policy:
    """As policy_of(), with what `auto` will choose where every stage can hold graphs."""
    policy = policy_of(config)
    if policy.name != AUTO:
        return policy
    return policy.chosen(choose_policy(num_stages, config.pipeline.num_microbatches, config.optim.name)[0])


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
