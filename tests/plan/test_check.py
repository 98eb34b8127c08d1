"""Every schedule passes the checker; each planted fault is found and named."""

from dataclasses import replace

import pytest

from dnipipe.plan import Action, Op, Schedule, ScheduleError, check, dni, gpipe, one_f_one_b, zb_h1


def _all(num_stages, num_microbatches):
    """(schedule, what each stage may hold)."""
    below = [num_stages - i for i in range(num_stages)]
    least = [min(b, num_microbatches) for b in below]
    yield gpipe.build(num_stages, num_microbatches), [num_microbatches] * num_stages
    yield one_f_one_b.build(num_stages, num_microbatches), least
    yield zb_h1.build(num_stages, num_microbatches), [min(num_stages, num_microbatches)] * num_stages
    yield dni.wait(num_stages, num_microbatches), least
    yield dni.synthetic(num_stages, num_microbatches, num_steps=3), [1] * num_stages
    yield dni.synthetic(num_stages, num_microbatches, lag=40, num_steps=3), [1] * num_stages
    yield dni.stale(num_stages, num_microbatches, num_steps=3), below
    yield dni.stale(num_stages, num_microbatches, in_flight=2 * num_stages - 1, num_steps=3), [2 * b - 1 for b in below]


@pytest.mark.parametrize("num_stages", range(1, 7))
@pytest.mark.parametrize("num_microbatches", range(1, 13))
def test_every_schedule_is_right(num_stages, num_microbatches):
    for schedule, most in _all(num_stages, num_microbatches):
        check(schedule, max_in_flight=most)


def _schedule(*stages, **fields):
    """From texts such as "0F0 0B0"."""
    actions = tuple(tuple(Action.parse(word) for word in stage.split()) for stage in stages)
    count = 1 + max(action.microbatch for stage in actions for action in stage)
    return Schedule("planted", **{"num_microbatches": count, "stages": actions, **fields})


RIGHT_0, RIGHT_1 = "0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"


@pytest.mark.parametrize(
    "stages, fields, found",
    [
        (["0F0 0F1 0B0", RIGHT_1], {}, "stage 0: 0B1 is missing: each action is run once"),
        (["0F0 0F1 0B0 0B1 0B1", RIGHT_1], {}, "stage 0: 0B1 comes twice"),
        (["0F0 0F1 0B0 0B1 1B1", RIGHT_1], {}, "stage 0: 1B1 does not belong here"),
        ([RIGHT_0, "1F0 1B0 1F1 1B1 1F2"], {"num_microbatches": 2}, "stage 1: 1F2 does not belong here"),
        ([RIGHT_0, "1F0 1B1 1F1 1B0"], {}, "stage 1: 1B1 comes before 1F1, which it needs"),
        (["0F0 0W0 0B0"], {}, "stage 0: 0W0 comes before 0B0, which it needs"),
        (["0F0 0B0 0W0", "1F0 1B0"], {}, "stage 1: 1W0 is missing"),
        ([RIGHT_0, "1F1 1B1 1F0 1B0"], {}, "message 0 between stages 0 and 1 is activation 0 over boundary 0 for the"),
        ([RIGHT_0, "1F0 1F1 1B1 1B0"], {}, "is gradient 0 over boundary 0 for the first and gradient 1 over"),
        (
            ["0F0 0F1 0B0 0B1", "1F0 1F1 1B1 1B0"],
            {"lags": (1,)},
            "message 1 between stages 0 and 1 is activation 1 and gradient 0 over .* and gradient 1 over",
        ),
        (
            ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"],
            {},
            "deadlock; stage 0 stands before 0B0, waiting for gradient 0 .*; stage 1 stands before 1F1, .*n 1 over",
        ),
        (["0F0 0B0 0F1 0B1", RIGHT_1], {"lags": (1,)}, "deadlock; stage 0 stands before 0B0"),
        ([RIGHT_0, "1F0 1F1 1B0 1B1"], {"lags": (1,)}, "deadlock; .*stage 1 stands before 1F1, .*activation 1 and gra"),
    ],
)
def test_a_planted_fault_is_found(stages, fields, found):
    with pytest.raises(ScheduleError, match=found):
        check(_schedule(*stages, **fields))


def test_the_planted_ground_is_right():
    check(_schedule(RIGHT_0, RIGHT_1), max_in_flight=[2, 1])
    check(_schedule(RIGHT_0, RIGHT_1, lags=(1,)), max_in_flight=[2, 1])


def test_one_microbatch_too_many_in_flight_is_found():
    with pytest.raises(ScheduleError, match="stage 0: 0F1 makes 2 microbatches in flight, 1 are allowed"):
        check(_schedule(RIGHT_0, RIGHT_1), max_in_flight=[1, 1])
    with pytest.raises(ValueError, match="max_in_flight needs 2 numbers, one per stage"):
        check(_schedule(RIGHT_0, RIGHT_1), max_in_flight=[1])


def test_a_predicted_gradient_frees_from_the_deadlock_of_a_true_one():
    true = replace(dni.synthetic(3, 4, num_steps=2), synthetic=False)
    with pytest.raises(ScheduleError, match="deadlock"):
        check(true)
    check(replace(true, synthetic=True))


@pytest.mark.parametrize("action", [Action(2, Op.FORWARD, 0), Action(0, Op.BACKWARD, 12), Action(31, Op.WEIGHT, 7)])
def test_an_action_is_read_back_as_it_is_printed(action):
    assert Action.parse(str(action)) == action
    assert str(Action(2, Op.FORWARD, 0)) == "2F0"


@pytest.mark.parametrize("text", ["", "2F", "F0", "2X0", "2F0 ", "-1F0", "2f0"])
def test_what_is_no_action_is_refused(text):
    with pytest.raises(ValueError, match="is no action: write stage, F, B or W, and microbatch, as in 2F0"):
        Action.parse(text)


def test_the_printed_order_of_1f1b_is_that_of_its_drawing():
    first = " ".join(map(str, one_f_one_b.build(3, 4).stages[0]))
    assert first == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"
    last_of_zb_h1 = " ".join(map(str, zb_h1.build(3, 4).stages[2]))
    assert last_of_zb_h1 == "2F0 2B0 2F1 2B1 2F2 2B2 2W0 2F3 2B3 2W1 2W2 2W3"


@pytest.mark.parametrize("build", [gpipe.build, one_f_one_b.build, zb_h1.build, dni.wait, dni.synthetic, dni.stale])
def test_counts_below_one_are_refused(build):
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        build(0, 4)
    with pytest.raises(ValueError, match="num_microbatches must be at least 1, got -2"):
        build(4, -2)


def test_dials_out_of_range_are_refused():
    with pytest.raises(ValueError, match="lag must be at least 1, got 0"):
        dni.synthetic(2, 2, lag=0)
    with pytest.raises(ValueError, match="in_flight must be from 2 to 3 microbatches for 2 stages, got 1"):
        dni.stale(2, 2, in_flight=1)
    with pytest.raises(ValueError, match="3 stages have 2 boundaries"):
        replace(dni.wait(3, 4), lags=(1,))
