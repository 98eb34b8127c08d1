"""The end of a run names the winner, whoever it is."""

import math

from dnipipe.report import Result, verdict

FAST_AND_GOOD = Result("DNI", 300, 10.0, 2.0)
SLOW_AND_BETTER = Result("1F1B", 200, 10.0, 1.5)


def test_the_better_score_wins_whichever_schedule_has_it():
    assert "1F1B won, with 1.500 against 2.000" in verdict(FAST_AND_GOOD, SLOW_AND_BETTER)
    assert "DNI won, with 2.000 against 2.500" in verdict(FAST_AND_GOOD, Result("1F1B", 200, 10.0, 2.5))


def test_the_pace_is_told_whoever_wins():
    for val_bits in (1.5, 2.0, 2.5, math.nan):
        assert "1.50 times the steps of 1F1B per second" in verdict(FAST_AND_GOOD, Result("1F1B", 200, 10.0, val_bits))


def test_nobody_wins_by_a_hair_or_against_a_nan():
    for val_bits in (2.004, 1.996, math.nan):
        assert "even" in verdict(FAST_AND_GOOD, Result("1F1B", 200, 10.0, val_bits))


def test_the_winner_won_after_as_many_of_what_was_equal():
    assert "as many seconds of training" in verdict(FAST_AND_GOOD, SLOW_AND_BETTER)
    assert "as many steps" in verdict(FAST_AND_GOOD, Result("1F1B", 300, 15.0, 1.5))
