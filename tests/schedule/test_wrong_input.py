"""Wrong input is refused with the value, the rule and the cure, before anything is sent."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from tests.ranks import run_ranks
from tests.schedule import models

CPU = torch.device("cpu")


def _message(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _stage(rank: int, world: int, num_stages: int | None = None) -> PipelineStage:
    return PipelineStage(models.build("mlp", world)[rank], rank, num_stages or world, CPU)


def _constructor(rank: int, world: int) -> list[str]:
    stage = _stage(rank, world)
    adam = torch.optim.Adam(Short().parameters())
    return [
        _message(lambda: ScheduleDNI(_stage(rank, world, 4), 2, models.loss_fn)),
        _message(lambda: ScheduleDNI(stage, 0, models.loss_fn)),
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, policy="hope")),
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, lag=0)),
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, unlock_after_steps=-1)),
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, labels="telepathy")),
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, check_every_steps=-1)),
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, timeout_s=0.0)),
        _message(lambda: ScheduleDNI(stage, 2.0, models.loss_fn)),  # type: ignore[arg-type]
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, interface=Short)),  # type: ignore[arg-type]
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, interface=nn.Linear(4, 4))),
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, interface_optimizer=adam)),  # type: ignore[arg-type]
        _message(lambda: ScheduleDNI(stage, 2, models.loss_fn, forward_unlocked=True)),  # type: ignore[arg-type]
    ]


def test_the_constructor_names_value_rule_and_cure() -> None:
    for messages in run_ranks(2, _constructor):
        assert messages == [
            "ScheduleDNI runs one stage per rank: num_stages is 4, its group has 2 ranks; start 4 ranks, or split the "
            "model into 2 stages",
            "n_microbatches must be at least 1, got 0",
            "unknown policy 'hope': choose one of auto, corrected, stale, synthetic, wait",
            "lag must be at least 1 microbatch, got 0: gradient t - lag travels beside activation t",
            "unlock_after_steps must be at least 0 steps, got -1",
            "unknown labels 'telepathy': choose one of auto, local, relay, none",
            "check_every_steps must be at least 0 steps (0: never), got -1",
            "timeout_s must be more than 0 seconds, got 0.0",
            "n_microbatches must be a whole number, got 2.0",
            f"interface takes a name, or a module that is called as module(activation, label), got {Short!r}: build an "
            "object of a class, make a function the forward() of a torch.nn.Module",
            "interface Linear: forward(input) cannot be called as forward(activation, label): give it a second "
            "argument, which is None where there are no labels",
            "interface_optimizer is called with the parameters of the predictors, which are built later, got an object "
            "of Adam: pass functools.partial(torch.optim.Adam, lr=3e-3)",
            "forward_unlocked takes an object, got True: pass ForwardUnlocked(window=8), or None",
        ]


def _uneven(rank: int, world: int) -> str:
    schedule = ScheduleDNI(_stage(rank, world), 4, models.loss_fn)
    x, y = models.batch("mlp", 0, 10)
    return _message(lambda: schedule.step(*((x,) if rank == 0 else ()), target=y))


def test_a_batch_that_does_not_split_evenly_is_refused_on_every_rank_that_sees_it() -> None:
    first, last = run_ranks(2, _uneven)
    cure = "use a batch size that is a multiple of n_microbatches"
    split = "of 10 rows does not split into 4 equal microbatches (rows [3, 3, 2, 2])"
    assert first == f"stage 0: input {split}: {cure}"
    assert last == f"stage 1: target {split}: {cure}"


def _short_label(rank: int, world: int) -> str:
    loss = lambda output, target: models.loss_fn(output[: len(target)], target)  # noqa: E731
    schedule = ScheduleDNI(_stage(rank, world), 2, loss, policy="synthetic", labels="local")
    x, y = models.batch("mlp", 0, 8)
    return _message(lambda: schedule.step(*((x,) if rank == 0 else ()), target=y[:6]))


def test_a_label_of_another_length_is_refused_on_every_rank() -> None:
    message = (
        "rank 0: the label of one microbatch has shape (3,), the activation (4, 12): target= must hold one row for "
        "each row of the input, or pass labels='none'"
    )
    assert run_ranks(2, _short_label) == [message] * 2


class Short(nn.Module):
    """A predictor that loses a column."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        return self.scale * h[:, 1:]


def _bad_interface(rank: int, world: int) -> str:
    schedule = ScheduleDNI(
        _stage(rank, world), 2, models.loss_fn, interface=Short() if rank == 0 else None, policy="synthetic"
    )
    x, y = models.batch("mlp", 0, 8)
    if rank == 0:
        return _message(lambda: schedule.step(x, target=y))
    try:
        for _ in range(3):
            schedule.step(target=y)
    except RuntimeError as error:
        return type(error).__name__
    return "nothing was lost"


