"""What the pictures of the paper's experiments draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.nearness import nearness_picture
from benchmarks.paper.ticks import plain_log_ticks
from tests.benchmarks.paper.test_experiments import ROW

SINGLE = replace(
    ROW,
    experiment="single",
    position=1,
    steps=20,
    learning_rate=1e-3,
    curve=[[10, 9.0, 0.25, 0.5, 0.25], [20, 2.0, 0.125, 0.75, 0.5]],
)


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    axes.set(yscale="log", ylim=(1.5, 45))
    plain_log_ticks(axes.yaxis)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    labels = [label.get_text() for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    assert labels == ["2", "5", "10", "20"]
    assert not any(label.get_text() for label in axes.get_yticklabels(minor=True))


def test_nearness_is_the_mean_over_the_seeds_measure_by_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []
    plot = Axes.plot

    def record(axes: Axes, steps: list[float], means: list[float], *args: object, **options: object) -> object:
        drawn.append(means)
        return plot(axes, steps, means, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "plot", record)
    other = replace(SINGLE, seed=1, curve=[[10, 9.0, 0.75, 0.0, 0.75], [20, 2.0, 0.375, 0.25, 0.0]])
    unmeasured = replace(SINGLE, method="bprop", position=None, predictor=None, curve=[[10, 9.0], [20, 2.0]])
    nearness_picture([SINGLE, other, unmeasured], tmp_path / "both.png")
    assert drawn == [[0.5, 0.25], [0.25, 0.5], [50, 25]], "distance, cosine, wrong signs in per cent"
    assert (tmp_path / "both.png").exists()
    nearness_picture([unmeasured], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
