"""What a step costs by formula, where there is one: no simulation, any number of stages.

T = F + B + W, C a transfer, P prediction, M microbatches, S stages:

    GPipe, 1F1B     bubble (S - 1) / (M + S - 1) where C = 0
    DNI synthetic   step M max(T + P, F + C, (T + C) / lag): the stage itself; its wait for each exchange, beside which
                    it predicts; a round to its neighbour and back, in which it may lead by `lag`. No further stage
                    matters, and one stage alone predicts nothing: M T
    DNI stale       step M max(T, ((h + 1) T + 2 h C) / (n(i) - n(i+h) + 1)) over all stages i and distances h: a
                    microbatch goes h stages down and back up while n(i) - n(i+h) + 1 others may pass, n in flight

They are the longest circles of waits. The tests hold the simulator to them, exactly.
"""

from __future__ import annotations

from fractions import Fraction

from .in_flight import InFlight, in_flight_by_stage
from .simulate import Times


def flushing_bubble(num_stages: int, num_microbatches: int) -> Fraction:
    """Of GPipe and 1F1B with no transfer time."""
    return Fraction(num_stages - 1, num_microbatches + num_stages - 1)


def synthetic_step_ms(num_stages: int, num_microbatches: int, times: Times, *, lag: int) -> Fraction:
    """Of dni.synthetic(), steady."""
    if num_stages == 1:
        return num_microbatches * times.compute
    round_trip = (times.compute + times.transfer) / lag
    return num_microbatches * max(times.compute + times.interface, times.forward + times.transfer, round_trip)


def stale_step_ms(num_stages: int, num_microbatches: int, times: Times, *, in_flight: InFlight) -> Fraction:
    """Of dni.stale(), steady."""
    longest, held = times.compute, in_flight_by_stage(num_stages, in_flight)
    for stage in range(num_stages):
        for hops in range(1, num_stages - stage):
            passing = held[stage] - held[stage + hops] + 1
            longest = max(longest, ((hops + 1) * times.compute + 2 * hops * times.transfer) / passing)
    return num_microbatches * longest
