"""The report finds what is missing or impossible, and says what was asked beside what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claims, planned
from benchmarks.link_rows import LinkRow
from benchmarks.multi_gpu_check import CASES, CheckRow
from benchmarks.multi_gpu_report import main, memory, wrong_checks, wrong_links, wrong_rows
from benchmarks.rows import Row, with_ratios, write_rows
from tests.benchmarks.test_rows import a_row

LINK = LinkRow("cuda", "a card", "nccl", 0, 1, 12.0, 8, 0.1, 0.08, 64, 200.0, True, None)
CHECKS = [
    CheckRow("cuda", "a card", 4, transport, policy, m, name, 8, 1e-6, 1e-4)
    for transport in ("group", "direct")
    for policy, m, name in CASES
]


def on_gpus(schedule: str, m: int, step_ms: float, **changes: Any) -> Row:
    """Four stages of 1 ms forward and 2 ms backward. changes: of the row."""
    own = dict(
        device="cuda", microbatches=m, step_ms=step_ms, tokens_per_s=m / step_ms, utilisation=3 * m / step_ms,
        bound=1.0, peak_bytes=800, peak_bytes_by_rank=[800, 700, 600, 500], activation_bytes=400, forward_ms=1.0,
        backward_ms=2.0, transfer_ms=0.0, optimizer_ms=0.0, interface_cost_share=None, interface=None,
    )  # fmt: skip
    return replace(a_row(schedule), **{**own, **changes})


def table() -> list[Row]:
    rows = [on_gpus("GPipe", 4, 24.0, bound=4 / 7), on_gpus("1F1B", 4, 21.0, bound=4 / 7)]
    rows += [on_gpus("1F1B", 12, 45.0, bound=12 / 15), on_gpus("ZBVZeroBubble", 4, 18.0)]
    few = {"policy": "synthetic", "interface": "linear", "interface_cost_share": 0.02, "activation_bytes": 100}
    rows += [on_gpus("DNI", 4, 12.5, **few), on_gpus("DNI", 12, 37.5, **few)]
    return with_ratios(rows)


def test_a_good_run_has_no_fault() -> None:
    assert wrong_links([LINK]) == wrong_checks(CHECKS) == wrong_rows(table(), [4, 12]) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"refused": "failed with RuntimeError on rank 1: no"}, "1F1B, M = 4: failed with RuntimeError on rank 1: no"),
        ({"step_ms": 0.0}, "a step of 0.0 ms"),
        ({"utilisation": 0.7}, "utilisation 0.700 is above what theory allows, 0.571"),
        ({"peak_bytes_by_rank": [1, 2]}, "peak memory of 4 ranks is [1, 2]"),
        ({"activation_bytes": -5}, "activations of -5 bytes"),
    ],
)
def test_a_number_that_cannot_be_is_named(changes: dict[str, Any], said: str) -> None:
    row = replace(on_gpus("1F1B", 4, 21.0, bound=4 / 7), **changes)
    (fault,) = wrong_rows([row], [4])
    assert said in fault


def test_memory_that_was_short_and_what_torch_refuses_are_no_faults() -> None:
    rows = [on_gpus("GPipe", 4, 24.0, refused=why) for why in ("out of memory on rank 0: x", "must be a multiple")]
    assert wrong_rows(rows, [4]) == []
    of_dni = on_gpus("DNI", 4, 12.5, refused="must be a multiple")
    assert wrong_rows([of_dni], [4]) == ["throughput: DNI, M = 4: must be a multiple"]


def test_what_is_missing_is_named() -> None:
    assert wrong_rows(table(), [4, 8, 12]) == ["throughput: M = 8 is missing"]
    assert wrong_links([]) and wrong_checks([]) and wrong_rows([], [1])
    assert wrong_checks(CHECKS[:-1]) == [
        f"correctness: only {2 * len(CASES) - 1} cases of {2 * len(CASES)} were checked"
    ]
    assert wrong_links([replace(LINK, intact=False)]) == ["links: 0-1 by nccl changed bytes"]
    assert "wait, M = 4, group differs by 0.5" in wrong_checks([replace(CHECKS[0], worst=0.5), *CHECKS[1:]])[0]


def test_what_is_asked_stands_beside_what_was_measured() -> None:
    found = {claim.asked: claim for claim in claims.claims(table())}
    by_hand = [12 / 12.5, 21 / 12.5, 18 / 12.5, 45 / 37.5, 800 / 800, 100 / 400]
    assert [claim.measured for claim in found.values()] == pytest.approx(by_hand)
    assert all(claim.reached for claim in found.values())
    slower = [replace(row, utilisation=0.9) if row.schedule == "DNI" else row for row in table()]
    assert [claim.reached for claim in claims.claims(slower)] == [False, True, True, True, True, True]
    assert claims.claims([replace(row, stages=2) for row in table()]) == []
    assert "| NOT reached | DNI linear |" in claims.markdown(slower)


def test_memory_at_3s_counts_only_who_needs_no_more_than_1f1b() -> None:
    greedy = on_gpus("DNI", 12, 36.0, policy="stale", peak_bytes=900)
    ratio = next(each for each in claims.claims(with_ratios([*table(), greedy])) if "M = 12: x 1F1B" in each.asked)
    assert ratio.measured == pytest.approx(45 / 37.5) and ratio.by == "DNI linear"
    only = [row for row in table() if row.schedule != "DNI"]
    at_3s = claims.claims(with_ratios([*only, greedy]))[3:5]
    assert [(each.reached, each.by) for each in at_3s] == [(True, "DNI stale"), (False, "DNI stale")]


def test_the_plan_of_a_measured_row_is_the_planners() -> None:
    point = {each.row.label: each for each in planned.points(table()) if each.row.microbatches == 4}
    assert point["1F1B"].utilisation == pytest.approx(4 / 7) and point["1F1B"].ratio == 1.0
    assert point["GPipe"].utilisation == pytest.approx(4 / 7)
    assert point["DNI linear"].utilisation == pytest.approx(1 / 1.02)
    assert point["DNI linear"].ratio == pytest.approx(7 / 4 / 1.02)
    assert "ZBVZeroBubble" not in point  # the planner has ZB-H1, which holds other things
    with_optimizer = planned.points([replace(row, optimizer_ms=3.0) for row in table()])[1]
    assert with_optimizer.utilisation == pytest.approx((12 + 3) / (21 + 3))


def test_memory_is_said_of_each_rank() -> None:
    assert "| DNI linear | 4 | 0.00 0.00 0.00 0.00 | 0 MB | 0.25 |" in memory(table())


def test_a_folder_makes_a_page_and_an_empty_one_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--microbatches", "4"]) == 1
    said = capsys.readouterr().err
    assert all(part in said for part in ("links:", "correctness:", "throughput:"))
    write_rows([LINK], tmp_path / "links.json")
    write_rows(CHECKS, tmp_path / "check.json")
    write_rows(table(), tmp_path / "throughput.json")
    assert main([str(tmp_path), "--microbatches", "4,12"]) == 0
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Several GPUs\n") and page.count("###") == 6
    assert (tmp_path / "planned.png").stat().st_size > 1000
    assert main([str(tmp_path), "--microbatches", "x"]) == 2
