"""Pipeline x data parallel on a 2-D mesh: DDP and FSDP2 beside ScheduleDNI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dnipipe import ScheduleDNI
from dnipipe.schedule import replicas
from dnipipe.schedule.replicas import average_grads
from tests.ranks import run_ranks
from tests.schedule import models
from tests.schedule.harness import Case, Oracle

ROWS, M, STEPS = 3, 2, 4


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _replicated(rank: int, world: int, wrapper: str, policy: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage_index, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module: nn.Module = models.build("mlp", 2)[stage_index]
    if wrapper == "ddp":
        module = DistributedDataParallel(module, process_group=mesh["dp"].get_group())
    else:
        module = fully_shard(module, mesh=mesh["dp"])
    schedule = ScheduleDNI(
        PipelineStage(module, stage_index, 2, torch.device("cpu"), group=mesh["pp"].get_group()),
        M,
        models.loss_fn,
        interface=models.interface("mlp", "mlp", True) if stage_index == 0 else None,
        interface_optimizer=models.interface_optimizer,
        policy=policy,
        timeout_s=20.0,
    )
    optimizer = models.optimizer(module)
    for step in range(STEPS):
        x, y = models.batch("mlp", step, 2 * ROWS * M)
        x, y = (each.view(2, M * ROWS, *each.shape[1:])[replica] for each in (x, y))
        schedule.step(*((x,) if stage_index == 0 else ()), target=y)
        optimizer.step()
        optimizer.zero_grad()
    schedule.flush()
    learner = schedule._flow.learner
    predictor = [] if learner is None else [p.detach() for p in learner.interfaces.parameters()]
    return {
        "stage": stage_index,
        "parameters": [_whole(p).numpy() for p in module.parameters()],
        "predictor": [p.numpy() for p in predictor],
    }


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("policy", ["wait", "synthetic"])
def test_replicas_and_their_predictors_stay_equal_and_learn_as_one(wrapper: str, policy: str) -> None:
    ranks = run_ranks(4, _replicated, wrapper, policy)
    for stage in range(2):
        first, second = (each for each in ranks if each["stage"] == stage)
        for name in ("parameters", "predictor"):
            assert all((a == b).all() for a, b in zip(first[name], second[name], strict=True)), name
    assert ranks[0]["predictor"], "stage 0 has a predictor"
    if policy == "wait":
        # one process with the batches of both replicas learns the same weights
        oracle = Oracle(2, Case(m=M, policy="wait", rows=2 * ROWS, interface="mlp"))
        for step in range(STEPS):
            oracle.step(step)
        for each in ranks:
            expected = oracle.reference.stages[each["stage"]].parameters()
            for got, want in zip(each["parameters"], expected, strict=True):
                torch.testing.assert_close(torch.from_numpy(got), want.detach(), rtol=1e-5, atol=1e-6)


LATE_STEPS = 5


def _late_replicated(rank: int, world: int, policy: str, m: int, falls_back: bool) -> list[np.ndarray]:
    """Three stages of two replicas: wait for a step, then late, then what completes all that is under way."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("pp", "dp"))
    stage_index, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = DistributedDataParallel(models.build("mlp", 3)[stage_index], process_group=mesh["dp"].get_group())
    schedule = ScheduleDNI(
        PipelineStage(module, stage_index, 3, torch.device("cpu"), group=mesh["pp"].get_group()),
        m,
        models.loss_fn,
        interface=models.interface("mlp", "local_head", True) if stage_index < 2 else None,
        interface_optimizer=models.interface_optimizer,
        policy=policy,
        unlock_after_steps=1,
        timeout_s=20.0,
    )
    optimizer = models.optimizer(module)
    for step in range(LATE_STEPS):
        batch = models.batch("mlp", step, 2 * ROWS * m)
        # so that a microbatch of the whole is made of one of each replica
        x, y = (each.view(m, 2, ROWS, *each.shape[1:])[:, replica].flatten(0, 1) for each in batch)
        schedule.step(*((x,) if stage_index == 0 else ()), target=y)
        optimizer.step()
        optimizer.zero_grad()
        if step == LATE_STEPS - 2 and falls_back:
            schedule._flow.fell_back = True
        elif step == LATE_STEPS - 2:
            schedule.state_dict()
    schedule.flush()
    optimizer.step()
    return [parameter.detach().clone().numpy() for parameter in module.parameters()]


