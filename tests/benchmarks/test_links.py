"""Links between processes: every pair over the group, neighbours over the boundary, and wrong bytes are seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import links
from benchmarks.link_rows import LinkRow, markdown
from benchmarks.rows import read_rows_of
from benchmarks.wires import GroupWire
from tests.ranks import run_ranks

SIZES = (5000, 40_000)


def test_each_pair_and_each_boundary_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "new" / "links.json"
    sizes = f"--activation-bytes {SIZES[0]} --large-bytes {SIZES[1]}"
    assert links.main(f"--ranks 3 {sizes} --json {path}".split()) == 0
    rows = read_rows_of(LinkRow, path)
    assert [(row.carrier, row.sender, row.receiver) for row in rows] == [
        ("gloo", 0, 1), ("gloo", 0, 2), ("gloo", 1, 2), ("group", 0, 1), ("group", 1, 2),
    ]  # fmt: skip
    for row in rows:
        assert row.intact and row.refused is None
        assert row.latency_us is not None and row.activation_ms is not None and row.large_gb_s is not None
        assert 0 < row.latency_us < 1e6
        assert row.activation_gb_s == pytest.approx(SIZES[0] / row.activation_ms / 1e6)
    machine = json.loads((path.parent / "machine.json").read_text())
    assert machine["topology"] is None and machine["torch"] == torch.__version__
    assert (path.parent / "links.md").read_text() == markdown(rows)


def _spoiling(rank: int, world: int, path: Path) -> None:
    def receive(wire: GroupWire, tensor: Tensor) -> None:
        whole(wire, tensor)
        tensor[-1] += 1

    whole, GroupWire.receive = GroupWire.receive, receive  # type: ignore[method-assign]
    links.measure_links(rank, torch.device("cpu"), SIZES, path)


def test_bytes_that_changed_on_the_way_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    run_ranks(2, _spoiling, path)
    assert [(row.carrier, row.intact) for row in read_rows_of(LinkRow, path)] == [("gloo", False), ("group", True)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--ranks 1", "--ranks must be at least 2, got 1"),
        ("--activation-bytes 3", "--activation-bytes must be at least 8, got 3"),
    ],
)
def test_what_cannot_be_is_refused(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert links.main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_a_refused_link_says_why() -> None:
    none = dict.fromkeys(("latency_us", "activation_ms", "activation_gb_s", "large_gb_s"))
    row = LinkRow(
        "cuda", "a card", "direct", 0, 1, activation_bytes=8, large_bytes=8, intact=True, refused="no way", **none
    )
    assert "| direct | 0-1 | refused |" in markdown([row]) and "no way" in markdown([row])
