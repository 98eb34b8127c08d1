"""Where a run cuts its model: balanced by what the layers cost, remembered for when it goes on, shown as a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..config import Config
from ..partition import LayerCost
from ..partition.balance import balanced_cuts
from ..plan import Schedule, gpipe, one_f_one_b, peak_in_flight
from .policy import late_sets, plans_of

FILE = "split.json"
BYTES_BESIDE_A_WEIGHT = {"float32": 3 * 4, "bfloat16": 2 + 4 * 4}
"""Gradient and Adam's two moments; for bfloat16 also the float32 weight, and the gradient once more in float32."""
SHARE_OF_A_GPU = 0.9
"""What may be planned for: the rest is CUDA's, the allocator's gaps, messages and predictors."""


@dataclass(frozen=True)
class Cut:
    """lengths: layers of each stage. stages: what each costs for one microbatch. flops_per_token: to train."""

    lengths: list[int]
    stages: list[LayerCost]
    flops_per_token: float

    def to_json(self) -> str:
        """What read() finds in the file."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, folder: Path, num_stages: int) -> Cut | None:
        """That of a run's folder; None: it has none, or one into another number of stages."""
        try:
            kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        cut = cls(**{**kept, "stages": [LayerCost(**stage) for stage in kept["stages"]]})
        return cut if len(cut.lengths) == num_stages else None

    def table(self) -> Table:
        """A row for each stage: its layers, and what they cost."""
        table = Table(title="the split, and what a microbatch costs; share: of the time", title_justify="left")
        table.add_column("stage")
        table.add_column("layers")
        for heading in ("forward ms", "backward ms", "share", "weights MB", "activations MB"):
            table.add_column(heading, justify="right")
        total_ms = sum(stage.total_ms for stage in self.stages) or 1.0
        for number, (length, stage) in enumerate(zip(self.lengths, self.stages, strict=True)):
            times = (f"{stage.forward_ms:.2f}", f"{stage.backward_ms:.2f}", f"{stage.total_ms / total_ms:.0%}")
            sizes = (f"{stage.parameter_bytes / 1e6:.1f}", f"{stage.saved_bytes / 1e6:.1f}")
            table.add_row(str(number), f"{length}: {stage.name}", *times, *sizes)
        return table

    def facts(self, itemsize: int) -> list[dict[str, Any]]:
        """The same as data. itemsize: bytes of a parameter."""
        numbered = enumerate(zip(self.lengths, self.stages, strict=True))
        return [
            {"stage": number, "layers": length, "parameters": stage.parameter_bytes // itemsize, **asdict(stage)}
            for number, (length, stage) in numbered
        ]


def choose_lengths(
    config: Config, layers: Sequence[LayerCost], num_stages: int, extra_ms: float, device: torch.device
) -> list[int]:
    """How many layers each stage gets.

    Args:   extra_ms: what every stage but the last costs beside its layers, to predict a gradient.
    Raises: ValueError: pipeline.layers_per_stage does not fit, fewer layers than stages, or no split that has room.
    """
    pipeline = config.pipeline
    given = pipeline.layers_per_stage
    if given:
        if (len(given), sum(given)) != (num_stages, len(layers)):
            raise ValueError(
                f"pipeline.layers_per_stage = {given}: {num_stages} stages share {len(layers)} layers; give as many "
                "numbers, with that sum"
            )
        return given
    measured = pipeline.split == "measured"
    in_flight = max(held(config, num_stages))
    costs = [layer.total_ms if measured else max(1.0, layer.parameter_bytes) for layer in layers]
    try:
        cuts = balanced_cuts(
            costs,
            num_stages,
            extra=extra_ms if measured else 0.0,
            sizes=[round(layer_bytes(config, layer, in_flight, num_stages)) for layer in layers],
            max_size=_room_bytes(config, num_stages, device) - _ahead_bytes(config, layers),
        )
    except ValueError as error:
        room = f"pipeline.max_stage_gb{_or_window(config)}"
        raise ValueError(f"the model does not fit its stages, in bytes for a size ({room}): {error}") from error
    return [end - start for start, end in pairwise([0, *cuts, len(layers)])]


def layer_bytes(config: Config, layer: LayerCost, in_flight: int, num_stages: int) -> float:
    """What a layer keeps while it trains: weights, gradients, optimizer, and activations of microbatches in flight."""
    return state_bytes(config, layer.parameter_bytes, num_stages) + in_flight * layer.saved_bytes


def held(config: Config, num_stages: int) -> list[int]:
    """The most microbatches whose activations each stage keeps at once, in any phase of DNI."""
    pipeline = config.pipeline
    plans = plans_of(config, num_stages) if pipeline.schedule == "DNI" else [plan_of(config, num_stages)]
    return [max(of_stage) for of_stage in zip(*map(peak_in_flight, plans), strict=True)]


def state_bytes(config: Config, parameter_bytes: int, num_stages: int) -> float:
    """Weights, gradients, optimizer, and weights kept for late backwards, of parameters of so many bytes."""
    dtype = config.model.dtype
    beside = BYTES_BESIDE_A_WEIGHT[dtype] / getattr(torch, dtype).itemsize
    return parameter_bytes * (1 + beside + late_sets(config, num_stages))


def plan_of(config: Config, num_stages: int) -> Schedule:
    """The schedule of a config, as the planner knows it; of DNI that of the last phase."""
    pipeline = config.pipeline
    if pipeline.schedule == "GPipe":
        return gpipe.build(num_stages, pipeline.num_microbatches)
    if pipeline.schedule == "1F1B":
        return one_f_one_b.build(num_stages, pipeline.num_microbatches)
    return plans_of(config, num_stages)[-1]


def _ahead_bytes(config: Config, layers: Sequence[LayerCost]) -> float:
    """What a stage that starts before its input is there keeps of inputs until the models of them have learned."""
    unlocked = config.pipeline.forward_unlocked
    return 0.0 if unlocked is None else unlocked.window * max((each.output_bytes for each in layers[:-1]), default=0)


def _or_window(config: Config) -> str:
    unlocked = config.pipeline.forward_unlocked
    return "" if unlocked is None else f", less what {type(unlocked).section}.window = {unlocked.window} takes"


def _room_bytes(config: Config, num_stages: int, device: torch.device) -> float:
    """What one stage may keep."""
    if config.pipeline.max_stage_gb is not None:
        return config.pipeline.max_stage_gb * 1e9
    if device.type != "cuda":
        return math.inf
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", num_stages * config.pipeline.num_replicas))
    on_each_gpu = math.ceil(ranks / torch.cuda.device_count()) if config.run.share_gpus else 1
    return SHARE_OF_A_GPU * torch.cuda.get_device_properties(device).total_memory / on_each_gpu
