"""The simulator against theory, exactly, and against published rates, to four decimals."""

from fractions import Fraction

import pytest

import dnipipe
from dnipipe.plan import (
    Times,
    activation_bytes,
    compare,
    dni,
    gpipe,
    one_f_one_b,
    peak_in_flight,
    simulate,
    theory,
    zb_h1,
)

COUNTS = [(stages, microbatches) for stages in (1, 2, 3, 4, 5, 8, 13) for microbatches in (1, 2, 3, 7, 8, 20)]
UNEVEN = Times.ms("1.3", "0.7", "2.1")

# Zero Bubble Pipeline Parallelism (arXiv 2401.10241), tables 9 and 5; 8 stages; times in ms.
# microbatches, F, B, W, C, 1F1B, ZB-H1
PUBLISHED = [
    (24, "18.522", "18.086", "9.337", "0.601", 0.2431, 0.1585),
    (32, "18.513", "18.086", "9.331", "0.626", 0.1985, 0.1242),
    (24, "29.718", "29.444", "19.927", "0.527", 0.2347, 0.1323),
    (64, "29.935", "29.621", "19.388", "0.535", 0.1091, 0.0554),
]


@pytest.mark.parametrize("build", [gpipe.build, one_f_one_b.build, dni.wait])
@pytest.mark.parametrize("num_stages, num_microbatches", COUNTS)
def test_a_flush_costs_what_theory_says_exactly(build, num_stages, num_microbatches):
    bubble = simulate(build(num_stages, num_microbatches), UNEVEN).bubble
    assert bubble == Fraction(num_stages - 1, num_microbatches + num_stages - 1)
    assert bubble == theory.flushing_bubble(num_stages, num_microbatches)


@pytest.mark.parametrize("microbatches, forward, backward, weight, transfer, one_f_one_b_rate, zb_h1_rate", PUBLISHED)
def test_published_bubble_rates_come_out_to_four_decimals(
    microbatches, forward, backward, weight, transfer, one_f_one_b_rate, zb_h1_rate
):
    times = Times.ms(forward, backward, weight, transfer)
    assert round(float(simulate(one_f_one_b.build(8, microbatches), times).bubble), 4) == one_f_one_b_rate
    assert round(float(simulate(zb_h1.build(8, microbatches), times).bubble), 4) == zb_h1_rate


@pytest.mark.parametrize("num_stages, num_microbatches", [(2, 2), (4, 8), (8, 24), (6, 6)])
def test_zb_h1_has_a_third_of_the_bubble_where_all_parts_take_as_long(num_stages, num_microbatches):
    """Qi et al. 2023, table 2: (S - 1)(F + B - W) in place of (S - 1)(F + B + W)."""
    times = Times.ms(1, 1, 1)
    zero_bubble = simulate(zb_h1.build(num_stages, num_microbatches), times).step_ms
    assert zero_bubble - 3 * num_microbatches == num_stages - 1
    assert simulate(one_f_one_b.build(num_stages, num_microbatches), times).step_ms - 3 * num_microbatches == 3 * (
        num_stages - 1
    )


@pytest.mark.parametrize("lag", [1, 2, 64])
@pytest.mark.parametrize("num_stages, num_microbatches", [(1, 1), (2, 1), (4, 8), (6, 5), (13, 2)])
def test_dni_synthetic_has_no_bubble_and_one_microbatch_in_flight(num_stages, num_microbatches, lag):
    schedule = dni.synthetic(num_stages, num_microbatches, lag=lag)
    assert simulate(schedule, UNEVEN).bubble == 0
    assert peak_in_flight(schedule) == (1,) * num_stages


