"""A small pipeline job for DeepSpeed, plain or with our block, and what it leaves: losses and weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from torch import Tensor, nn

import dnipipe.deepspeed as ours

FEATURES, WIDTH, CLASSES, ROWS = 32, 64, 10, 8
RESTORING = {"policy": "wait", "clip": "global", "loss": "sync"}
"""The block under which nothing is other than in plain DeepSpeed."""


@dataclass(frozen=True)
class Job:
    """block: None: plain DeepSpeed, without our module. options: further keys of the ds_config."""

    num_stages: int = 2
    zero: int = 0
    num_microbatches: int = 1
    block: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    seed: int = 0

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": self.num_microbatches,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": self.zero},
            "steps_per_print": None,
            **self.options,
        }
        return config if self.block is None else {**config, "dnipipe": self.block}


CLIP_AND_RATE = {
    "gradient_clipping": 0.5,
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-2, "warmup_num_steps": 5}},
}


def start() -> None:
    """What the launcher of DeepSpeed would do, on a rank of tests.ranks."""
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0"
    )
    # Its messages through shared memory are for inference, and loading them takes a lock that a killed rank leaves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)


def model(job: Job) -> PipelineModule:
    torch.manual_seed(job.seed)
    first: Any = nn.Linear(FEATURES, WIDTH)
    layers: list[Any] = [first, nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.ReLU()]
    layers.append(nn.Linear(WIDTH, CLASSES))
    if job.tied:
        # no bias: DeepSpeed neither ties it nor loads it on the last stage
        layers[0] = TiedLayerSpec("ends", nn.Linear, FEATURES, WIDTH, bias=False)
        layers[-1] = TiedLayerSpec("ends", nn.Linear, FEATURES, WIDTH, bias=False, forward_fn=_backwards)
    return PipelineModule(layers, num_stages=job.num_stages, loss_fn=nn.CrossEntropyLoss(), partition_method="uniform")


def _backwards(linear: nn.Linear, h: Tensor) -> Tensor:
    return h @ linear.weight


def batches(seed: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Microbatches of a linear problem that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(5))
    while True:
        x = torch.randn(ROWS, FEATURES, generator=generator)
        yield x.to(dtype), (x @ truth).argmax(1)


def build(job: Job) -> Any:
    initialize = deepspeed.initialize if job.block is None else ours.initialize
    engine, *_ = initialize(model=model(job), config=job.config())
    return engine


def data_of(engine: Any, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Each replica its own; middle stages None, as DeepSpeed's users do."""
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    return batches(seed + engine.grid.data_parallel_id, dtype)


def train(engine: Any, num_batches: int, data: Iterator[tuple[Tensor, Tensor]] | None = None) -> list[float]:
    data = data_of(engine) if data is None else data
    ends = engine.is_first_stage() or engine.is_last_stage()
    return [float(engine.train_batch(data if ends else None)) for _ in range(num_batches)]


def weights(engine: Any) -> list[Tensor]:
    return [weight.detach().clone() for weight in engine.module.parameters()]
