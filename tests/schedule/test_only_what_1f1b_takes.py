"""The arguments of Schedule1F1B are enough: what is chosen from them is said once, and it learns."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from dnipipe.interface import MLP
from dnipipe.schedule import preparation
from dnipipe.schedule.choose import choose_policy
from tests.ranks import run_ranks
from tests.schedule import models

CPU = torch.device("cpu")


def _plain(rank: int, world: int, kind: str, tell: str, steps: int = 6, m: int = 2, **options: Any) -> tuple[str, list]:
    """Only what Schedule1F1B takes, and what `options` adds. tell: which ranks pass target=. Returns stderr, losses."""
    module = models.build(kind, world)[rank]
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), n_microbatches=m, loss_fn=models.loss_fn, **options)
    optimizer, means = models.optimizer(module), []
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        for _ in range(steps):
            x, y = models.batch(kind, 0, 4 * m)
            told = tell == "all" or rank == world - 1 or (tell == "first" and rank == 0)
            losses: list[Tensor] = []
            output = schedule.step(*((x,) if rank == 0 else ()), **({"target": y} if told else {}), losses=losses)
            optimizer.step()
            optimizer.zero_grad()
            means += [sum(float(loss.detach()) for loss in losses) / m] if losses else []
            assert (output is not None) == (rank == world - 1)
    return said.getvalue(), means


def _plain_with_hooks(rank: int, world: int, kind: str, tell: str) -> tuple[str, list]:
    """A hook on the parameters keeps `auto` from holding graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "why_no_graphs", lambda module: "it has a hook")
        return _plain(rank, world, kind, tell)


def test_the_constructor_of_1f1b_is_enough_and_says_once_what_was_chosen() -> None:
    (said, _), (silence, losses) = run_ranks(2, _plain, "mlp", "all")
    assert said == (
        "[dnipipe] DNI over 2 stages, 2 microbatches: policy wait for 300 steps, then stale, in flight by stage 2, 1; "
        f"interfaces by stage: none (labels none). Chosen by auto: {choose_policy(2, 2, None)[1]}\n"
    )
    assert silence == "" and losses[-1] < losses[0]


def _unlocked(rank: int, world: int, kind: str, tell: str) -> tuple[str, list]:
    return _plain(rank, world, kind, tell, steps=40, policy="wait:5,synthetic")


def test_it_learns_when_only_the_last_rank_gets_a_target_as_in_torchs_tutorial() -> None:
    (said, _), (_, losses) = run_ranks(2, _unlocked, "mlp", "last")
    assert "interfaces by stage: mlp (labels none)" in said
    assert f"predictors begin at their own rates, here MLP at {MLP(models.D).learning_rate:g}\n" in said
    assert losses[-1] < 0.6 * losses[0]


def test_it_learns_when_the_first_rank_alone_adds_its_target() -> None:
    (said, _), _, (_, losses) = run_ranks(3, _unlocked, "sequence", "first")
    assert "interfaces by stage: local_head, local_head (labels relay, 7 classes)" in said
    assert losses[-1] < 0.8 * losses[0]


def _own_optimizer(rank: int, world: int) -> str:
    return _plain(rank, world, "mlp", "all", policy="synthetic", interface_optimizer=models.interface_optimizer)[0]


def test_with_an_optimizer_of_the_users_nothing_is_said_of_rates() -> None:
    said, _ = run_ranks(2, _own_optimizer)
    assert "interfaces by stage: local_head" in said and "rates" not in said


def test_a_sequence_without_labels_stays_at_wait_and_says_what_to_pass() -> None:
    (said, _), (_, losses) = run_ranks(2, _plain_with_hooks, "sequence", "last")
    assert "stays at policy wait" in said and "pass target= on every rank, or label_fn= on the first stage" in said
    assert losses[-1] < losses[0]
