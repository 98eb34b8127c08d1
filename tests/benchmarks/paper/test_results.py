"""Rows of results: written and read, selected from, and set in a table beside the paper's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.paper.results import table
from benchmarks.paper.rows import PaperRow, chosen_by, read_rows, selected, write_rows
from tests.benchmarks.paper.made_up import ROW


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, seed=1, curve=[[4.0, 90.0], [8.0, 2.0]])]
    write_rows(rows, tmp_path / "new" / "rows.json")
    assert read_rows(tmp_path / "new" / "rows.json") == rows
    assert read_rows(tmp_path / "none.json") == []


def _two_depths() -> list[PaperRow]:
    """Depth 1 is best on the test set and depth 0 on what was held out, each by the mean of its seeds."""
    return selected(
        [
            replace(ROW, predictor=0, seed=0, test_error_percent=1.0, held_out_error_percent=2.0),
            replace(ROW, predictor=0, seed=1, test_error_percent=4.0, held_out_error_percent=2.0),
            replace(ROW, predictor=1, seed=0, test_error_percent=2.0, held_out_error_percent=1.0),
            replace(ROW, predictor=1, seed=1, test_error_percent=2.0, held_out_error_percent=4.0),
        ]
    )


def test_each_rule_selects_one_depth_by_its_mean_over_the_seeds() -> None:
    rows = _two_depths()
    assert {row.predictor for row in chosen_by(rows, "best test")} == {1}
    assert {row.predictor for row in chosen_by(rows, "held out")} == {0}
    assert selected(rows) == rows


def test_a_table_has_both_selections_beside_the_paper() -> None:
    (line,) = (line for line in table(_two_depths()).splitlines() if "cDNI" in line)
    assert line == (
        "| fcn | mnist | 3 | cDNI | every | 2.00 ± 0.00 | 1 hidden | 2.50 ± 2.12 | 0 hidden | 2 | 10 | 2.2 |  |"
    )
    for network, figure in (("fcn", "1.9"), ("cnn", "0.9")):
        remembered = table(selected([replace(ROW, method="dni", model=network)])).splitlines()[-3]
        assert remembered.endswith(f"|  | {figure} |"), "not in the text of the paper, so in the last column"
    assert table(_two_depths()).splitlines()[-1] == (
        "fcn on CPU: 4 models in 2 s: 20 steps of a model a second, 7200 models an hour."
    )
