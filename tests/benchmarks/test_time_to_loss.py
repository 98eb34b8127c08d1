"""The race to 1F1B's loss: with real processes end to end, and what is read off curves that are made up."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import time_to_loss
from benchmarks.contestants import Entry
from benchmarks.loss_curves import draw_curves
from benchmarks.loss_rows import EQUAL_STEPS, EQUAL_TIME, LENGTH, SEARCH, LossRow, loss_at, seconds_to, with_marks
from benchmarks.loss_table import markdown
from benchmarks.loss_training import Plan, Racer, Task, Validation, stretches
from benchmarks.rows import read_rows_of
from benchmarks.workload import Workload, token_loss
from dnipipe.data import ByteCorpus
from tests.ranks import run_ranks

TINY = "--stages 2 --blocks 1 --width 64 --seq-len 16 --batch-size 4 --max-mb 0.5 --eval-sequences 6 --eval-every 3"


def a_row(schedule: str = "1F1B", seconds: float = 8.0, bpb: float = 2.0, **others: Any) -> LossRow:
    """A run whose loss falls along a line from 6 at a quarter of its time."""
    curve = [[n * 25, n / 4 * seconds, 6.0 - (n - 1) / 3 * (6.0 - bpb)] for n in (1, 2, 3, 4)]
    values: dict[str, Any] = dict(
        device="cpu", card="a processor", schedule=schedule, interface=None, policy=None, transport="gloo",
        optimizer="AdamW", stages=2, microbatches=4, microbatch_size=2, seq_len=16, width=64, blocks_per_stage=1,
        num_parameters=1_500_000, dtype="float32", seed=0, commit="abc", torch="2.11", date="2026-01-01",
        command="python", learning_rate=1e-3, steps=100, seconds=seconds, step_ms=seconds * 10, final_bpb=bpb,
        curve=curve,
    )  # fmt: skip
    return LossRow(**{**values, **others})


def test_a_mark_is_reached_where_the_curve_stays_below_it() -> None:
    curve = [[10, 1.0, 5.0], [20, 2.0, 3.0], [30, 3.0, 4.0], [40, 4.0, 2.0]]
    assert seconds_to(curve, 3.0) == 3.5  # at 2 s it was there, but not for good
    assert seconds_to(curve, 2.0) == 4.0
    assert seconds_to(curve, 1.9) is None
    assert seconds_to(curve, 5.0) == 1.0
    assert [loss_at(curve, share) for share in (0.5, 0.75, 1.0)] == [3.0, 4.0, 2.0]
    assert loss_at(curve, 0.625) == pytest.approx(3.5)


def test_the_marks_are_those_of_1f1b_with_the_same_seed_and_the_given_microbatches() -> None:
    rows = [
        a_row(own_microbatches=8),
        a_row("GPipe", seconds=4.0),
        a_row(microbatches=8, own_microbatches=8, seconds=5.0, bpb=1.9),
        a_row("DNI", policy="stale", seconds=4.0, bpb=3.0),
        a_row("DNI", policy="stale", seconds=6.0, bpb=1.0, purpose=LENGTH, steps=150),
        a_row("DNI", policy="synthetic", final_bpb=None),
        a_row(seed=1, bpb=3.0),
        a_row("DNI", policy="stale", seconds=4.0, bpb=3.0, seed=1),
        a_row("DNI", policy="stale", seconds=4.0, bpb=3.0, optimizer="Muon"),
    ]
    marked = with_marks(rows, 4)
    # 1F1B is at 14/3 after half of its 8 s, at 10/3 after three quarters, at 2 in the end
    reached = [(row.seconds_to_50, row.seconds_to_75, row.seconds_to_100) for row in marked]
    assert reached[0] == pytest.approx((4.0, 6.0, 8.0))
    assert reached[1] == pytest.approx((2.0, 3.0, 4.0))
    assert reached[3] == (pytest.approx(2 + 1 / 3), pytest.approx(3 + 2 / 3), None)
    assert reached[4] == pytest.approx((1.5 + 4.5 * (4 / 3) / 5, 1.5 + 4.5 * (8 / 3) / 5, 1.5 + 4.5 * 4 / 5))
    assert reached[5] == reached[8] == (None, None, None), "what diverged, and what has no baseline"
    assert reached[7][2] == pytest.approx(4.0), "the mark of its own seed"
    ratios = [row.time_to_1f1b_ratio for row in marked]
    at_2_0 = 3.75 + 1.25 * (4 - 4.1 * 2 / 3) / (4.1 / 3)
    assert ratios[:3] == pytest.approx([1.0, 0.5, at_2_0 / 8]) and ratios[3] is None
    assert ratios[4] == pytest.approx(5.1 / 8) and ratios[7] == pytest.approx(4 / 8)
    # GPipe was fastest of torch's
    assert marked[4].time_to_best_ratio == pytest.approx(5.1 / 4)


def test_torch_s_best_is_that_at_its_own_microbatches() -> None:
    rows = [a_row(own_microbatches=8), a_row(microbatches=8, own_microbatches=8, seconds=9.0)]
    marked = with_marks(rows, 4)
    # by its short timing it was faster at 8: a run at another number than its own does not count
    assert [row.time_to_best_ratio for row in marked] == pytest.approx([8 / 9, 1.0])


def test_the_last_stretch_is_not_much_shorter_than_the_others() -> None:
    assert stretches(10, 3) == [range(0, 3), range(3, 6), range(6, 10)]
    assert stretches(11, 3) == [range(0, 3), range(3, 6), range(6, 9), range(9, 11)]
    assert stretches(2, 3) == [range(0, 2)] and stretches(3, 3) == [range(0, 3)]


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [
        a_row(own_microbatches=4, before_ms=80.0, after_ms=82.0),
        a_row("DNI", policy="stale", seconds=4.0, bpb=2.2),
        a_row("DNI", policy="stale", seconds=8.0, bpb=1.9, purpose=EQUAL_TIME, steps=200),
        a_row("DNI", policy="stale", seconds=6.0, bpb=2.0, purpose=LENGTH, steps=150, seconds_to_100=6.0),
        a_row("GPipe", refused="one | reason", curve=[], final_bpb=None, seconds=1.0),
    ]
    heading, _, _, baseline, stale, refused = [line for line in markdown(with_marks(rows, 4)).splitlines() if line]
    assert heading == (
        "### cpu, a processor: 2 stages of 1 block, width 64, 1.5 M parameters, float32, AdamW, "
        "batches of 8 x 16 bytes, seed 0"
    )
    assert baseline.split(" | ")[3:7] == ["80.0", "80.0, 82.0", "2.0000", "+0.0%"]
    assert stale.split(" | ")[5:9] == ["2.2000", "+10.0%", "1.9000", "-5.0%"]
    assert stale.split(" | ")[11:14] == ["6.0", "150", "0.75"]
    assert refused == "GPipe, M = 4, refused: one | reason"
    draw_curves(with_marks(rows, 4), tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no run with a curve"):
        draw_curves([rows[-1]], tmp_path / "b.png")


def _racer(world: int, schedule: str) -> tuple[Racer, Validation]:
    task = Task(Workload(world, 2, 64, 16, 256, 4, torch.float32), "AdamW", None, None, 5)
    text = torch.arange(4000).remainder(251).to(torch.uint8)
    corpus, device = ByteCorpus(text, text[1000:2000]), torch.device("cpu")
    racer = Racer(Plan(Entry(schedule), 4, 1e-3, 2, 0, 0), task, corpus, device)
    return racer, Validation(task, corpus, device, most_at_once=2)


def _whole(rank: int, world: int, schedule: str) -> tuple[float, float]:
    """What the validation says of a model in parts, before and after two steps."""
    racer, validation = _racer(world, schedule)
    first = validation.bpb(racer)
    racer.seconds(range(2))
    racer.settle()
    return first, validation.bpb(racer)


def test_the_validation_is_that_of_the_whole_model_however_it_is_cut() -> None:
    told = {schedule: run_ranks(2, _whole, schedule) for schedule in ("1F1B", "ZBVZeroBubble")}
    (model,) = Workload(2, 2, 64, 16, 256, 4, torch.float32).chunks([0], 1, torch.device("cpu"))
    text = torch.arange(4000).remainder(251)[1000:2000]
    starts = [16 * (62 // 5) * number for number in range(5)]
    window = torch.stack([text[start : start + 17] for start in starts])
    expected = token_loss(model(window[:, :-1]), window[:, 1:]).item() / math.log(2)
    for ranks in told.values():
        assert ranks[0] == ranks[1]
        assert ranks[0][0] == pytest.approx(expected, rel=1e-6)
        assert ranks[0][1] < ranks[0][0] - 0.1
    # gradients are clipped by their norm on a rank, and the ranks have other parts
    assert told["1F1B"][0][1] == pytest.approx(told["ZBVZeroBubble"][0][1], rel=0.01)


def _clocked(rank: int, world: int) -> tuple[float, float]:
    racer, _ = _racer(world, "1F1B")

    def step(number: int) -> None:
        time.sleep(1.0 if number == 0 else 0.05 * (1 + rank))

    racer.step = step  # type: ignore[method-assign]
    return racer.seconds(range(4)), racer.seconds(range(4, 6))


def test_the_clock_is_that_of_the_slowest_rank_and_leaves_out_what_the_first_step_takes() -> None:
    first, other = run_ranks(2, _clocked)
    assert first == other, "all ranks choose by the same seconds"
    assert 0.4 <= first[0] < 1.0 and 0.2 <= first[1] < 0.5


@pytest.mark.timeout(300)
def test_a_race_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.json"
    options = (
        f"{TINY} --steps 8 --microbatches 2 --best-microbatches 2,4 --learning-rates 1e-3,2e-3 --search-steps 4 "
        f"--lengths 1.25,1.0 --seeds 3 --optimizer Muon"
    )
    assert time_to_loss.main([*options.split(), "--json", str(path)]) == 0
    rows = read_rows_of(LossRow, path)
    refused = [row for row in rows if row.refused is not None]
    assert [(row.label, row.refused) for row in refused] == [
        ("ZBVZeroBubble", "2 blocks cannot be cut into 4 equal parts: change --blocks")
    ]
    given = [row for row in rows if row.microbatches == 2 and row.refused is None]
    labels = ["1F1B", "DNI synthetic local_head", "DNI stale", "DNI corrected local_head", "GPipe"]
    for purpose, expected in (
        (SEARCH, [label for label in labels[:4] for _ in range(2)]),
        (EQUAL_STEPS, labels),
        (LENGTH, labels[1:4]),
        (EQUAL_TIME, labels[1:]),
    ):
        assert [row.label for row in given if row.purpose == purpose] == expected
    by_label = {row.label: row for row in given if row.purpose == EQUAL_STEPS}
    assert by_label["GPipe"].final_bpb == pytest.approx(by_label["1F1B"].final_bpb, rel=1e-5)
    assert by_label["1F1B"].time_to_1f1b_ratio == pytest.approx(1.0)
    assert {row.steps for row in given if row.purpose == LENGTH} == {10}
    for row in given:
        if row.purpose == EQUAL_TIME:
            assert row.steps == round(8 * by_label["1F1B"].seconds / by_label[row.label].seconds)
    assert all(row.own_microbatches in (2, 4) for row in given)
    for row in rows:
        if row.refused is None:
            assert (
                row.steps == row.curve[-1][0] and row.seconds == row.curve[-1][1] and row.final_bpb == row.curve[-1][2]
            )
            assert row.step_ms == pytest.approx(row.seconds / row.steps * 1e3)
            assert row.before_ms is not None and row.after_ms is not None and row.peak_bytes is None
            unlock = 1 if row.purpose == SEARCH else round(0.1 * row.steps)
            assert row.unlock_after_steps == (unlock if row.schedule == "DNI" else None)
            assert (row.seed, row.optimizer, row.measured) == (3, "Muon", True)
            searched = [each for each in rows if each.purpose == SEARCH and each.contender == row.contender]
            if searched and row.purpose == EQUAL_STEPS:
                best = min(searched, key=lambda each: each.final_bpb or math.inf)
                assert row.learning_rate == best.learning_rate
    assert sorted(each.name for each in path.parent.iterdir()) == ["rows.json", "rows.md", "rows.png"]
    assert "DNI stale, M = 2, seed 3: equal time" in capfd.readouterr().out


@pytest.mark.timeout(200)
def test_each_way_of_late_weights_is_a_contender_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = (
        f"{TINY} --steps 8 --microbatches 2 --policies synthetic,stale --schedules= --best-microbatches= --seeds 3 "
        f"--unlock-after-steps 0 --learning-rates 8e-3,2e-3 --search-steps 4 --no-equal-time --late-weights"
    )
    assert time_to_loss.main([*options.split(), "predicted,predicted*3,new", "--json", str(path)]) == 0
    rows = read_rows_of(LossRow, path)
    equal = [row for row in rows if row.purpose == EQUAL_STEPS]
    assert [(row.label, row.late_weights) for row in equal] == [
        ("1F1B", None), ("DNI synthetic local_head", None), ("DNI stale", "predicted"),
        ("DNI stale predicted*3", "predicted*3"), ("DNI stale new", "new"),
    ]  # fmt: skip
    assert len({row.final_bpb for row in equal}) == 5, "no two went by the same weights"
    for row in equal:  # each by the best of its own search
        searched = [each for each in rows if each.purpose == SEARCH and each.contender == row.contender]
        assert [each.learning_rate for each in searched] == [8e-3, 2e-3]
        assert row.learning_rate == min(searched, key=lambda each: each.final_bpb or math.inf).learning_rate
    assert "| DNI stale predicted*3 |" in path.with_suffix(".md").read_text()


def test_rows_of_before_there_was_a_choice_of_late_weights_still_load(tmp_path: Path) -> None:
    path, row = tmp_path / "rows.json", asdict(a_row("DNI", policy="stale"))
    del row["late_weights"]
    path.write_text(json.dumps([row]))
    (loaded,) = read_rows_of(LossRow, path)
    assert (loaded.label, loaded.late_weights) == ("DNI stale", None)


@pytest.mark.timeout(200)
def test_a_run_that_diverges_ends_there_and_has_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = f"{TINY} --steps 9 --policies= --schedules= --best-microbatches= --learning-rates 1e30"
    assert time_to_loss.main([*options.split(), "--json", str(path)]) == 0
    (row,) = read_rows_of(LossRow, path)
    assert (row.label, row.final_bpb, row.seconds_to_50, row.time_to_1f1b_ratio) == ("1F1B", None, None, None)
    assert len(row.curve) < 3 and row.steps == 9 and row.step_ms is not None


@pytest.mark.timeout(200)
def test_what_there_is_no_time_for_is_named_and_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    options = f"{TINY} --steps 3 --policies stale --schedules ZBVZeroBubble --best-microbatches= --limit-s 0"
    assert time_to_loss.main([*options.split(), "--learning-rates", "1e-3", "--json", str(path)]) == 0
    assert [row.label for row in read_rows_of(LossRow, path)] == ["ZBVZeroBubble"], "the refused one"
    said = [line for line in capfd.readouterr().err.splitlines() if "left out" in line]
    assert said[0] == "left out, for --limit-s 0 is used up: 1F1B, M = 4, seed 0: equal steps, 3 steps at 0.001"
    assert len(said) == 4 and not path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--unlock-after-steps -1", "--unlock-after-steps must be at least 0, got -1"),
        ("--in-flight 4", "in_flight must be from 2 to 3 microbatches for 2 stages, got 4"),
        ("--width 100", "--width must be a multiple of 64, got 100"),
        ("--microbatches 3", "--batch-size 8 is no multiple of 3 microbatches"),
        ("--best-microbatches 4,x", "--best-microbatches is a list of numbers such as 1,2,4, got '4,x'"),
        ("--learning-rates 1e-3,0", "--learning-rates must be above 0 each, got '1e-3,0'"),
        ("--lengths long", "--lengths is a list of numbers such as 0.9,1.15, got 'long'"),
        ("--seeds -1", "--seeds is a list of numbers from 0 on such as 0,1, got '-1'"),
        ("--policies late", "--policies late: choose of synthetic, stale, corrected"),
        ("--schedules 2F2B", "--schedules 2F2B: choose of GPipe, 1F1B, "),
        (
            "--late-weights predicted,predicted*0",
            "--late-weights predicted,predicted*0: unknown late_weights 'predicted*0'",
        ),
        (
            "--late-weights predicted*2,",
            "unknown late_weights '': choose one of predicted, old, new, or predicted*FACTOR or",
        ),
        ("--transports direct", "--transports direct: choose of group"),
        ("--interfaces magic", "unknown interface 'magic'"),
        ("--data /nowhere", "there is no file or folder /nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = arguments.split()
    assert time_to_loss.main([f"{name}={value}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
