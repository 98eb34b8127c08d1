"""How many microbatches stages may hold, and how many are worth it."""

from __future__ import annotations

from fractions import Fraction

import pytest

from dnipipe.plan import Times, check, dni, peak_in_flight, simulate
from dnipipe.plan.dial import TOLERANCE, choose_in_flight
from dnipipe.plan.in_flight import in_flight_by_stage


@pytest.mark.parametrize(
    "in_flight, held",
    [
        (None, (4, 3, 2, 1)),
        (4, (4, 3, 2, 1)),
        (5, (5, 4, 3, 1)),
        (7, (7, 5, 3, 1)),
        ((6, 3, 2), (6, 3, 2, 1)),
        ([5, 4, 3], (5, 4, 3, 1)),
    ],
)
def test_one_number_is_the_first_stages_and_several_are_each_ones(in_flight, held):
    assert in_flight_by_stage(4, in_flight) == held
    schedule = dni.stale(4, 2, in_flight=in_flight, num_steps=8)
    check(schedule, max_in_flight=held)
    assert peak_in_flight(schedule) == held
    check(dni.stale(4, 2, in_flight=in_flight, paired=True, num_steps=8), max_in_flight=held)


def test_a_single_stage_holds_one():
    assert in_flight_by_stage(1, None) == in_flight_by_stage(1, 1) == in_flight_by_stage(1, ()) == (1,)


_BOUNDS = "with fewer every stage waits, and more hide nothing more"


@pytest.mark.parametrize(
    "in_flight, message",
    [
        (3, f"in_flight must be from 4 to 7 microbatches for 4 stages, got 3: {_BOUNDS}"),
        (8, f"in_flight must be from 4 to 7 microbatches for 4 stages, got 8: {_BOUNDS}"),
        (
            (4, 3),
            "in_flight = [4, 3]: 4 stages take 3 numbers, one for each but the last, as [4, 3, 2]; or one for the "
            "first stage",
        ),
        ((7, 6, 2), f"in_flight = [7, 6, 2] must be from 3 to 5 microbatches on stage 1 of 4, got 6: {_BOUNDS}"),
        ((7, 2, 2), f"in_flight = [7, 2, 2] must be from 3 to 5 microbatches on stage 1 of 4, got 2: {_BOUNDS}"),
        (
            (5, 5, 2),
            "in_flight = [5, 5, 2]: it must fall from stage to stage, got 5 on stage 0 and 5 on stage 1, which gives "
            "no gradient back before stage 0 has 6",
        ),
    ],
)
def test_numbers_that_the_stages_cannot_have_are_refused(in_flight, message):
    with pytest.raises(ValueError) as refusal:
        in_flight_by_stage(4, in_flight)
    assert str(refusal.value) == message


@pytest.mark.parametrize("num_stages", [2, 4, 7])
def test_nothing_is_made_later_where_transfers_take_no_time(num_stages):
    dial = choose_in_flight(10.0, [0.0] * (num_stages - 1))
    assert dial.in_flight == tuple(range(num_stages, 1, -1)) and dial.utilisation == dial.most == 1.0


@pytest.mark.parametrize(
    "transfers", [(5, 5, 5), (14, 14, 14), (2, 2, 2), (1, 20, 1), (20, 1, 1), (0, 0, 30), (9, 9), (25,), (3,) * 7]
)
def test_the_fewest_in_flight_are_chosen_that_are_as_fast_as_the_most(transfers):
    num_stages = len(transfers) + 1
    dial = choose_in_flight(100.0, transfers)
    times = Times(*[Fraction(100, 3)] * 3, Fraction(0), transfers=tuple(map(Fraction, transfers)))

    def utilisation(in_flight):
        return 1 - simulate(dni.stale(num_stages, 1, in_flight=in_flight, paired=True, num_steps=600), times).bubble

    chosen, most = utilisation(dial.in_flight), utilisation(2 * num_stages - 1)
    assert chosen >= (1 - TOLERANCE) * most
    assert dial.utilisation == pytest.approx(float(chosen), rel=2e-3)
    assert dial.most == pytest.approx(float(most), rel=2e-3)
    # one slot fewer on the slowest boundary that has two costs too much
    slots = [above - below for above, below in zip(dial.in_flight, (*dial.in_flight[1:], 1), strict=True)]
    doubled = [boundary for boundary, each in enumerate(slots) if each == 2]
    if doubled:
        least = min(doubled, key=lambda boundary: (transfers[boundary], -boundary))
        fewer = [each - (stage <= least) for stage, each in enumerate(dial.in_flight)]
        assert utilisation(fewer) < (1 - TOLERANCE) * most


def test_the_slowest_boundaries_get_their_slots_first():
    assert choose_in_flight(100.0, [14.0, 14.0, 0.0, 0.0]).in_flight == (6, 4, 3, 2)
    assert choose_in_flight(100.0, [0.0, 0.0, 14.0, 14.0]).in_flight == (6, 5, 4, 2)


def test_times_of_each_boundary_take_the_place_of_one_for_all():
    alike, each = Times.ms(3, 4, 3, 2), Times.ms(3, 4, 3, transfers=[2, 2, 2])
    for build in (dni.stale, dni.wait, dni.synthetic):
        schedule = build(4, 8)
        assert simulate(schedule, alike).ends == simulate(schedule, each).ends
    slow = Times.ms(3, 4, 3, transfers=[2, 9, 2])
    assert simulate(dni.wait(4, 8), slow).step_ms > simulate(dni.wait(4, 8), each).step_ms
    with pytest.raises(ValueError, match="transfers must be at least 0 ms, got -1"):
        Times.ms(3, 4, 3, transfers=[2, -1, 2])
