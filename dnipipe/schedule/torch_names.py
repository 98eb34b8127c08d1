"""The only file that touches private names of torch.distributed.pipelining (read in 2.11 and 2.13).

Everything a schedule needs from a stage is here in words: start it, run one microbatch forward or backward, ask for the
shapes it was found to have. When torch moves a name, this file moves with it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed.pipelining.schedules as torch_schedules
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.nn.parallel import DistributedDataParallel

from .announce import Metas

Stage = Any  # torch's _PipelineStageBase: private, and its attributes differ between releases

# 2.13 infers the backward's shapes too, for which it wants a target; 2.11 knows neither argument.
_INITIALIZE_TAKES_TARGET = "target" in inspect.signature(PipelineScheduleSingle._initialize_stage).parameters


def initialize_stage(
    schedule: PipelineScheduleSingle, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any, loss_kwargs: Any
) -> None:
    """Torch's synchronous sweep over all stages that finds shapes, without the buffers it would set up.

    Torch reserves one activation and one gradient buffer per microbatch. One microbatch is in flight here, so the sweep
    is told of one, and all microbatches share that slot: a stage is given each tensor just before it uses it.
    """
    extra = (target, loss_kwargs) if _INITIALIZE_TAKES_TARGET else ()
    stage: Stage = schedule._stage
    args = args if stage.is_first else ()  # 2.11 refuses others, which are there for synthetic inputs only
    num_microbatches, schedule._n_microbatches = schedule._n_microbatches, 1
    try:
        with _no_ddp_sync(stage.submod):
            schedule._initialize_stage(args, kwargs, *extra)
    finally:
        schedule._n_microbatches = num_microbatches
    stage.chunks = num_microbatches
    for slots in (stage.args_recv_info, stage.grad_recv_info):
        if not slots:
            continue
        for slot in slots[0]:
            buffer = getattr(slot, "buffer", None)
            if buffer is not None:  # its memory is not needed, its device and flags are
                slot.buffer = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        for microbatch in range(1, num_microbatches):
            slots[microbatch] = slots[0]


def _no_ddp_sync(module: nn.Module) -> AbstractContextManager[None]:
    """The sweep runs DDP's forward without a backward. DDP would count the next backward twice, and fail wherever all
    forwards of a step come before its first backward, as torch's own GPipe then does (2.13)."""
    if isinstance(module, DistributedDataParallel) and not module.static_graph:  # a static graph counts otherwise
        return module.no_sync()
    return nullcontext()


def mend_ddp(schedule: PipelineScheduleSingle) -> None:
    """Lets one of torch's own schedules find its shapes with DDP around the stage, whatever the order of its work."""
    find_shapes = schedule._initialize_stage

    def without_sync(*args: Any, **kwargs: Any) -> None:
        with _no_ddp_sync(schedule._stage.submod):
            find_shapes(*args, **kwargs)

    schedule._initialize_stage = without_sync  # type: ignore[method-assign]


def is_initialized(schedule: PipelineScheduleSingle, *, backward: bool) -> bool:
    forward_done = bool(schedule._stage_forward_initialized)
    return forward_done and (not backward or bool(schedule._stage_backward_initialized))


def forget_shapes(schedule: PipelineScheduleSingle) -> None:
    """Makes the next `initialize_stage` find the shapes anew, also for a stage that was built with example inputs."""
    stage: Stage = schedule._stage
    schedule._stage_forward_initialized = schedule._stage_backward_initialized = False
    if hasattr(stage, "_user_meta"):  # 2.13
        stage._user_meta = type(stage._user_meta)()
    else:  # 2.11
        stage.inputs_meta = stage._outputs_meta = None
    stage.grad_send_info = None


def output_metas(stage: Stage) -> Metas:
    """Shape and dtype of each output tensor of one microbatch, as torch's sweep found them."""
    metas = stage._stage_meta.outputs if hasattr(stage, "_stage_meta") else stage.get_outputs_meta()
    return tuple((torch.Size(meta.shape), meta.dtype) for meta in metas or ())


def input_metas(stage: Stage) -> Metas:
    """Shape and dtype of each tensor that the previous stage sends; empty on the first stage."""
    if stage.is_first:
        return ()
    metas = stage._stage_meta.inputs if hasattr(stage, "_stage_meta") else stage.inputs_meta
    return tuple((torch.Size(meta.shape), meta.dtype) for meta in metas)


def inputs_needing_grad(stage: Stage) -> tuple[bool, ...]:
    """For each tensor that the previous stage sends: whether a gradient goes back for it. 2.11 cannot tell which of the
    floating-point ones have a graph, so there it is all of them."""
    if stage.is_first:
        return ()
    slots = stage.args_recv_info[0]
    if hasattr(stage, "_stage_meta"):
        return tuple(bool(slot.tensor_meta.requires_grad) for slot in slots)
    return tuple(slot.buffer.dtype.is_floating_point for slot in slots)


