"""The paper's experiments from the command line to table and picture, on made-up images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.paper.training import agreement
from tests.benchmarks.paper.made_up import TINY, made_up_images, run

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize(
    "experiment, options, models",
    [
        ("every_layer", ("--layers", "3", "--seeds", "0,1", "--network", "fcn"), 2 * (2 + 4) + 2 * 2 * 2),
        ("every_layer", ("--layers", "3", "--network", "cnn", "--steps", "12"), 2 + 4 + 2 * 2),
        ("sparse_updates", ("--layers", "3"), 2 * 3),
        ("complete_unlock", ("--layers", "3"), 3 + 2 + 2 * 3),
        ("sparse_updates", ("--layers", "3", "--hidden", "0,2"), 2 * 2 * 3),
        ("deep", ("--layers", "5"), 2),
        ("deep", ("--layers", "5", "--hidden", "0,1,2"), 1 + 3),
        ("single", ("--layers", "4"), 1 + 3 + 2 * 2 * 3),
    ],
)
def test_an_experiment_leaves_rows_a_table_and_a_picture(
    experiment: str, options: tuple[str, ...], models: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, is_conv = tmp_path / "rows.json", "cnn" in options
    if is_conv:
        monkeypatch.setattr("benchmarks.paper.running.load_images", lambda name, folder: made_up_images(side=12))
    rows = run(experiment, path, *options)
    assert len(rows) == models
    assert all(row.experiment == experiment and row.steps == 12 for row in rows)
    assert {len(row.curve) for row in rows} == {2 if is_conv else 3}, "evaluations"
    assert {row.model for row in rows} == {"cnn" if is_conv else "fcn"}
    pictures = {"rows.png", "rows_gradients.png"} if experiment == "single" else {"rows.png"}
    assert {f.name for f in tmp_path.iterdir()} == {"rows.json", "rows.md"} | pictures, "checkpoints are cleared away"
    bprop = [row.test_error_percent for row in rows if row.method == "bprop"]
    limit = 74 if experiment == "deep" or is_conv else 40  # 12 steps are few for 5 narrow layers, and for filters
    assert all(error < limit for error in bprop), "guessing is 75"


def test_only_a_single_interface_is_measured_against_the_true_gradient(tmp_path: Path) -> None:
    rows = run("single", tmp_path / "rows.json", "--layers", "3")
    for row in rows:
        assert {len(point) for point in row.curve} == ({5} if row.method in ("dni", "cdni") else {2})


def test_agreement_of_two_gradients() -> None:
    true = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).unsqueeze(0)
    figures = agreement(torch.cat([true, -true, 2 * true]), true.expand(3, -1, -1))
    torch.testing.assert_close(figures[:, 0], torch.tensor([0.0, 7.0, 3.5]))
    torch.testing.assert_close(figures[:, 1], torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(figures[:, 2], torch.tensor([0.0, 0.75, 0.0]))


def test_rates_fall_to_nothing_along_a_line_and_a_run_trains_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annealed = replace(TINY, steps=200, anneal=True)
    assert [annealed.rates_left(step) for step in (0, 1, 2, 100, 199)] == [1, 1, 0.99, 0.5, pytest.approx(0.01)]
    assert replace(TINY, anneal=False).rates_left(11) == 1
    monkeypatch.setattr("benchmarks.paper.order.QUICK", replace(TINY, anneal=True))
    scales: list[float] = []
    monkeypatch.setattr("benchmarks.paper.stack.Stack.scale_rates", lambda _, factor: scales.append(round(factor, 9)))
    run("deep", tmp_path / "rows.json", "--layers", "3", "--limit-s", "0")
    assert scales == [], "step 0 goes by the rate as it is, and the steps up to an evaluation with it"
    run("deep", tmp_path / "rows.json", "--layers", "3", "--limit-s", "0")
    assert scales == [0.67], "a run that goes on has the rate of its step, 4 of 12, in hundredths"
