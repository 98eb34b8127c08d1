"""benchmarks.policies: what its texts mean, a tiny real call end to end, what a policy costs, rows set side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import policies
from benchmarks.policy_cost import mean_utilisation
from benchmarks.policy_rows import PolicyRow, lines_of, markdown
from benchmarks.policy_run import Spec
from benchmarks.rows import read_rows_of

TINY = [
    "--steps", "12", "--unlock", "4", "--blocks", "2", "--stages", "2", "--width", "64", "--seq-len", "16",
    "--batch-size", "4", "--eval-sequences", "64", "--max-bytes", "3000000",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[PolicyRow]:
    path = tmp_path_factory.mktemp("policies") / "policies.json"
    runs = ["wait", "stale:M=1,2:seed=0,1", "stale/local_head:M=2:before=synthetic@8"]
    runs.append("corrected/linear:M=2:weights=old")
    assert policies.main([*runs, *TINY, "--json", str(path)]) == 0
    assert path.with_suffix(".md").exists() and path.with_suffix(".png").stat().st_size > 10_000
    return read_rows_of(PolicyRow, path)


def test_every_run_is_a_row_with_its_curve(rows: list[PolicyRow]) -> None:
    assert len(rows) == 7
    for row in rows:
        assert row.steps == row.planned_steps == 12 and row.parameters > 10_000
        assert (
            len(row.curve) == 12
            and row.curve[-1][0] == 12
            and [step for step, _ in row.curve] == sorted(step for step, _ in row.curve)
        )
        assert row.val_bpb is not None and 5 < row.val_bpb < 8.1  # of 8 bits; a few steps have begun to tell bytes
    assert [row.interface_cost_share is not None for row in rows] == [False] * 5 + [True, True]


def test_runs_of_another_policy_or_seed_end_otherwise(rows: list[PolicyRow]) -> None:
    assert len({row.val_bpb for row in rows}) == len(rows)


def test_seeds_are_one_line_beside_backprop_of_the_same_seeds(rows: list[PolicyRow]) -> None:
    lines = {(line.row.label, line.row.microbatches): line for line in lines_of(rows)}
    stale = lines["stale predicted@3 weights", 2]  # by default with AdamW
    assert stale.seeds == 2 and stale.mean == pytest.approx(sum(stale.bpb) / 2)
    assert stale.excess is None  # backprop ran with seed 0 alone
    corrected = lines["corrected linear old weights", 2]
    assert corrected.excess == pytest.approx(corrected.bpb[0] / lines["wait", 1].bpb[0] - 1)
    assert "| wait (backprop) |" in markdown(rows)


def test_a_loss_counts_on_whichever_card_and_backprop_for_any_cut(rows: list[PolicyRow]) -> None:
    wait = next(row for row in rows if row.policy == "wait")
    lines = lines_of([*rows, replace(wait, card="another", stages=8, microbatches=4, seed=1)])
    assert [line.seeds for line in lines if line.row.policy == "wait"] == [2]
    assert next(line for line in lines if line.row.label == "stale predicted@3 weights").excess is not None
    text = markdown([*rows, replace(wait, card="another")])
    assert f"### cpu, {wait.card}; cpu, another: GPT of" in text and text.count("###") == 1


def test_a_row_that_diverged_says_so(rows: list[PolicyRow]) -> None:
    assert "diverged" in markdown([replace(rows[0], val_bpb=None)])


def test_less_text_than_a_run_needs_is_refused_and_not_blamed_on_what_is_installed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert policies.main(["wait", *TINY, "--max-bytes", "1000"]) == 2
    assert "--max-bytes must be at least 1000000, got 1000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "run, says",
    [
        ("late", "unknown policy"),
        ("synthetic", "needs interface"),
        ("stale/linear", "has no interface"),
        ("stale:K=3", "'K=3' is not KEY=VALUE"),
        ("stale:M=3", "must be a multiple"),
        ("stale:M=1:in_flight=9", "in_flight must be"),
        ("stale:opt=Adam", "choose AdamW or Muon"),
        ("stale:M=1:weights=best", "choose one of predicted, old, new"),
        ("stale:M=1:S=3", "from 1 to --blocks 2"),
    ],
)
def test_a_run_that_cannot_be_is_named(run: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert policies.main([run, *TINY, "--json", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


SPEC = Spec("stale", None, "AdamW", 4, 4, 0, None, "predicted", 0, 1e-3)


def test_utilisation_of_a_run_counts_the_synchronous_part_the_transfer_and_the_predictor() -> None:
    assert mean_utilisation(replace(SPEC, policy="wait"), 100, 0.0, 0.0) == pytest.approx(4 / 7)
    assert mean_utilisation(SPEC, 100, 0.0, 0.0) == pytest.approx(1.0)
    half = mean_utilisation(replace(SPEC, unlock_after_steps=50), 100, 0.0, 0.0)
    assert half == pytest.approx(100 / (50 * 7 / 4 + 50))
    # simulated by other code before: .967 and .927 with S - i in flight, .995 with 2 (S - i) - 1
    assert mean_utilisation(SPEC, 100, 0.02, 0.0) == pytest.approx(0.967, abs=0.01)
    assert mean_utilisation(SPEC, 100, 0.05, 0.0) == pytest.approx(0.927, abs=0.02)
    assert mean_utilisation(replace(SPEC, in_flight=7), 100, 0.05, 0.0) == pytest.approx(0.995, abs=0.006)
    predicted = replace(SPEC, policy="synthetic", interface="linear")
    assert mean_utilisation(predicted, 100, 0.0, 0.05) == pytest.approx(1 / 1.05)
    # three of four microbatches of the first stage go backward a second time, two thirds of a slot each
    corrected = replace(SPEC, policy="corrected", interface="linear")
    assert mean_utilisation(corrected, 100, 0.0, 0.0) == pytest.approx(1 / (1 + 0.75 * 2 / 3), rel=1e-3)


def test_a_limit_leaves_the_curve_of_what_it_cuts(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    settings = [*TINY, "--steps", "100000", "--limit-s", "12", "--json", str(path)]
    assert policies.main(["wait", *settings]) == 0
    for row in read_rows_of(PolicyRow, path):
        assert row.steps < row.planned_steps


def test_texts_with_lists_make_one_run_for_each_value() -> None:
    options = policies._parser().parse_args(["wait", "--optimizers", "AdamW,Muon", "--seeds", "0,1"])
    specs = list(policies.parse("stale:M=8,4,1:weights=new", options))
    assert len(specs) == 12 and {spec.late_weights for spec in specs} == {"new"}
    assert {spec.microbatches for spec in specs} == {8, 4, 1}
    assert torch.tensor([spec.learning_rate for spec in specs]).unique().numel() == 1
