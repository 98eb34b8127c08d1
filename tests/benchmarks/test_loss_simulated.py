"""Time to loss without a race: loss by step from one file, seconds of a step from another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import time_to_loss
from benchmarks.loss_rows import EQUAL_STEPS, LENGTH, LossRow
from benchmarks.loss_simulated import simulate
from benchmarks.rows import read_rows_of


def a_loss(policy: str, bpb: float, **others: Any) -> dict[str, Any]:
    """A row as benchmarks.policies writes it, of the model of a_pace()."""
    values = dict(
        policy=policy, interface=None, optimizer="AdamW", stages=4, microbatches=4, unlock_after_steps=100, steps=1000,
        planned_steps=1000, seed=0, learning_rate=1e-3, val_bpb=bpb, curve=[[100, 6.0], [500, 4.0], [1000, bpb]],
        late_weights="predicted@3", in_flight=None, width=64, seq_len=16, blocks=8, batch_size=8, parameters=3_000_000,
    )  # fmt: skip
    return {**values, **others}


def a_pace(schedule: str, step_ms: float | None, **others: Any) -> dict[str, Any]:
    """A row as benchmarks.throughput writes it, in part."""
    values = dict(
        device="cpu", card="a processor", schedule=schedule, interface=None, policy=None, transport="gloo", stages=4,
        microbatches=4, microbatch_size=2, seq_len=16, width=64, blocks_per_stage=2, dtype="float32", torch="2.11",
        step_ms=step_ms, peak_bytes=7,
    )  # fmt: skip
    return {**values, **others}


def test_loss_by_step_and_seconds_of_a_step_make_a_time_to_loss() -> None:
    loaded = [
        a_loss("wait", 2.0, unlock_after_steps=1000, stages=1),
        a_loss("stale", 2.0),
        a_loss("stale", 1.9, steps=800, planned_steps=800, curve=[[100, 6.0], [800, 1.9]]),
        a_loss("stale", 2.5, steps=300),
        a_loss("stale", 2.5, late_weights="predicted"),  # not what AdamW has by default
        a_loss("stale", 2.5, microbatches=8),
        a_pace("1F1B", 100.0),
        a_pace("GPipe", 90.0, microbatches=8, microbatch_size=1),
        a_pace("DNI", 60.0, policy="stale", transport="direct"),
        a_pace("DNI", 70.0, policy="corrected"),
        a_pace("ZBVZeroBubble", None),
    ]
    rows = simulate(loaded, 4, "python")
    assert [(row.label, row.microbatches, row.purpose, row.steps) for row in rows] == [
        ("1F1B", 4, EQUAL_STEPS, 1000), ("GPipe", 8, EQUAL_STEPS, 1000),
        ("DNI stale predicted@3 direct", 4, EQUAL_STEPS, 1000),
        ("DNI stale predicted@3 direct", 4, LENGTH, 800),
    ]  # fmt: skip
    assert not any(row.measured for row in rows)
    assert [row.late_weights for row in rows] == [None, None, "predicted@3", "predicted@3"]
    # 100 steps as 1F1B's, then its own
    assert [row.seconds for row in rows] == pytest.approx([100.0, 90.0, 10 + 54.0, 10 + 42.0])
    assert [point[1] for point in rows[2].curve] == pytest.approx([10.0, 34.0, 64.0])
    assert rows[2].time_to_1f1b_ratio == pytest.approx(0.64)
    assert rows[3].seconds_to_100 == pytest.approx(10 + 42.0 * 4 / 4.1)
    assert rows[2].time_to_best_ratio == pytest.approx(64 / 90)
    with pytest.raises(ValueError, match="with width 128, the seconds of one with 64"):
        simulate([{**each, "width": 128} if "val_bpb" in each else each for each in loaded], 4, "python")
    with pytest.raises(ValueError, match="no row of policy 'wait'"):
        simulate(loaded[1:], 4, "python")
    with pytest.raises(ValueError, match="no row of benchmarks.throughput"):
        simulate(loaded[:5], 4, "python")
    with pytest.raises(ValueError, match="no row of benchmarks.policies"):
        simulate(loaded[6:], 4, "python")


def test_the_simulation_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies, throughput, out = (tmp_path / f"{name}.json" for name in ("policies", "throughput", "out"))
    policies.write_text(json.dumps([a_loss("wait", 2.0), a_loss("stale", 1.9)]))
    throughput.write_text(json.dumps([a_pace("1F1B", 100.0), a_pace("DNI", 60.0, policy="stale")]))
    assert time_to_loss.main(["--simulated", str(policies), str(throughput), "--json", str(out)]) == 0
    assert [row.measured for row in read_rows_of(LossRow, out)] == [False, False]
    assert "simulated" in out.with_suffix(".md").read_text() and out.with_suffix(".png").exists()
    throughput.write_text("[1]")
    assert time_to_loss.main(["--simulated", str(policies), str(throughput), "--json", str(out)]) == 2
    assert "row 0 is a JSON int, not an object" in capsys.readouterr().err
