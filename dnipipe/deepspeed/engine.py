"""DNIPipelineEngine: DeepSpeed's pipeline engine, whose stages never wait for a gradient.

DeepSpeed computes: load, forward, loss, scaling, backward, data-parallel reduction, optimizer, schedule of the learning
rate. dnipipe's `Flow` says which gradient a stage goes backward from, and carries what crosses between stages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from ..boundary import BoundaryError
from ..schedule.flow import Flow
from . import norms, program, saved
from .block import Block
from .flowing import Flowing
from .loss_scale import check_loss_scale, loss_scale_of
from .notice import print_differences
from .stage import PipeStage, tensors_of
from .ties import Ties, check_ties, tied_stages


class DNIPipelineEngine(PipelineEngine):  # type: ignore[misc]
    """Made by dnipipe.deepspeed.initialize() for a config with a "dnipipe" block; used as DeepSpeed's own.

    Args:   block: what the config's "dnipipe" says. The rest as PipelineEngine.
    Raises: BoundaryError (rank, stage, microbatch, peer, seconds) when a neighbour is lost.
    """

    def __init__(self, *args: Any, block: Block, **kwargs: Any) -> None:
        self.block = block
        self._batch: Any = None
        self._quiet = False
        super().__init__(*args, **kwargs)
        grid = self.grid
        plain_fp32 = not (self.fp16_enabled() or self.bfloat16_enabled() or self.zero_optimization())
        is_tied = bool(tied_stages(self.module))
        norms.check_clip(block, self.gradient_clipping(), plain_fp32=plain_fp32, is_tied=is_tied)
        if self.global_rank == 0:
            check_loss_scale(self)
        if block.clip != "global":
            norms.keep_in_stage(self.optimizer, grid)
        self._clip = norms.build_clip(block, self.gradient_clipping(), grid) if plain_fp32 else None
        check_ties(block, self.module, bf16_without_zero=self.using_bf16_optimizer)
        self._ties = Ties(self, block)
        replicas = [grid.get_data_parallel_group()] if self.is_data_parallel else []
        stage = PipeStage(grid, torch.device(self.device))
        self._flowing = Flowing(block, stage, self.micro_batches, replicas, self._loss_factor, self.dynamic_shape)
        self._swept = False
        self.grad_layer: Any
        self.is_pipe_parallel: bool
        if self.global_rank == 0:
            print_differences(block, self.gradient_clipping(), is_tied)

    @property
    def flow(self) -> Flow:
        return self._flowing.flow

    @property
    def metrics(self) -> dict[str, float | int | str]:
        """As ScheduleDNI.metrics: step, policy, loss, loss_step, cosine, r2, in_flight, wait_s. Waits for a GPU."""
        return self.flow.metrics()

    @property
    def loss_batch(self) -> int:
        """Of which batch train_batch() returned the loss, counted from 0; -1 before the first. Waits for the device."""
        return self.flow.step - 1 if self.block.loss == "sync" else int(self.metrics["loss_step"])

    def _loss_factor(self) -> float:
        """What DeepSpeed multiplies the loss of one microbatch by before it goes backward, at present."""
        return loss_scale_of(self) / self.gradient_accumulation_steps()

    # ---- a training batch

    def _train_schedule(self) -> program.DNISchedule:
        if self._flowing.agreement is None:
            self._sweep()
        self._flowing.set_num_microbatches(self.micro_batches)
        return program.DNISchedule(self.micro_batches, self.num_stages, self.stage_id, self.flow.delay)

    def _sweep(self) -> None:
        """The first microbatch goes forward through all stages, by DeepSpeed's own sends, and is not lost."""
        self._reserve_pipe_buffers(1)
        self.fwd_outputs: list[Any] = []
        if self.is_first_stage() or self.is_last_stage():
            self._exec_load_micro_batch(0)
        if not self.is_first_stage():
            self._exec_recv_activations(0)
        self._exec_forward_pass(0)
        if not self.is_last_stage():
            self._exec_send_activations(0)
        label = self._flowing.label(self._batch) if self.is_first_stage() else None
        buffers = self.pipe_buffers
        self._received_tuple = isinstance(buffers["inputs"][0], tuple)
        outputs = buffers["outputs"][0]
        known = isinstance(outputs, Tensor | tuple)  # a last stage may return anything its loss function knows
        self._flowing.agree(tensors_of(buffers["inputs"][0]), tensors_of(outputs) if known else (), label)
        self._swept = True

    def _exec_schedule(self, pipe_schedule: Iterable[Any]) -> None:
        try:
            super()._exec_schedule(pipe_schedule)
        except BoundaryError:
            where = f"[dnipipe] rank {self.global_rank}, stage {self.stage_id} of {self.num_stages}"
            print(f"{where}: {self.flow.describe()}", file=sys.stderr, flush=True)
            raise

    def _exec_begin_batch(self) -> None:
        self._flowing.begin_batch()

    def _exec_forward(self, buffer_id: int) -> None:
        flow, agreement = self.flow, self._flowing.agreed
        received = None if self.is_first_stage() else flow.receive()
        relayed = received.pop() if received and agreement.relays_label_to(self.stage_id) else None
        if self._swept:
            self._swept = False
        else:
            self._run_forward(buffer_id, received)
        if self.is_last_stage():
            flow.send((), (), None, False)  # it only counts
            flow.report_loss(self.loss if isinstance(self.loss, Tensor) else torch.stack(list(self.loss)).sum())
            return
        label = self._flowing.label(self._batch) if self.is_first_stage() else relayed
        outputs = tensors_of(self.pipe_buffers["outputs"][buffer_id])
        self._flowing.check_shapes(outputs)
        relays = agreement.relays_label_to(self.stage_id + 1)
        flow.send(outputs, agreement.needs_grad, self._flowing.told(label), relays)

    def _run_forward(self, buffer_id: int, received: list[Tensor] | None) -> None:
        if self.is_first_stage() or self.is_last_stage():
            self._exec_load_micro_batch(buffer_id)
        if received is not None:
            for tensor in received:
                tensor.requires_grad_(tensor.is_floating_point())
            self.pipe_buffers["inputs"][buffer_id] = tuple(received) if self._received_tuple else received[0]
        self._exec_forward_pass(buffer_id)

    def _next_batch(self) -> Any:
        self._batch = super()._next_batch()
        return self._batch

    def _exec_nothing_forward(self) -> None:
        self.flow.send_nothing()

    def _exec_backward(self, buffer_id: int) -> None:
        flow, buffers = self.flow, self.pipe_buffers
        if not self.is_last_stage():
            grads = flow.output_grads()
            self.grad_layer = grads if isinstance(buffers["outputs"][buffer_id], tuple) else grads[0]
            self._quiet = True  # DeepSpeed 0.19 times this itself, and starts the same timers in a hook of the tensor
        try:
            self._exec_backward_pass(buffer_id)
        finally:
            self._quiet = False
        inputs = () if self.is_first_stage() else tensors_of(buffers["inputs"][buffer_id])
        needing = [tensor for tensor in inputs if tensor.is_floating_point()]
        flow.give([torch.zeros_like(each) if each.grad is None else each.grad for each in needing])
        buffers["inputs"][buffer_id] = self.grad_layer = None
        flow.settle()

    def _start_timers(self, timer_names: list[str]) -> None:
        if not self._quiet:
            super()._start_timers(timer_names)

    def _stop_timers(self, timer_names: list[str]) -> None:
        if not self._quiet:
            super()._stop_timers(timer_names)

    def _exec_reduce_tied_grads(self) -> None:
        if not self._ties.after_backward(synthetic=self._flowing.synthetic):
            super()._exec_reduce_tied_grads()

    def clip_fp32_gradients(self) -> None:
        if self._clip is None:
            super().clip_fp32_gradients()
            return
        weights, tied = norms.split_tied(self.module)
        self._clip.clip(weights, alone=tied)
        self._global_grad_norm = self._clip.grad_norm

    def _exec_end_batch(self) -> None:
        self._flowing.end_batch()

    def _aggregate_total_loss(self) -> Tensor:
        if self.block.loss == "sync":
            return super()._aggregate_total_loss()
        if not self.is_last_stage():
            loss = self.flow.news[1].float()
            if self.is_data_parallel:
                dist.all_reduce(loss, group=self.grid.get_data_parallel_group())
                loss /= self.dp_world_size
            return loss
        keep, self.is_pipe_parallel = self.is_pipe_parallel, False  # leaves out the broadcast to the other stages only
        try:
            return super()._aggregate_total_loss()
        finally:
            self.is_pipe_parallel = keep

    # ---- between batches; every rank must call these after the same batch

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's: synchronous. What is in flight is completed first, which changes no number."""
        self.flow.drain()
        return super().eval_batch(*args, **kwargs)

    def flush(self) -> None:
        """Takes in all true gradients still on their way, and lets the predictors learn from them."""
        self.flow.flush()

    def reset_activation_shape(self) -> None:
        super().reset_activation_shape()
        self._flowing.forget_shapes()

    def save_checkpoint(self, save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; beside its files, one of dnipipe's for each rank, which plain DeepSpeed passes over."""
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        done = super().save_checkpoint(save_dir, tag, *args, **kwargs)
        state = {"flowing": self._flowing.state_dict(), "ties": self._ties.state_dict()}
        saved.save(Path(save_dir, tag), self.stage_id, self.grid.data_parallel_id, state)
        return done

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As DeepSpeed's; from one of plain DeepSpeed, predictors and policy begin anew."""
        path, client_state = super().load_checkpoint(*args, **kwargs)
        state = None if path is None else saved.load(Path(path).parent, self.stage_id, self.grid.data_parallel_id)
        if state is not None:
            self._flowing.load_state_dict(state["flowing"])
            self._ties.load_state_dict(state["ties"])
        return path, client_state

    _INSTRUCTION_MAP = {
        **PipelineEngine._INSTRUCTION_MAP,
        program.BeginBatch: _exec_begin_batch,
        program.Forward: _exec_forward,
        program.NothingForward: _exec_nothing_forward,
        program.Backward: _exec_backward,
        program.EndBatch: _exec_end_batch,
        schedule.ReduceTiedGrads: _exec_reduce_tied_grads,
    }
