"""Where the time went, as files."""

import pytest
from matplotlib.image import imread

from dnipipe.observe.trace import Span
from dnipipe.report import write_traces


def test_a_schedule_that_took_longer_is_longer_in_the_picture(tmp_path):
    """On one scale the bar of one second beside the bar of four is a quarter as long."""
    write_traces(tmp_path, {"A": [Span("x", 0, 0, None, 0.0, 1.0)], "B": [Span("x", 0, 0, None, 0.0, 4.0)]}, 1)
    picture = imread(tmp_path / "timeline.png")
    grey = abs(picture[:, :, :3] - 0.4).max(axis=2) < 0.01  # the colour of a name that the engine does not use
    lengths = [int(count) for count in grey.sum(axis=1) if count > 100]
    assert max(lengths) / min(lengths) == pytest.approx(4, rel=0.02)
    assert (tmp_path / "trace.json").exists() and (tmp_path / "trace-B.json").exists()
