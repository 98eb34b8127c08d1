"""The forward of a step that trains nothing: what torch's eval() runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from ..observe.trace import Trace
from . import torch_names
from .flow import Flow
from .preparation import Batch


def evaluate(schedule: PipelineScheduleSingle, flow: Flow, batch: Batch, trace: Trace) -> None:
    """Forward only. Training exchanges under way are completed first; what they carry stays as it is."""
    stage = schedule._stage
    flow.drain()
    sent: deque[Callable[[], None]] = deque()
    for microbatch in range(len(batch.args)):
        received = None if stage.is_first else flow.pass_receive(torch_names.input_metas(stage))
        args, kwargs = batch.args[microbatch], batch.kwargs[microbatch]
        with trace.span("eval", microbatch=microbatch), torch.no_grad():
            output, outputs = torch_names.forward(stage, microbatch, received, args, kwargs, save=batch.save_outputs)
            stage.fwd_cache.pop(microbatch)
            if batch.targets is not None and stage.is_last and schedule._loss_fn is not None:
                torch_names.compute_loss(schedule, output, batch.targets, microbatch, batch.loss_kwargs)
        sent.append(flow.pass_down(outputs))
        if microbatch > 0:
            sent.popleft()()  # so that no more than one microbatch waits to be fetched
    for wait in sent:
        wait()
