"""What the pictures of the paper's experiments draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper.nearness import nearness_picture
from benchmarks.paper.results import picture
from benchmarks.paper.ticks import plain_log_ticks
from tests.benchmarks.paper.made_up import ROW

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


def test_what_has_one_place_is_a_point_and_what_has_none_a_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, object] = {}
    monkeypatch.setattr(Axes, "axhline", lambda axes, y, **look: drawn.update({look["label"]: y}))
    errorbar = Axes.errorbar

    def record(axes: Axes, x: list[float], y: object, *args: object, **look: str) -> object:
        drawn[look["label"]] = x
        return errorbar(axes, x, y, *args, **look)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "errorbar", record)
    backprop = replace(SINGLE, method="bprop", position=None, layers=4, selection="held out", test_error_percent=3.0)
    cdni = [replace(backprop, method="cdni", position=1, layers=layers) for layers in (3, 4)]
    picture([backprop, *cdni], tmp_path / "layers.png", "layers", lambda row: row.layers)
    assert drawn == {"backprop": [4], "cDNI": [3, 4]}
    drawn.clear()
    picture([backprop, *cdni], tmp_path / "position.png", "position", lambda row: row.position)
    assert drawn == {"backprop": 3.0, "cDNI": [1]}


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
