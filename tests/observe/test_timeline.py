"""The picture itself is judged by eye; here its numbers, its edges and its limits."""

import random

import pytest
from matplotlib.image import imread

from dnipipe.observe.timeline import _fits, busy_share, draw_timeline
from dnipipe.observe.trace import Span


def _span(name, start_s, end_s, microbatch=None, rank=0):
    return Span(name, rank, rank, microbatch, start_s, end_s)


def test_the_busy_share_is_the_share_of_instants_that_work_and_do_not_wait():
    draw = random.Random(0)
    for _ in range(20):
        spans = []
        for _ in range(12):
            start = draw.randrange(0, 100)
            spans.append(_span(draw.choice(["forward", "learn", "wait"]), start, start + draw.randrange(0, 30)))

        def is_busy(at_s, spans=spans):
            names = {span.name for span in spans if span.start_s <= at_s < span.end_s}
            return bool(names - {"wait"}) and "wait" not in names

        counted = sum(is_busy(second + 0.5) for second in range(10, 90)) / 80
        assert busy_share(spans, 10, 90) == pytest.approx(counted)


def test_a_picture_is_written_and_grows_by_one_row_per_rank(tmp_path):
    sizes = []
    for num_ranks in (1, 3):
        path = tmp_path / "new" / f"{num_ranks}.png"
        draw_timeline([_span("forward", 0, 1, 0, rank) for rank in range(num_ranks)], path, "title")
        sizes.append(imread(path).shape)
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]


def test_the_window_decides_what_is_drawn(tmp_path):
    forward, backward = _span("forward", 10, 11), _span("backward", 11, 12)
    draw_timeline([forward, backward], tmp_path / "window.png", "t", window_s=(0, 1))
    draw_timeline([forward], tmp_path / "alone.png", "t")
    assert (imread(tmp_path / "window.png") == imread(tmp_path / "alone.png")).all()


def test_a_name_that_the_engine_does_not_use_is_drawn_too(tmp_path):
    draw_timeline([_span("forward", 0, 1), _span("checkpoint", 1, 2)], tmp_path / "both.png", "t")
    draw_timeline([_span("forward", 0, 1), _span("wait", 1, 2)], tmp_path / "wait.png", "t")
    assert (imread(tmp_path / "both.png") != imread(tmp_path / "wait.png")).any()


def test_a_longer_number_needs_a_wider_bar():
    assert _fits("7", 8) and not _fits("77", 8) and _fits("77", 14)


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enabled"):
        draw_timeline([], tmp_path / "t.png", "t")
    with pytest.raises(ValueError, match="window_s"):
        draw_timeline([_span("forward", 0, 1)], tmp_path / "t.png", "t", window_s=(2, 3))
