"""Decoupled Neural Interfaces: backward at once against a predicted gradient, so that no stage waits and none flushes.

Source: Jaderberg et al. 2016; the paired exchange and its lag are this project's (schedule/ledger.py).

    synthetic   stage 0   F0 B0 F1 B1 F2 B2 F3 B3          activation t goes down beside gradient t - lag going up
                stage 1         F0 B0 F1 B1 F2 B2 F3 B3

    stale       stage 0   F0 F1 F2 B0 F3 B1 F4 B2 F5 ...   1F1B that never flushes: the true gradient is used, if
                stage 1      F0 F1 B0 F2 B1 F3 B2 F4 ...   need be in a later step than that of its forward

    wait        1F1B with the paired exchange in place of separate sends: the same numbers as backprop
"""

from __future__ import annotations

from dataclasses import replace

from . import one_f_one_b
from .action import Schedule, one_forward_one_backward, require_positive

WAIT, SYNTHETIC, STALE = "DNI wait", "DNI synthetic", "DNI stale"
DEFAULT_LAG = 2


def wait(num_stages: int, num_microbatches: int) -> Schedule:
    """True gradients only, one step. The lag of each boundary is what 1F1B has in flight there."""
    lags = tuple(range(num_stages - 1, 0, -1))
    return replace(one_f_one_b.build(num_stages, num_microbatches), name=WAIT, lags=lags)


def synthetic(
    num_stages: int, num_microbatches: int, *, lag: int = DEFAULT_LAG, num_steps: int | None = None
) -> Schedule:
    """Predicted gradients only: one microbatch in flight.

    Args:
        lag: microbatches between an activation and the gradient that travels beside it, at least 1.
        num_steps: None: as many as it takes to see the steady state.
    """
    require_positive(num_stages=num_stages, num_microbatches=num_microbatches, lag=lag)
    num_steps = steps_to_steady(num_stages, num_microbatches, lag) if num_steps is None else num_steps
    total = num_microbatches * num_steps
    stages = tuple(one_forward_one_backward(stage, 0, total) for stage in range(num_stages))
    return Schedule(SYNTHETIC, num_microbatches, stages, num_steps, lags=(lag,) * (num_stages - 1), synthetic=True)


def stale(num_stages: int, num_microbatches: int, *, slack: int = 0, num_steps: int | None = None) -> Schedule:
    """The bubble-free order of the policies `stale` and `corrected`.

    Its transfers are counted one by one, not as exchanges: an exchange on both ways of which a stage waits would need
    a third microbatch in flight per stage to be hidden.

    Args:
        slack: microbatches in flight beyond num_stages - stage, which leaves no time for a transfer. Used as far as
            2 (num_stages - stage) - 1, where each hop of a transfer has a slot of its own; at least 0.
        num_steps: None: as many as it takes to see the steady state.
    """
    require_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    if slack < 0:
        raise ValueError(f"slack must be at least 0 microbatches, got {slack}: with fewer in flight every stage waits")
    num_steps = steps_to_steady(num_stages, num_microbatches, num_stages) if num_steps is None else num_steps
    total = num_microbatches * num_steps
    stages = tuple(
        one_forward_one_backward(stage, in_flight_of_stale(stage, num_stages, slack) - 1, total)
        for stage in range(num_stages)
    )
    return Schedule(STALE, num_microbatches, stages, num_steps)


def in_flight_of_stale(stage: int, num_stages: int, slack: int) -> int:
    """Microbatches that stage `stage` holds at most under stale()."""
    below = num_stages - 1 - stage
    return below + 1 + min(slack, below)


def steps_to_steady(num_stages: int, num_microbatches: int, lag: int) -> int:
    """Steps of which the last third is steady: the pipeline is full and every lead is used up by then."""
    total = 12 * (num_stages + lag)
    return max(-(-total // num_microbatches), 2)