@pytest.mark.parametrize("more", [0, 1, 99])
@pytest.mark.parametrize("num_stages, num_microbatches", [(1, 1), (2, 1), (4, 8), (6, 5)])
def test_dni_stale_has_no_bubble_without_transfers(num_stages, num_microbatches, more):
    in_flight = min(num_stages + more, 2 * num_stages - 1)
    schedule = dni.stale(num_stages, num_microbatches, in_flight=in_flight)
    assert simulate(schedule, UNEVEN).bubble == 0
    most = [min(num_stages - i + more, 2 * (num_stages - i) - 1) for i in range(num_stages)]
    assert list(peak_in_flight(schedule)) == most


@pytest.mark.parametrize("transfer", [0, 1, 3, 5, 9, 20, 50])
@pytest.mark.parametrize("num_stages, num_microbatches", [(1, 2), (2, 3), (3, 1), (4, 8), (6, 5)])
def test_steps_that_run_on_cost_what_the_formula_says(num_stages, num_microbatches, transfer):
    times = Times.ms(3, 4, 3, transfer)
    for lag in (1, 2, 5):
        run = simulate(dni.synthetic(num_stages, num_microbatches, lag=lag), times)
        assert run.step_ms == theory.synthetic_step_ms(num_stages, num_microbatches, times, lag=lag)
    for in_flight in (None, min(num_stages + 2, 2 * num_stages - 1), 2 * num_stages - 1):
        run = simulate(dni.stale(num_stages, num_microbatches, in_flight=in_flight), times)
        assert run.step_ms == theory.stale_step_ms(num_stages, num_microbatches, times, in_flight=in_flight)


@pytest.mark.parametrize("interface", ["0.5", 2, 7, 40])
@pytest.mark.parametrize("transfer", [0, 1, 5, 9, 20, 50])
@pytest.mark.parametrize("num_stages, num_microbatches", [(1, 2), (2, 3), (3, 1), (4, 8), (6, 5)])
def test_prediction_costs_what_the_formula_says(num_stages, num_microbatches, transfer, interface):
    times = Times.ms(3, 4, 3, transfer, interface)
    for lag in (1, 2, 5):
        run = simulate(dni.synthetic(num_stages, num_microbatches, lag=lag), times)
        assert run.step_ms == theory.synthetic_step_ms(num_stages, num_microbatches, times, lag=lag)


@pytest.mark.parametrize("num_stages, num_microbatches", [(2, 1), (4, 8), (6, 5)])
def test_prediction_is_bubble_and_no_work(num_stages, num_microbatches):
    times = Times.ms(3, 4, 3, 0, "2.5")
    run = simulate(dni.synthetic(num_stages, num_microbatches), times)
    assert times.compute == 10
    assert run.bubble == Fraction("2.5") / Fraction("12.5")
    assert [_after_backwards(run, stage) for stage in range(num_stages - 1)] == [{Fraction("2.5")}] * (num_stages - 1)


def _after_backwards(run, stage):
    """How long a stage computes nothing after each of its backwards, once the pipeline is full."""
    spans = list(run.spans(stage))[-2 * run.schedule.num_stages - 1 :]
    pairs = zip(spans, spans[1:], strict=False)
    return {later.start_ms - span.end_ms for span, later in pairs if span.action.op.value == "B"}


def test_the_last_prediction_is_part_of_a_single_step():
    """Stage 0 is done at 10 + 5 + 10 + 5. The last stage begins at 3, has activation 1 at 18, and predicts nothing."""
    run = simulate(dni.synthetic(2, 2, lag=2, num_steps=1), Times.ms(3, 4, 3, 0, 5))
    assert (run.step_ms, run.bubble) == (30, Fraction(1, 3))
    assert [list(run.spans(stage))[-1].end_ms for stage in range(2)] == [25, 28]


@pytest.mark.parametrize("build", [gpipe.build, one_f_one_b.build, zb_h1.build, dni.wait, dni.stale])
def test_schedules_that_wait_for_true_gradients_predict_nothing(build):
    schedule = build(3, 4)
    assert simulate(schedule, Times.ms(3, 4, 3, 1, 9)).step_ms == simulate(schedule, Times.ms(3, 4, 3, 1)).step_ms