def forward(
    stage: Stage,
    microbatch: int,
    received: Sequence[Tensor] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    save: bool,
) -> tuple[Any, tuple[Tensor, ...]]:
    """Runs one microbatch forward. Returns what the module returned, and its output tensors for the next stage."""
    if received is not None:
        stage.set_local_fwd_input(tuple(received), microbatch)
    args = args if stage.is_first else ()
    output = stage.forward_one_chunk(microbatch, args, kwargs, save_forward_output=save)
    return output, stage.fwd_cache[microbatch][0]


def backward(
    stage: Stage,
    microbatch: int,
    output_grads: Sequence[Tensor] | None,
    needs_grad: Sequence[bool],
    loss: Tensor | None,
    *,
    last: bool,
) -> list[Tensor]:
    """Runs one microbatch backward, from `loss` on the last stage, else from `output_grads`.

    output_grads: one for each output that needs one, as `needs_grad` says per output. last: this is the last microbatch
    of the step, when data-parallel wrappers reduce. Returns the gradients of the received tensors that need one.
    """
    if output_grads is not None:
        stage.set_local_bwd_input(_spread(stage, microbatch, output_grads, needs_grad), microbatch)
    stage.backward_one_chunk(microbatch, loss=loss, last_backward=last)
    grads = stage.bwd_cache.pop(microbatch)
    needed = zip(grads, inputs_needing_grad(stage), input_metas(stage), strict=False)  # 2.11 adds gradients of kwargs
    return [
        torch.zeros(shape, dtype=dtype, device=stage.device) if grad is None else grad
        for grad, needs, (shape, dtype) in needed
        if needs
    ]


def take_graph(
    stage: Stage, microbatch: int, needs_grad: Sequence[bool]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Takes the microbatch just run forward out of torch's hands, which forgets it when the step ends.

    Returns its outputs that need a gradient, as `needs_grad` says per output, and the received tensors that need one.
    """
    outputs, inputs = stage.fwd_cache.pop(microbatch)
    received = zip(inputs, inputs_needing_grad(stage), strict=False)  # they come before other arguments
    kept = tuple(output for output, needs in zip(outputs, needs_grad, strict=True) if needs)
    return kept, tuple(each for each, needs in received if needs)


def _spread(
    stage: Stage, microbatch: int, output_grads: Sequence[Tensor], needs_grad: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """One entry per output. Where none is needed 2.13 takes None; 2.11 takes a tensor, which it ignores."""
    remaining = iter(output_grads)
    blank: list[Tensor | None] = [None] * len(needs_grad)
    if not hasattr(stage, "_stage_meta"):
        blank = [torch.zeros_like(output) for output in stage.fwd_cache[microbatch][0]]
    return tuple(next(remaining) if needs else none for needs, none in zip(needs_grad, blank, strict=True))


def check_inputs(
    schedule: PipelineScheduleSingle, arg_mbs: Any, kwarg_mbs: Any, target_mbs: Any, losses: Any
) -> tuple[list[tuple[Any, ...]], list[dict[str, Any]]]:
    args, kwargs = schedule._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
    return args, kwargs


def compute_loss(
    schedule: PipelineScheduleSingle, output: Any, target_mbs: Any, microbatch: int, loss_kwargs: Any
) -> Tensor:
    """The loss of one microbatch on the last stage, also kept for `publish_losses`."""
    extra = (loss_kwargs,) if _INITIALIZE_TAKES_TARGET else ()
    schedule._maybe_compute_loss(schedule._stage, output, target_mbs, microbatch, *extra)
    loss: Tensor = schedule._internal_losses[-1]
    return loss


def loss_for_backward(schedule: PipelineScheduleSingle, microbatch: int) -> Tensor:
    """The loss with its graph, once: what stays in the list is a number, since a used graph still holds its inputs."""
    loss: Tensor = schedule._internal_losses[microbatch]
    schedule._internal_losses[microbatch] = loss.detach()
    return loss


def publish_losses(schedule: PipelineScheduleSingle, losses: list[Tensor] | None) -> None:
    """Fills the caller's list on the last stage, and forgets the losses of this step."""
    schedule._update_losses(schedule._stage, losses if schedule._internal_losses else None)
    schedule._internal_losses.clear()


def register(name: str, schedule_class: type[PipelineScheduleSingle]) -> None:
    """Makes `get_schedule_class(name)` know a class, also where a module has already imported that function by name."""
    original = torch_schedules.get_schedule_class
    known = getattr(original, "_dnipipe_names", None)
    if known is not None:
        known[name.lower()] = schedule_class
        return
    names = {name.lower(): schedule_class}

    def get_schedule_class(schedule_name: str) -> Any:
        return names.get(schedule_name.lower()) or original(schedule_name)

    get_schedule_class._dnipipe_names = names  # type: ignore[attr-defined]
    for module in list(sys.modules.values()):
        # its __dict__, because asking a lazy module for a name could import half a library
        if getattr(module, "__dict__", {}).get("get_schedule_class") is original:
            module.get_schedule_class = get_schedule_class  # type: ignore[attr-defined]
