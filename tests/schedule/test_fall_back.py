"""Replicas fall back to `wait` together, and what is no divergence leaves the policy as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from dnipipe import ScheduleDNI
from tests.ranks import run_ranks
from tests.schedule import models

CPU = torch.device("cpu")


def _replicas_fall_back(rank: int, world: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = DistributedDataParallel(models.build("mlp", 2)[stage], process_group=mesh["dp"].get_group())
    factor = 1.0
    schedule = ScheduleDNI(
        PipelineStage(module, stage, 2, CPU, group=mesh["pp"].get_group()),
        2,
        lambda output, target: models.loss_fn(output, target) * factor,
        policy="synthetic",
        check_every_steps=4,
    )
    optimizer, policies = models.optimizer(module), []
    for step in range(12):
        factor = 30.0 if step > 4 and replica == 1 else 1.0
        x, y = models.batch("mlp", step, 8)
        schedule.step(*((x,) if stage == 0 else ()), target=y)
        optimizer.step()
        optimizer.zero_grad()
        policies.append(str(schedule.metrics["policy"]))
    return policies


def test_all_replicas_fall_back_when_one_diverges() -> None:
    """One pipeline went to `wait` alone, and its flush met another collective of its replicas: a crash."""
    for policies in run_ranks(4, _replicas_fall_back):
        assert policies == ["synthetic"] * 7 + ["wait"] * 5


def _odd_losses(rank: int, world: int, kind: str) -> list[str]:
    step = 0

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = models.loss_fn(output, target)
        if kind == "negative":
            return loss - 10.0
        return loss * (float("nan") if step == 1 else 1.0)

    module = models.build("mlp", world)[rank]
    schedule = ScheduleDNI(
        PipelineStage(module, rank, world, CPU),
        2,
        loss_fn,
        policy="synthetic",
        unlock_after_steps=3,
        check_every_steps=4,
    )
    policies = []
    for step in range(12):
        x, y = models.batch("mlp", step, 8)
        schedule.step(*((x,) if rank == 0 else ()), target=y)
        policies.append(str(schedule.metrics["policy"]))
    return policies


@pytest.mark.parametrize("kind", ["negative", "one that is not a number"])
def test_a_negative_loss_or_a_single_nan_is_no_divergence(kind: str) -> None:
    for policies in run_ranks(2, _odd_losses, kind):
        assert policies == ["wait"] * 2 + ["synthetic"] * 10
