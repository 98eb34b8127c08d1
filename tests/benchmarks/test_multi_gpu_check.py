"""The check against the oracle holds bit for bit on CPUs, and sees a pipeline that computes something else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import multi_gpu_check
from benchmarks.multi_gpu_check import CASES, CheckRow, difference, markdown
from benchmarks.rows import read_rows_of
from dnipipe import ScheduleDNI
from tests.ranks import run_ranks


def test_every_policy_equals_the_oracle_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "check.json"
    assert multi_gpu_check.main(["--ranks", "2", "--json", str(path)]) == 0
    rows = read_rows_of(CheckRow, path)
    assert [(row.policy, row.microbatches, row.interface) for row in rows] == list(CASES)
    assert all(row.worst == row.allowed == 0.0 for row in rows)
    assert path.with_suffix(".md").read_text() == markdown(rows)


def _with_another_lag(rank: int, world: int) -> tuple[float, float]:
    cpu = torch.device("cpu")
    right = difference(cpu, "group", "synthetic", 4, "linear")
    multi_gpu_check.ScheduleDNI = partial(ScheduleDNI, lag=1)  # type: ignore[misc, assignment]
    return right, difference(cpu, "group", "synthetic", 4, "linear")


def test_a_gradient_of_another_microbatch_is_seen() -> None:
    """With a lag of 1 in place of 2, predictors learn one exchange earlier."""
    (right, wrong), _ = run_ranks(2, _with_another_lag)
    assert right == 0.0 and wrong > multi_gpu_check.TOLERANCE


def test_what_is_not_a_number_is_not_right() -> None:
    row = CheckRow("cuda", "a card", 4, "group", "wait", 4, None, 8, worst=float("nan"), allowed=1e-4)
    assert not row.is_right and "WRONG" in markdown([row])


def test_one_rank_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert multi_gpu_check.main(["--ranks", "1"]) == 2
    assert "--ranks must be at least 2, got 1" in capsys.readouterr().err
