"""A real stall of 2 s: who goes on and who does not, by how far a stage may run ahead of its input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import stall
from benchmarks.stall import Settings, StallRow
from tests.ranks import run_ranks

STALL_S = 2.0


def _body(rank: int, world: int, settings: Settings, path: Path) -> None:
    stall.train(rank, torch.device("cpu"), settings, path)


def _row(window: int, folder: Path) -> StallRow:
    settings = Settings(window, microbatches=2, microbatch_ms=80.0, stall_s=STALL_S, steps=22, patience_s=0.005)
    run_ranks(stall.STAGES, _body, settings, folder / "told.pt")
    row, spans = stall.read(settings, folder / "told.pt")
    assert {span.name for span in spans} >= {"forward", "backward"}
    assert ("early forward" in {span.name for span in spans}) == (window > 0)
    return row


def test_with_the_window_that_it_needs_the_stage_after_a_stall_goes_on(tmp_path: Path) -> None:
    row = _row(29, tmp_path)
    assert row.needed == 25, "2 s at 80 ms"
    before, stalling, after = row.longest_step_s
    assert stalling > STALL_S
    assert max(before, after) < STALL_S / 2
    assert row.early_starts[2] >= 20 and row.early_starts[0] == 0
    assert {start[0] for start in row.starts} <= {1, 2}


@pytest.mark.parametrize("window, waits_s", [(0, STALL_S), (8, STALL_S - 8 * 0.08)])
def test_with_less_it_waits_for_the_rest_of_the_stall(window: int, waits_s: float, tmp_path: Path) -> None:
    row = _row(window, tmp_path)
    before, stalling, after = row.longest_step_s
    assert stalling > STALL_S and before < STALL_S / 2
    assert after > 0.6 * waits_s


def test_the_table_says_which_window_a_stall_takes() -> None:
    lists = {"longest_step_s": [0.1, 2.1, 0.2], "seconds": [4.0, 6.0, 4.5], "early_starts": [0, 3, 60], "starts": []}
    row = StallRow(45, 40, 2.0, 50.0, 2, 40, **lists, commit="")  # type: ignore[arg-type]
    text = stall.table([row])
    assert "Stage 1 of 3 stalls 2 s" in text and "takes a window of 40" in text
    assert "| 45 | 0.10, 2.10, 0.20 | 4.00, 6.00, 4.50 | 0, 3, 60 of 80 |" in text


def test_options_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        stall.main(["--windows", "4,none"])
    assert "--windows is a list of numbers such as 1,2,4, got '4,none'" in capsys.readouterr().err
