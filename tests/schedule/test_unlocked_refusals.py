"""What forward_unlocked refuses, on every rank alike or before anything is sent, with value, rule and cure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from dnipipe import ScheduleDNI
from dnipipe.interface import TensorMeta
from dnipipe.schedule import ForwardUnlocked
from dnipipe.schedule.facts import Facts
from dnipipe.schedule.forward_unlocked import check_unlocked
from dnipipe.schedule.policy import Policy
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.facts import LONG, ROW, ROWS, TOKENS, B, D, T, refusal, stages

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"window": 0}, "window must be at least 1 microbatch, got 0: at 0 nothing is unlocked"),
        ({"window": 2.5}, "window must be at least 1 microbatch, got 2.5"),
        ({"patience_s": -0.5}, "patience_s must be at least 0 seconds, and finite, got -0.5"),
        ({"patience_s": float("inf")}, "patience_s must be at least 0 seconds, and finite, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ForwardUnlocked(**options)


@pytest.mark.parametrize("name", ["auto", "wait", "stale", "corrected", "wait:5,stale", "synthetic:5,wait:5,corrected"])
def test_a_policy_without_synthetic_gradients_or_with_held_graphs_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="goes with synthetic gradients.*choose policy='synthetic' or 'wait:200,synth"):
        check_unlocked(ForwardUnlocked(), Policy(name), 3, 2)
    check_unlocked(ForwardUnlocked(), Policy("wait:5,synthetic:5,wait"), 3, 2)


@pytest.mark.parametrize("start", [(0, 3, 1), (3, 3, 1), (1, -1, 1), (1, 3, 2), (1, 3, -1)])
def test_a_start_that_there_is_not_is_refused(start: tuple[int, int, int]) -> None:
    said = re.escape(f"late names {start}: it takes (stage, step, microbatch) with a stage from 1 to 2, a step from 0")
    with pytest.raises(ValueError, match=said):
        check_unlocked(ForwardUnlocked(late=[start]), Policy("wait:2,synthetic"), 3, 2)


def test_a_start_under_wait_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("late names (2, 1, 0), but step 1 is under policy 'wait'")):
        check_unlocked(ForwardUnlocked(late=[(2, 1, 0)]), Policy("wait:2,synthetic"), 3, 2)


def _unlocked(net_inputs: Sequence[TensorMeta | None], unlocked: ForwardUnlocked, **common: Any) -> list[Facts]:
    facts, told = stages("T" * len(net_inputs), **common), unlocked.agreed
    return [replace(fact, forward_unlocked=told, net_input=x) for fact, x in zip(facts, net_inputs, strict=True)]


X = TensorMeta((B, 5), torch.float32)


def test_ranks_without_the_nets_input_are_named() -> None:
    said = refusal(_unlocked([X, X, None], ForwardUnlocked()))
    assert said == (
        "rank 12 (stage 2) got no input: under forward_unlocked every rank passes the net's input, a tensor, as in "
        "schedule.step(x, target=y), since synthetic inputs are made from it"
    )


def test_a_first_stage_that_gets_its_input_by_keyword_is_named() -> None:
    assert refusal(_unlocked([None, X], ForwardUnlocked())).startswith("rank 10 (stage 0) got no input")


def test_settings_must_agree() -> None:
    first, second = _unlocked([X, X], ForwardUnlocked(window=3))
    other = ForwardUnlocked(window=4).agreed
    said = refusal([first, replace(second, forward_unlocked=other)])
    assert said.startswith("forward_unlocked must be the same on every rank") and "window=3" in said


def test_labels_that_travel_with_late_activations_are_refused() -> None:
    assert "pass target= on every rank, or labels='none'" in refusal(
        _unlocked([X, X], ForwardUnlocked(), labels="relay")
    )


@pytest.mark.parametrize(
    "net_input, hidden, said",
    [
        (TensorMeta(TOKENS, LONG), (B, T, D), "forward_unlocked, stage 1: num_tokens = 0: an input of integers"),
        (TensorMeta((2 * B, 5), torch.float32), ROW, "stage 1: a synthetic input predicts floating-point activations"),
    ],
)
def test_an_input_that_nothing_can_be_made_of_is_refused(
    net_input: TensorMeta, hidden: tuple[int, ...], said: str
) -> None:
    label = TensorMeta(hidden[:-1], LONG) if len(hidden) == 3 else TensorMeta(ROWS, LONG)
    assert said in refusal(_unlocked([net_input] * 2, ForwardUnlocked(), hidden=(hidden,), label=label))


def test_one_model_for_two_tensors_is_refused() -> None:
    facts = [replace(fact, has_input_model=True) for fact in _unlocked([X, X], ForwardUnlocked(), hidden=(ROW, ROW))]
    assert "stage 1 receives 2 tensors, and model= predicts one: leave model out" in refusal(facts)


def _message(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _without_input(rank: int, world: int) -> list[str]:
    """The first step without it on stage 1, corrected; then a later step without."""
    stage = PipelineStage(models.build("mlp", world)[rank], rank, world, CPU)
    schedule = ScheduleDNI(stage, 2, models.loss_fn, policy="synthetic", forward_unlocked=ForwardUnlocked())
    x, y = models.batch("mlp", 0, 8)
    said = [_message(lambda: schedule.step(*((x,) if rank == 0 else ()), target=y))]
    schedule.step(x, target=y)
    if rank == 1:
        said.append(_message(lambda: schedule.step(target=y)))
    schedule.step(x, target=y)
    return said


def test_every_rank_refuses_where_one_has_no_input_and_goes_on_when_it_has() -> None:
    first, second = run_ranks(2, _without_input)
    assert len(first + second) == 3
    assert all(each.startswith("rank 1 (stage 1) got no input: under forward_unlocked") for each in first + second)


class _Two(nn.Module):
    """Two inputs, two outputs, but for the ends."""

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last, self.linear = first, last, nn.Linear(models.D, models.D)
        self.head = nn.Linear(models.D, models.V) if last else None

    def forward(self, x: torch.Tensor, second: torch.Tensor | None = None) -> Any:
        h = self.linear(x) + (0 if second is None else second)
        return self.head(h) if self.head is not None else (h, h.tanh())


def _two_tensors(rank: int, world: int) -> int:
    """Several activations have a model each, which the stage builds by itself."""
    torch.manual_seed(rank)
    stage = PipelineStage(_Two(rank == 0, rank == world - 1), rank, world, CPU)
    late = [(stage, step, 1) for stage in range(1, world) for step in range(2, 6)]
    unlocked = ForwardUnlocked(window=2, late=late)
    schedule = ScheduleDNI(stage, 2, models.loss_fn, policy="synthetic", forward_unlocked=unlocked)
    for step in range(6):
        x, y = models.batch("mlp", step, 8)
        schedule.step(x, target=y)
        assert all(each.grad.isfinite().all() for each in stage.submod.parameters() if each.grad is not None)
    learner = schedule._flow.input_learner  # type: ignore[union-attr]
    return 0 if learner is None else len(learner.interfaces)


def test_each_of_several_activations_has_a_model_of_its_own() -> None:
    assert run_ranks(3, _two_tensors) == [0, 2, 2]
