"""The end of a run names the winner, whoever it is."""

import math

import pytest
from matplotlib.image import imread

from dnipipe.observe.trace import Span
from dnipipe.report import Result, clear, verdict, write_traces

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


def test_a_schedule_that_took_longer_is_longer_in_the_picture(tmp_path):
    """On one scale the bar of one second beside the bar of four is a quarter as long."""
    write_traces(tmp_path, {"A": [Span("x", 0, 0, None, 0.0, 1.0)], "B": [Span("x", 0, 0, None, 0.0, 4.0)]}, 1)
    picture = imread(tmp_path / "timeline.png")
    grey = abs(picture[:, :, :3] - 0.4).max(axis=2) < 0.01  # the colour of a name that the engine does not use
    lengths = [int(count) for count in grey.sum(axis=1) if count > 100]
    assert max(lengths) / min(lengths) == pytest.approx(4, rel=0.02)
    assert (tmp_path / "trace.json").exists() and (tmp_path / "trace-B.json").exists()


def test_what_an_earlier_run_reported_is_cleared_away_and_nothing_else(tmp_path):
    names = ["trace.json", "trace-1F1B.json", "timeline.png", "metrics.jsonl", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