@pytest.mark.parametrize(
    "policy, m, falls_back",
    [("stale", 1, False), ("stale", 4, True), ("corrected", 1, True), ("corrected", 4, False)],
)
def test_late_gradients_are_averaged_over_replicas(policy: str, m: int, falls_back: bool) -> None:
    """Which ones are late matters, so the oracle has microbatches of the same rows. A local head predicts alike."""
    ranks = run_ranks(6, _late_replicated, policy, m, falls_back)
    case = Case(m=m, policy=policy, rows=2 * ROWS, interface="local_head", unlock_after_steps=1)
    oracle = Oracle(3, case)
    for step in range(LATE_STEPS):
        oracle.step(step)
        if step == LATE_STEPS - 2 and falls_back:
            oracle.reference.fell_back = True
        elif step == LATE_STEPS - 2:
            oracle.reference.complete()
    oracle.reference.flush()
    for optimizer in oracle.optimizers:
        optimizer.step()
    for rank, parameters in enumerate(ranks):
        assert all((a == b).all() for a, b in zip(parameters, ranks[rank - rank % 2], strict=True)), "replicas differ"
        for got, want in zip(parameters, oracle.reference.stages[rank // 2].parameters(), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want.detach(), rtol=1e-6, atol=1e-6)


def test_gradients_are_averaged_in_buckets_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "BUCKET_BYTES", 40)
    module = nn.Module()
    for number, (size, dtype) in enumerate(
        [(4, torch.float32), (6, torch.float32), (1, torch.float32), (2, torch.bfloat16)]
    ):
        module.register_parameter(f"p{number}", nn.Parameter(torch.ones(size, 1, dtype=dtype)))
    module.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
    sent: list[tuple[int, torch.dtype]] = []

    def average(flat: Tensor) -> None:
        sent.append((flat.numel(), flat.dtype))
        flat += 1

    average_grads(module, average)
    assert sent == [] and all(parameter.grad is None for parameter in module.parameters()), "nothing to average yet"
    for number, parameter in enumerate(module.parameters()):
        if number in (0, 1, 3):
            parameter.grad = torch.full_like(parameter, number + 1)
    average_grads(module, average)
    assert sent == [(10, torch.float32), (1, torch.float32), (2, torch.bfloat16)]
    assert [None if p.grad is None else p.grad.flatten().tolist() for p in module.parameters()] == [
        [2.0] * 4, [3.0] * 6, [1.0], [5.0] * 2, None,
    ]  # fmt: skip


def _averages(rank: int, world: int) -> float:
    """The predictors average over the groups they are told, also where no wrapper shows them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage_index, replica = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    module = models.build("mlp", 2)[stage_index]
    torch.manual_seed(rank)  # so each replica draws another predictor to start with
    schedule = ScheduleDNI(
        PipelineStage(module, stage_index, 2, torch.device("cpu"), group=mesh.get_group("pp")),
        M,
        models.loss_fn,
        data_parallel_groups=[mesh.get_group("dp")],
        policy="synthetic",
    )
    for step in range(3):
        x, y = models.batch("mlp", 10 * step + replica, ROWS * M)
        schedule.step(*((x,) if stage_index == 0 else ()), target=y)
    schedule.flush()
    learner = schedule._flow.learner
    flat = torch.cat([p.detach().flatten() for p in learner.interfaces.parameters()]) if learner else torch.zeros(1)
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat, group=mesh.get_group("dp"))
    return float((both[0] - both[1]).abs().max())


def test_data_parallel_groups_can_be_told() -> None:
    assert run_ranks(4, _averages) == [0.0] * 4