def test_an_interface_whose_output_has_another_shape_is_refused_and_the_neighbour_hears_of_it() -> None:
    first, last = run_ranks(2, _bad_interface)
    assert first == (
        "interface Short returned shape (4, 11) for an activation of shape (4, 12): a synthetic gradient must have the "
        "activation's shape"
    )
    assert last == "BoundaryError"


def _unlike(rank: int, world: int) -> str:
    schedule = ScheduleDNI(_stage(rank, world), 2, models.loss_fn, policy="synthetic", lag=1 + rank)
    x, y = models.batch("mlp", 0, 8)
    return _message(lambda: schedule.step(*((x,) if rank == 0 else ()), target=y))


def test_ranks_that_were_told_different_things_all_refuse() -> None:
    assert run_ranks(2, _unlike) == ["policy must be the same on every rank, got rank 0: lag=1, rank 1: lag=2"] * 2


def _unlike_microbatches(rank: int, world: int) -> str:
    schedule = ScheduleDNI(_stage(rank, world), 4 - 2 * rank, models.loss_fn)
    x, y = models.batch("mlp", 0, 8)
    return _message(lambda: schedule.step(*((x,) if rank == 0 else ()), target=y))


def test_unequal_numbers_of_microbatches_are_refused_before_the_loss_sees_halves_of_two_sizes() -> None:
    message = "n_microbatches must be the same on every rank, got rank 0: 4, rank 1: 2"
    assert run_ranks(2, _unlike_microbatches) == [message] * 2


def _loss_on_the_last_only(rank: int, world: int) -> str:
    schedule = ScheduleDNI(_stage(rank, world), 2, models.loss_fn if rank == 1 else None)
    x, y = models.batch("mlp", 0, 8)
    return _message(lambda: schedule.step(*((x,) if rank == 0 else ()), target=y))


def test_a_rank_that_would_train_beside_one_that_would_not_is_refused_on_both() -> None:
    message = (
        "rank 0 evaluates while rank 1 trains: give loss_fn= on every rank, not on the last alone, and call step() on "
        "all of them or eval() on all"
    )
    assert run_ranks(2, _loss_on_the_last_only) == [message] * 2


class Broken(nn.Module):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        raise ValueError("a fault of the user's own")


def _broken_stage(rank: int, world: int) -> str:
    module = Broken() if rank == 1 else models.build("mlp", world)[rank]
    schedule = ScheduleDNI(PipelineStage(module, rank, world, CPU), 2, models.loss_fn)
    x, y = models.batch("mlp", 0, 8)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(ValueError, RuntimeError):
        schedule.step(*((x,) if rank == 0 else ()), target=y)
    return said.getvalue()


def test_a_rank_whose_neighbour_fails_in_the_first_step_says_where_it_stands_and_where_to_look() -> None:
    first, broken = run_ranks(2, _broken_stage)
    assert re.fullmatch(
        r"\[dnipipe\] rank 0, stage 0 of 2: not through the first step, in which the stages find shapes one after the "
        r"other \(\d+\.\d s\)\. If the error speaks of a connection or a timeout, another rank failed before: look at "
        r"its log first\n",
        first,
    ), first
    assert broken == "", "its own error says it"


def _no_label(rank: int, world: int) -> str:
    schedule = ScheduleDNI(_stage(rank, world), 2, models.loss_fn, policy="synthetic", labels="local")
    x, y = models.batch("mlp", 0, 8)
    args, target = ((x,) if rank == 0 else ()), ({"target": y} if rank == world - 1 else {})
    return _message(lambda: schedule.step(*args, **target))


def test_local_labels_without_a_target_are_refused_on_every_rank() -> None:
    assert (
        run_ranks(3, _no_label)
        == [
            "labels='local' needs target= on every rank but the last, and ranks [0, 1] passed none: pass it there, or "
            "labels='relay' with target= or label_fn= on the first stage"
        ]
        * 3
    )


def _forgotten(rank: int, world: int) -> str:
    schedule = ScheduleDNI(_stage(rank, world), 1, models.loss_fn, policy="synthetic")
    x, y = models.batch("mlp", 0, 4)
    schedule.step(*((x,) if rank == 0 else ()), target=y)
    message = _message(lambda: schedule.step(x)) if rank == 0 else ""
    dist.barrier()  # a rank that ends takes its connections with it, and the other may not be through its step
    return message


def test_a_target_forgotten_at_a_later_step_is_named() -> None:
    assert run_ranks(2, _forgotten)[0] == (
        "stage 0 passed target= at the first step, so its predictor needs one at every step(): pass target=, or "
        "labels='none'"
    )
