"""A run that is cut off or killed, or whose rows are there already, goes on where it was and ends the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.rows import PaperRow, read_rows, write_rows
from benchmarks.paper.running import Clock
from benchmarks.paper.training import Training
from tests.benchmarks.paper.made_up import run

pytestmark = pytest.mark.usefixtures("tiny")


def _timeless(rows: Iterable[PaperRow]) -> list[PaperRow]:
    return [replace(row, seconds_of_stack=0.0) for row in rows]


def _errors(row: PaperRow) -> tuple[Any, ...]:
    return (row.cell, row.choice, row.seed), row.test_error_percent, row.held_out_error_percent


def test_a_run_that_is_cut_off_ends_as_one_that_is_not(tmp_path: Path) -> None:
    options = "--layers", "3", "--network", "fcn"
    whole = run("every_layer", tmp_path / "whole.json", *options)
    path = tmp_path / "cut.json"
    assert run("every_layer", path, *options, "--limit-s", "0") == []
    cut: list[PaperRow] = []
    for _ in range(3 * 3 - 1):  # every call makes one chunk of the three of one stack of the three
        assert len(cut) < len(whole)
        cut = run("every_layer", path, *options, "--limit-s", "0")
    assert _timeless(cut) == _timeless(whole)


def test_time_is_up_where_the_next_evaluation_may_come_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.paper.running.time.monotonic", lambda: now[0])
    clock = Clock(100.0)  # of which five are for saving
    for place, left, arrived in ((0, 0.0, 20.0), (1, 10.0, 40.0), (0, 40.0, 50.0)):
        now[0] = left
        clock.leave(place)
        now[0] = arrived
        clock.arrive(place)
    for now[0], is_up in ((64.0, False), (66.0, True)):
        assert clock.is_up is is_up, "the longest way took 30 s"


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, options = tmp_path / "rows.json", ("--layers", "3", "--network", "fcn", "--save-every-s", "0")
    whole = run("every_layer", tmp_path / "whole.json", *options)
    looks: list[int] = []
    look = Training.look

    def killed(training: Training) -> None:
        looks.append(training.step)
        if len(looks) == 5:  # in the second stack, with a checkpoint of step 4
            raise KeyboardInterrupt
        look(training)

    monkeypatch.setattr(Training, "look", killed)
    with pytest.raises(KeyboardInterrupt):
        run("every_layer", path, *options)
    assert looks == [4, 8, 12, 4, 8] and len(read_rows(path)) == 2, "the first stack's rows are there"
    rows = run("every_layer", path, *options)
    assert looks[5:] == [8, 12, 4, 8, 12]
    assert _timeless(rows) == _timeless(whole)


def test_side_by_side_in_small_stacks_or_cut_off_it_is_the_same(tmp_path: Path) -> None:
    options = "--layers", "3", "--network", "fcn"
    whole = [_errors(row) for row in run("every_layer", tmp_path / "whole.json", *options)]
    path = tmp_path / "apart.json"
    more = "--stack", "4", "--workers", "3"
    assert len(run("every_layer", path, *options, *more, "--limit-s", "0")) == 0
    apart = run("every_layer", path, *options, *more)
    assert {row.models_of_stack for row in apart} == {4, 2}
    assert sorted(_errors(row) for row in apart) == sorted(whole)


def test_rows_of_another_length_or_dataset_are_kept_and_not_taken(tmp_path: Path) -> None:
    path, options = tmp_path / "rows.json", ("--layers", "3", "--network", "fcn")
    first = run("every_layer", path, *options)
    assert run("every_layer", path, *options) == first, "nothing was left to do"
    run("every_layer", path, *options, "--steps", "8", "--limit-s", "0")
    longer = run("every_layer", path, *options, "--steps", "16")
    assert [row for row in longer if row.steps == 12] == first
    assert [len(row.curve) for row in longer if row.steps == 16] == [4] * len(first)
    both = run("every_layer", path, *options, "--dataset", "mnist,cifar10")
    assert len(both) == 3 * len(first)
    text = path.with_suffix(".md").read_text()
    assert all(f"| fcn | {name} | 3 | backprop |" in text for name in ("mnist", "cifar10"))


def test_a_stack_that_is_partly_there_or_had_other_rates_is_trained_again_and_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = "--layers", "3", "--network", "fcn"
    whole = run("every_layer", path, *options)
    rates = {row.predictor_rate for row in whole}
    assert None in rates and len(rates) > 1, "backprop has none"
    for number, change in enumerate((None, {"predictor_rate": 0.5}, {"last_rate": 0.5})):
        at = next(place for place, row in enumerate(whole) if row.method == "dni" and row.predictor == 1)
        other = [replace(whole[at], test_error_percent=0.5, **change)] if change else []  # type: ignore[arg-type]
        write_rows([*whole[:at], *other, *whole[at + 1 :]], path)
        again = run("every_layer", path, *options)
        assert sorted(map(_errors, again)) == sorted(map(_errors, whole)), f"change {number}"
    older = [replace(row, predictor_rate=None, test_error_percent=0.5) for row in whole]
    write_rows(older, path)
    assert run("every_layer", path, *options) == older, "rows that do not say their rate are taken at their word"
