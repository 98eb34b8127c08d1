"""What a rank knows of the run: the true loss, its predictors, where it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.schedule.harness import Case, Pipeline


def _metrics(rank: int, world: int) -> tuple[list[dict[str, Any]], list[float], list[str]]:
    """Metrics after each step, the mean loss of each step on the last rank, and where the rank said that it stands."""
    case = Case(m=3, lag=2, unlock_after_steps=3)
    pipeline = Pipeline(rank, world, case)
    metrics, said = [], [pipeline.schedule.dump_state()]
    for step in range(9):
        pipeline.step(step)
        metrics.append(pipeline.schedule.metrics)
    said.append(pipeline.schedule.dump_state())
    by_step = [pipeline.losses[i : i + case.m] for i in range(0, len(pipeline.losses), case.m)]
    return metrics, [float(torch.stack(losses).double().mean()) for losses in by_step], said


def test_every_rank_knows_the_true_loss_and_the_step_that_it_is_of() -> None:
    ranks = run_ranks(3, _metrics)
    means = ranks[-1][1]
    for rank, (metrics, _, _) in enumerate(ranks):
        assert [each["step"] for each in metrics] == list(range(1, 10))
        assert [each["policy"] for each in metrics] == ["wait"] * 2 + ["synthetic"] * 7
        for step, each in enumerate(metrics):
            late = 0 if rank == 2 else 1 if step < 3 else 2
            assert step - late <= each["loss_step"] <= step
            if each["loss_step"] >= 0:
                assert each["loss"] == pytest.approx(means[int(each["loss_step"])], rel=1e-12)
            else:
                assert step == 0 and rank < 2, "once a loss has arrived there always is one"
        if rank < 2:
            assert -1.0 <= metrics[-1]["cosine"] <= 1.0 and metrics[-1]["in_flight"] == 2
        assert metrics[-1]["wait_s"] > 0.0


def test_dump_state_says_where_a_rank_stands() -> None:
    before, after = run_ranks(3, _metrics)[1][2]
    assert before == "[dnipipe] rank 1, stage 1 of 3: not started"
    assert after.startswith(
        "[dnipipe] rank 1, stage 1 of 3: step 9 (synthetic), microbatch 27 forward, 27 backward; "
        "pending true gradients [25, 26]; exchanges under way with the previous stage [27, 28], waited "
    )
