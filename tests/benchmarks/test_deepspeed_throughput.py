"""DeepSpeed's engine against ours, with real processes: both are measured, and what cannot be is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import deepspeed_throughput
from benchmarks.deepspeed_bars import draw_bars
from benchmarks.deepspeed_compete import Job, Settings
from benchmarks.deepspeed_rows import DeepSpeedRow, markdown
from benchmarks.rows import read_rows_of, write_rows
from benchmarks.workload import Workload

TINY = "--stages 2 --width 64 --seq-len 16 --blocks 1 --vocab-size 32 --rounds 1 --steps 1 --lag 1 --zero 1"


def a_row(engine: str = "plain", microbatches: int = 1, tokens_per_s: float = 100.0, **others: Any) -> DeepSpeedRow:
    values: dict[str, Any] = dict(
        engine=engine, policy=None, interface=None, lag=None, transport="gloo", device="cpu", card="a processor",
        zero=1, dtype="float32", stages=2, microbatches=microbatches, microbatch_size=1, seq_len=64, width=128,
        blocks_per_stage=1, vocab_size=256, microbatch_ms=50.0, step_ms=64 / tokens_per_s * 1e3, spread_ms=0.5,
        tokens_per_s=tokens_per_s, speedup=tokens_per_s / 100.0, peak_bytes=None, commit="abc", torch="2.11",
        deepspeed="0.19.8", date="2026-01-01",
    )  # fmt: skip
    return DeepSpeedRow(**{**values, **others})


@pytest.mark.timeout(300)
def test_both_engines_are_measured_at_every_number_of_microbatches(tmp_path: Path) -> None:
    deepspeed = pytest.importorskip("deepspeed", reason="its engine is what ours is compared with")
    path = tmp_path / "new" / "rows.json"
    assert deepspeed_throughput.main([*TINY.split(), "--microbatches", "1,2", "--json", str(path)]) == 0
    rows = read_rows_of(DeepSpeedRow, path)
    assert [(row.engine, row.microbatches) for row in rows] == [
        ("plain", 1), ("dnipipe", 1), ("plain", 2), ("dnipipe", 2),
    ]  # fmt: skip
    for plain, ours in (rows[:2], rows[2:]):
        assert (plain.policy, plain.interface, plain.lag, plain.speedup) == (None, None, None, 1.0)
        assert (ours.policy, ours.interface, ours.lag) == ("synthetic", "local_head", 1)
        assert ours.speedup == pytest.approx(plain.step_ms / ours.step_ms)
        assert plain.tokens_per_s == pytest.approx(plain.microbatches * 16 / plain.step_ms * 1e3)
        for row in (plain, ours):
            assert (row.zero, row.dtype, row.transport, row.peak_bytes) == (1, "float32", "gloo", None)
            assert row.deepspeed == deepspeed.__version__ and row.microbatch_ms > 0
    assert sorted(each.name for each in path.parent.iterdir()) == ["rows.json", "rows.md", "rows.png"]
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(rows)


def test_the_table_sets_ours_against_plain_and_against_theory() -> None:
    rows = [a_row(), a_row("dnipipe", tokens_per_s=180.0, policy="synthetic", interface="linear")]
    rows.append(a_row("dnipipe", 4, 120.0, policy="synthetic", interface="linear", peak_bytes=2_500_000_000))
    heading, *lines = [line for line in markdown(rows).splitlines() if line]
    assert heading == (
        "### cpu, a processor: 2 stages of 1 block, width 128, vocabulary 256, float32, ZeRO 1, "
        "microbatches of 1 x 64 tokens"
    )
    assert lines[2:] == [
        "| plain PipelineEngine | 1 | 640.0 ± 0.5 | 100 | 1.00 | 1.00 | 50.0 | gloo | – |",
        "| dnipipe.deepspeed synthetic linear | 1 | 355.6 ± 0.5 | 180 | 1.80 | 2.00 | 50.0 | gloo | – |",
        "| dnipipe.deepspeed synthetic linear | 4 | 533.3 ± 0.5 | 120 | 1.20 | 1.25 | 50.0 | gloo | 2.50 GB |",
    ]


def test_rows_of_two_workloads_are_two_panels_and_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [a_row(), a_row("dnipipe", tokens_per_s=250.0), a_row(zero=0), a_row("dnipipe", zero=0)]
    write_rows(rows, tmp_path / "rows.json")
    assert read_rows_of(DeepSpeedRow, tmp_path / "rows.json") == rows
    assert markdown(rows).count("### ") == 2
    draw_bars(rows, tmp_path / "rows.png")
    draw_bars(rows[:2], tmp_path / "one.png")
    assert (tmp_path / "rows.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--microbatches 1,x", "--microbatches is a list of numbers such as 1,2,4, got '1,x'"),
        ("--stages 1", "--stages must be at least 2, for one stage has no bubble; got 1"),
        ("--lag 0", "--lag must be at least 1, got 0"),
        ("--width 200", "--width 200 is no multiple of 3 attention heads"),
        ("--microbatch-size 0", "--microbatch-size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deepspeed_throughput.main(arguments.split()) == 2
    assert capsys.readouterr().err == f"benchmarks.deepspeed_throughput: {message}\n"


def test_without_deepspeed_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert deepspeed_throughput.main([]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.deepspeed_throughput: DeepSpeed is not installed: pip install 'dnipipe[deepspeed]'\n"
    )


@pytest.mark.parametrize("zero, dtype", [(0, torch.float32), (1, torch.bfloat16)])
def test_both_engines_have_one_config_which_is_that_of_the_job(zero: int, dtype: torch.dtype) -> None:
    job = Job(Workload(2, 1, 64, 16, 32, 3, dtype), 5, zero, 4, "mlp", "group")
    plain, ours = job.config("plain"), job.config("dnipipe")
    block = ours.pop("dnipipe")
    assert plain == ours and "dnipipe" not in plain
    sizes = plain["train_micro_batch_size_per_gpu"], plain["gradient_accumulation_steps"]
    assert (*sizes, plain["zero_optimization"]) == (3, 5, {"stage": zero})
    assert ("bf16" in plain) == (dtype == torch.bfloat16)
    assert block == {
        "policy": "synthetic", "interface": "mlp", "lag": 4, "transport": "group", "num_classes": 32,
    }  # fmt: skip


def test_every_option_counts() -> None:
    asked = (
        "--stages 3 --microbatches 5,7 --microbatch-size 9 --seq-len 11 --width 128 --blocks 13 --vocab-size 17 "
        "--dtype bfloat16 --zero 0 --lag 19 --interface mlp --transport group --rounds 23 --steps 29 --json a.json"
    )
    workload = Workload(3, 13, 128, 11, 17, 9, torch.bfloat16)
    jobs = tuple(Job(workload, m, 0, 19, "mlp", "group") for m in (5, 7))
    options = deepspeed_throughput._parser().parse_args(asked.split())
    assert deepspeed_throughput._settings(options) == Settings(jobs, 23, 29, Path("a.json"))
