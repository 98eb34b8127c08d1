"""Lines of metrics become columns, whatever a line lacks."""

import json

import numpy as np
import pytest

from dnipipe.report.curves import Track, growth, read_tracks, smooth, thin


def test_lines_are_sorted_by_schedule_and_one_cut_short_is_left_out(tmp_path):
    lines = [{"schedule": name, "step": step} for name in ("DNI", "1F1B") for step in (1, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '[1]\n{"step": 3}\n{"schedule": "1F1B", "st')
    assert [(track.schedule, list(track.numbers("step"))) for track in read_tracks(path)] == [
        ("DNI", [1, 2]),
        ("1F1B", [1, 2]),
    ]
    assert read_tracks(tmp_path / "nothing.jsonl") == []


def test_what_a_line_does_not_say_is_nan():
    track = Track(
        "DNI", [{"a": 1, "l": [1.0]}, {"a": None}, {"a": "x"}, {"a": True, "l": [None, 2.0, None]}, {"l": None}]
    )
    nan = np.nan
    np.testing.assert_array_equal(track.numbers("a"), [1, nan, nan, nan, nan])
    np.testing.assert_array_equal(track.lists("l"), [[1, nan, nan, nan, nan], [nan, nan, nan, 2, nan]])
    assert track.lists("b").shape[0] == 0
    assert track.newest("l") == [1, 2]


def test_a_loss_stands_at_its_own_step_and_once():
    lines = [{"step": 10, "elapsed_s": 1.0, "loss": 3.0, "loss_step": 5}, {"step": 20, "elapsed_s": 2.0, "loss": 2.0}]
    step, seconds, loss = Track("DNI", [*lines, {**lines[1], "val_bits": 3.0}, {"step": 30, "loss": None}]).losses()
    assert (list(step), list(seconds), list(loss)) == ([5, 20], [0.5, 2.0], [3.0, 2.0])


def test_a_smoothed_line_is_its_own_mean_to_its_ends():
    assert smooth(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    noise = np.random.default_rng(0).normal(size=500)
    assert len(smooth(noise)) == 500 and smooth(noise).std() < 0.4 * noise.std()
    assert list(smooth(np.array([1.0, 5.0]))) == [1.0, 5.0]


def test_a_thinned_line_keeps_every_outlier():
    y = np.zeros(100_000)
    y[[77, 50_001]] = 9.0, -9.0
    x, thinned = thin(np.arange(100_000.0), y)
    assert len(x) <= 1200 and {9.0, -9.0} <= set(thinned) and (np.diff(x) > 0).all()


def test_growth_is_a_slope_and_begins_anew_with_the_total():
    x, share = growth(np.array([0.0, 2.0, 4.0, 5.0, 6.0]), np.array([0.0, 1.0, np.nan, 0.25, 0.75]))
    assert (list(x), list(share)) == ([2.0, 6.0], [0.5, 0.5])
