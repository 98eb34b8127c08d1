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
from .in_flight import InFlight, in_flight_by_stage

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


def stale(
    num_stages: int,
    num_microbatches: int,
    *,
    in_flight: InFlight = None,
    paired: bool = False,
    num_steps: int | None = None,
) -> Schedule:
    """The bubble-free order of the policies `stale` and `corrected`.

    Args:
        in_flight: microbatches that each stage holds, or the first, as in_flight_by_stage() takes them.
        paired: whether activations and gradients travel in exchanges, as the engine's do: on both ways of one a stage
            waits, which would need a third microbatch in flight per boundary to be hidden. Else one by one.
        num_steps: None: as many as it takes to see the steady state.
    """
    require_positive(num_stages=num_stages, num_microbatches=num_microbatches)
    held = in_flight_by_stage(num_stages, in_flight)
    num_steps = steps_to_steady(num_stages, num_microbatches, num_stages) if num_steps is None else num_steps
    total = num_microbatches * num_steps
    stages = tuple(one_forward_one_backward(stage, each - 1, total) for stage, each in enumerate(held))
    lags = tuple(each - 1 for each in held[:-1]) if paired else ()
    return Schedule(STALE, num_microbatches, stages, num_steps, lags=lags)


def steps_to_steady(num_stages: int, num_microbatches: int, lag: int) -> int:
    """Steps of which the last third is steady: the pipeline is full and every lead is used up by then."""
    total = 12 * (num_stages + lag)
    return max(-(-total // num_microbatches), 2)
