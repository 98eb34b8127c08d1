"""fp16 with its loss scale, on the CPU: torch computes in it there, though DeepSpeed says that a CPU cannot."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from dnipipe.deepspeed import loss_scale
from tests.deepspeed import jobs
from tests.deepspeed.jobs import RESTORING, Job
from tests.ranks import run_ranks

FIRST_SCALE = 2.0**26
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 26, "hysteresis": 1, "loss_scale_window": 10}}
"""A first loss scale so large that the first batches overflow, and a window so short that it moves on soon."""


def _build(job: Job) -> Any:
    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float, torch.half, torch.bfloat16]
    jobs.start()
    return jobs.build(job)


def _outcome(job: Job) -> tuple[Any, ...]:
    engine, scales = _build(job), []
    data = jobs.batches(1, torch.float16)
    losses = []
    for _ in range(20):
        losses += jobs.train(engine, 1, data)
        scales.append(engine._get_optimizer_loss_scale())
    return losses, scales, jobs.weights(engine)


def _both(rank: int, world: int, job: Job) -> list[bool]:
    plain, ours = _outcome(replace(job, block=None)), _outcome(replace(job, block=RESTORING))
    return [plain[0] == ours[0], plain[1] == ours[1], *map(torch.equal, plain[2], ours[2])]


@pytest.mark.parametrize("zero", [0, 1])
def test_wait_equals_plain_bit_for_bit(zero: int) -> None:
    assert all(all(same) for same in run_ranks(2, _both, Job(2, zero, 2, options=FP16)))


def _sizes(rank: int, world: int, job: Job) -> tuple[list[float], dict[int, float], list[float]]:
    """The scale after each batch; of the gradients that crossed, by microbatch, the largest entry without its scale;
    the losses."""
    engine = _build(job)
    flow, scales, sizes = engine.flow, [], {}
    give, data = flow.give, jobs.batches(1, torch.float16)

    def gave(grads: Any) -> None:
        sizes[flow._answered] = float(grads[0].abs().max()) / flow.grad_scale() if grads else 0.0
        give(grads)

    flow.give = gave
    losses = jobs.train(engine, 1, data)
    if flow.learner is not None:
        learn = flow.learner.learn

        def learned(hs: Any, label: Any, grads: Any) -> None:
            sizes[int(flow.down.news[0])] = float(grads[0].abs().max())
            learn(hs, label, grads)

        flow.learner.learn = learned
    for _ in range(60):
        scales.append(engine._get_optimizer_loss_scale())
        losses += jobs.train(engine, 1, data)
    return scales, sizes, losses


def test_each_stage_has_a_scale_of_its_own_and_gradients_say_in_which_they_are() -> None:
    block = {"policy": "synthetic", "interface_learning_rate": 5e-3, "interface": "mlp"}
    first, last = run_ranks(2, _sizes, Job(2, 1, 2, block, options=FP16))
    assert any(one != other for one, other in zip(first[0], last[0], strict=True)), "the scales never differ"
    compared = 0
    for microbatch, size in first[1].items():
        if 0.0 < size and last[1][microbatch] < float("inf"):
            assert size == pytest.approx(last[1][microbatch], rel=1e-2)
            compared += 1
    assert compared > 50
    assert last[0][0] < FIRST_SCALE, "the first batch overflows"
    assert sum(last[2][-10:]) < sum(last[2][:10])


def test_the_loss_scale_that_plain_deepspeed_forgets_is_told() -> None:
    engine = type("Engine", (), {"fp16_enabled": lambda self: True, "optimizer": object()})()
    assert loss_scale.loss_scale_of(engine) == 1.0
    with pytest.warns(RuntimeWarning, match="does not multiply the loss by its loss scale"):
        loss_scale.check_loss_scale(engine)


def _warned(rank: int, world: int, job: Job) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _build(job)
    return [str(each.message) for each in caught if "loss scale" in str(each.message)]


@pytest.mark.parametrize("zero", [0, 1])
def test_an_engine_warns_of_it_with_zero_0_alone(zero: int) -> None:
    first, last = run_ranks(2, _warned, Job(2, zero, 2, RESTORING, options=FP16))
    assert (len(first), len(last)) == (1 if zero == 0 else 0, 0), first
