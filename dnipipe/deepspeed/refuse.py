"""What cannot be trained without a bubble, with the reason and the cure; said before DeepSpeed builds anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import PipelineModule
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

from .block import NAME, Block

PLAIN = f'or remove the "{NAME}" block, and plain DeepSpeed trains'


def check_job(config: Mapping[str, Any], model: Any, block: Block) -> None:
    """Raises: ValueError for a ds_config that the engine would train wrongly, or that does not fit the model."""
    zero = _section(config, "zero_optimization").get("stage", 0)
    if zero not in (0, 1):
        raise ValueError(
            f'"{NAME}" works with ZeRO 0 and 1, "zero_optimization.stage" is {zero}: ZeRO 2 and 3 divide gradients or '
            f"weights in the middle of a batch, and DeepSpeed runs no pipeline with them: set it to 1, {PLAIN}"
        )
    tensor = _section(config, "tensor_parallel").get("autotp_size", 0) or 0
    tensor = max(int(tensor), model._grid.get_slice_parallel_world_size())
    if tensor > 1:
        raise ValueError(
            f'"{NAME}" is not tested with tensor parallelism, which is {tensor} here: each slice would predict its '
            f"gradient from a part of the activation. Set it to 1, {PLAIN}"
        )
    if model.dynamic_shape and block.transport == "direct":
        raise ValueError(
            f'"{NAME}.transport" is "direct", whose buffers have one size, and the PipelineModule has '
            f'dynamic_shape=True: choose "group", or build it without dynamic_shape'
        )
    fp16 = config.get("fp16")
    enabled = fp16.get("enabled", False) if isinstance(fp16, Mapping) else bool(fp16)
    if enabled is True and not get_accelerator().is_fp16_supported():
        raise ValueError(
            f'"fp16.enabled" is true, and this machine\'s "{get_accelerator().device_name()}" cannot compute in fp16: '
            f'set "bf16": {{"enabled": true}} instead, or run on a GPU'
        )


def check_model(model: Any) -> None:
    """Raises: ValueError: it is no pipeline, or not one of a stage for each rank."""
    if isinstance(model, DualPipeVModule):
        raise ValueError(
            f'"{NAME}" runs one stage a rank, and a DualPipeVModule holds two, in a schedule of its own: build a '
            f"PipelineModule of the same layers, {PLAIN}"
        )
    if not isinstance(model, PipelineModule):
        raise ValueError(
            f'"{NAME}" removes the bubble of a pipeline, and the model is a {type(model).__name__}: wrap its layers in '
            f"deepspeed.pipe.PipelineModule(layers, num_stages=...), {PLAIN}"
        )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
