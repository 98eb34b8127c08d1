"""On GPUs, over NCCL: as plain DeepSpeed bit for bit under wait, also in fp16, and synthetic gradients that train.

DS_ACCELERATOR=cuda python -m pytest tests/deepspeed/test_gpu.py
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from tests.deepspeed import jobs
from tests.deepspeed.jobs import RESTORING, Job
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") != "cuda",
        reason="needs a GPU and DS_ACCELERATOR=cuda: DeepSpeed chooses its device when it is imported",
    ),
    pytest.mark.timeout(150),
]
FIRST_SCALE = 2.0**26
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 26, "hysteresis": 1, "loss_scale_window": 10}}
"""A first loss scale so large that the first batches overflow, and a window so short that it then moves on."""
DTYPES: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": FP16}


def _start() -> None:
    shares = torch.cuda.device_count() < dist.get_world_size()
    local = "0" if shares else str(dist.get_rank())
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK=local)
    deepspeed.init_distributed("nccl", dist_init_required=False)


def _train(job: Job, num_batches: int) -> tuple[list[float], list[torch.Tensor], list[float]]:
    """Losses, weights, and the loss scale after each batch."""
    engine = jobs.build(job)
    dtype = next((d for name, d in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if name in job.options), None)
    data = jobs.batches(1 + engine.grid.data_parallel_id, dtype or torch.float32)
    ends = engine.is_first_stage() or engine.is_last_stage()
    losses, scales = [], []
    for _ in range(num_batches):
        losses.append(float(engine.train_batch(data if ends else None)))
        scales.append(float(getattr(engine.optimizer, "loss_scale", 1.0)))
    return losses, [weight.cpu() for weight in jobs.weights(engine)], scales


def _both(rank: int, world: int, job: Job) -> list[str]:
    _start()
    plain, ours = _train(replace(job, block=None), 12), _train(replace(job, block=RESTORING), 12)
    wrong = [f"losses {plain[0]} and {ours[0]}"] if plain[0] != ours[0] else []
    wrong += [f"scales {plain[2]} and {ours[2]}"] if plain[2] != ours[2] else []
    equal = [torch.equal(one, other) for one, other in zip(plain[1], ours[1], strict=True)]
    return wrong if all(equal) else [*wrong, f"weights {equal}"]


@pytest.mark.parametrize("num_stages, replicas", [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_wait_equals_plain_over_nccl(num_stages: int, replicas: int, zero: int, dtype: str) -> None:
    job = Job(num_stages, zero, 2, options={**DTYPES[dtype], "gradient_clipping": 0.5})
    world = num_stages * replicas
    assert run_ranks(world, _both, job, timeout_s=140, backend="nccl") == [[]] * world


def _synthetic(rank: int, world: int, job: Job) -> tuple[list[float], list[float]]:
    _start()
    losses, _, scales = _train(job, 60)
    return losses, scales


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("transport", ["auto", "group"])
def test_synthetic_trains_over_nccl(zero: int, dtype: str, transport: str) -> None:
    """In fp16 each stage finds a loss scale of its own, and the gradients that cross say in which they are."""
    block = {"policy": "auto", "unlock_after_steps": 20, "interface_learning_rate": 5e-3, "transport": transport}
    results = run_ranks(2, _synthetic, Job(2, zero, 2, block, options=DTYPES[dtype]), timeout_s=140, backend="nccl")
    losses = results[-1][0]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-10:]) < sum(losses[:10])
    if dtype == "fp16" and zero == 1:  # with ZeRO 0, DeepSpeed does not scale the loss (docs/deepspeed.md)
        assert all(scales[0] < FIRST_SCALE for _, scales in results), "the first batch overflows"
