"""Each method is measured, and does what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import old_weights
from benchmarks.old_weights import COPIES, METHODS, NEW, NEW_RECOMPUTE, PLAIN, RECOMPUTE, Loop, WeightsRow
from benchmarks.rows import read_rows_of
from benchmarks.workload import Workload

TINY = "--width 64 --seq-len 16 --blocks 1 --microbatch-size 1 --rounds 2 --steps 1"


def test_each_method_is_a_row_at_each_number_of_microbatches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "rows.json"
    assert old_weights.main([*f"{TINY} --stages 3 --microbatches 1,4".split(), "--json", str(path)]) == 0
    rows = read_rows_of(WeightsRow, path)
    assert [(row.method, row.microbatches) for row in rows] == [(name, m) for m in (1, 4) for name in METHODS]
    for row in rows:
        plain = next(each for each in rows if each.method == PLAIN and each.microbatches == row.microbatches)
        assert row.delay == (0 if row.method == PLAIN else 2)
        assert row.step_ms > 0 and row.peak_bytes is None
        assert row.ratio_to_plain == pytest.approx(row.step_ms / plain.step_ms)
    said = " ".join(capsys.readouterr().out.split())  # a narrow table wraps its title
    assert all(name in said for name in METHODS) and "the first of 3 stages of 1 block, width 64" in said


def _trained(method: str, num_microbatches: int) -> list[Tensor]:
    workload = Workload(4, 1, 64, 8, 16, 1, torch.float32)
    loop = Loop(method, workload, num_microbatches, torch.device("cpu"))
    loop.output_grad = torch.ones_like(loop.output_grad).cumsum(-1)
    for _ in range(6):
        loop.step()
    assert len(loop.graphs) == loop.delay
    return [parameter.detach() for parameter in loop.module.parameters()]


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_methods_differ_in_their_gradients_where_they_should(num_microbatches: int) -> None:
    ends = {method: _trained(method, num_microbatches) for method in METHODS}

    def equal(one: str, other: str) -> bool:
        return all(torch.equal(a, b) for a, b in zip(ends[one], ends[other], strict=True))

    assert equal(COPIES, RECOMPUTE)
    for one, other in ((PLAIN, COPIES), (COPIES, NEW), (NEW, NEW_RECOMPUTE), (COPIES, NEW_RECOMPUTE)):
        assert not equal(one, other), (one, other)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--microbatches 0", "--microbatches must be at least 1 each, got '0'"),
        ("--stages 0", "--stages must be at least 1, got 0"),
        ("--width 0", "--width must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old_weights.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