def test_a_comparison_runs_for_as_long_as_it_takes_to_be_steady():
    """Here (T + C) / lag is 10.6 and T + P is 10.4: stage 1 slows stage 0 only once the lead of that is used up."""
    times, own_length = Times.ms("3.6", "3.5", "3.1", "0.4", "0.2"), dni.synthetic(2, 6, lag=1)
    assert not simulate(own_length, times).is_steady
    (run,) = (run for run in compare(2, 6, times, lag=1) if run.schedule.name == dni.SYNTHETIC)
    assert run.step_ms == theory.synthetic_step_ms(2, 6, times, lag=1) == 6 * Fraction("10.6")
    assert run.schedule.num_steps > own_length.num_steps


@pytest.mark.parametrize("transfer", [0, 1, 5])
def test_gpipe_pays_each_boundary_twice(transfer):
    times = Times.ms(2, 3, 1, transfer)
    assert simulate(gpipe.build(4, 6), times).step_ms == (6 + 3) * 6 + 2 * 3 * transfer


def test_the_face_shows_the_planner():
    runs = dnipipe.plan.compare(2, 4, dnipipe.plan.Times.ms(1, 1, 1))
    assert [dnipipe.plan.row_of(run) for run in runs] == dnipipe.plan.scale(2, 4, dnipipe.plan.Times.ms(1, 1, 1))


def test_more_steps_change_no_steady_state():
    times = Times.ms(3, 4, 3, 2)
    few, many = (simulate(dni.stale(4, 3, num_steps=steps), times).step_ms for steps in (40, 90))
    assert few == many


def test_a_run_too_short_to_be_steady_is_refused():
    with pytest.raises(ValueError, match="DNI stale: stage 0 is not steady after 8 microbatches: raise num_steps, now"):
        simulate(dni.stale(4, 4, num_steps=2), Times.ms(3, 4, 3, 2)).step_ms  # noqa: B018


def test_actions_of_a_stage_follow_each_other_and_take_their_time():
    run = simulate(zb_h1.build(3, 4), Times.ms("1.5", "0.5", "0.25", "0.1"))
    takes = {"F": Fraction(3, 2), "B": Fraction(1, 2), "W": Fraction(1, 4)}
    for stage in range(3):
        spans = list(run.spans(stage))
        assert all(span.end_ms - span.start_ms == takes[span.action.op.value] for span in spans)
        assert all(before.end_ms <= after.start_ms for before, after in zip(spans, spans[1:], strict=False))
    assert next(run.spans(2)).start_ms == 2 * (Fraction(3, 2) + Fraction(1, 10))


@pytest.mark.parametrize(
    "values, found",
    [
        (("x", 1, 1), "forward must be a finite number of milliseconds, got 'x'"),
        ((1, float("nan"), 1), "backward must be a finite number"),
        ((1, 1, float("inf")), "weight must be a finite number"),
        ((1, 1, 1, -0.5), "transfer must be at least 0 ms, got -0.5"),
        ((1, 1, 1, 0, -2), "interface must be at least 0 ms, got -2"),
        ((1, 1, 1, 0, "?"), "interface must be a finite number of milliseconds, got '?'"),
        ((0, 0, 0), "at least one must take time"),
    ],
)
def test_impossible_times_are_refused(values, found):
    with pytest.raises(ValueError, match=found):
        Times.ms(*values)


def test_an_activation_is_held_until_its_last_use():
    assert peak_in_flight(gpipe.build(4, 8)) == (8, 8, 8, 8)
    assert peak_in_flight(one_f_one_b.build(4, 8)) == (4, 3, 2, 1)
    assert peak_in_flight(zb_h1.build(4, 8)) == (4, 4, 4, 4)
    assert activation_bytes(one_f_one_b.build(3, 8), 10) == (30, 20, 10)
    with pytest.raises(ValueError, match="bytes_per_microbatch must be at least 1, got 0"):
        activation_bytes(one_f_one_b.build(3, 8), 0)
