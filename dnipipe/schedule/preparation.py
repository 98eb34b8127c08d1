"""What a schedule does before a step: at the first one, after a change of shape, and nothing in between.

The first step is a synchronous sweep over the stages: torch finds the shapes, the boundaries open, the stages agree on
labels and interfaces. From the second step on a stage only compares the shapes of its own arguments.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from ..interface import TensorMeta, is_integer
from ..observe.trace import Trace
from . import assembly, torch_names
from .agreement import Agreement
from .arguments import why_no_graphs
from .facts import Call, Facts
from .flow import Flow
from .forward_unlocked import ForwardUnlocked, missing
from .policy import AUTO, Policy
from .replicas import replica_groups
from .shapes import Shapes
from .timing import measure_in_flight
from .unlocked_flow import UnlockedFlow
from .weight_prediction import Masters

NO_LABEL = -100  # cross-entropy's ignore_index, which interfaces take for "no label"


@dataclass(frozen=True)
class Batch:
    """The arguments of one step, split into microbatches. save_outputs: whether the last stage keeps its outputs."""

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]
    targets: list[Tensor] | None
    save_outputs: bool
    loss_kwargs: dict[str, Any] | None


class Preparation:
    """Args as ScheduleDNI, with label_fn on the first stage only. agreement: None before the first training step."""

    def __init__(
        self,
        *,
        policy: Policy,
        given: Sequence[str | nn.Module],
        interface_optimizer: assembly.OptimizerFactory | None,
        num_classes: int | None,
        labels: str,
        label_fn: Callable[..., Tensor] | None,
        timeout_s: float,
        trace: Trace,
        check_every_steps: int,
        fall_back: bool,
        data_parallel_groups: Sequence[dist.ProcessGroup] | None,
        transport: str,
        optimizer: str | None,
        master_weights: Masters | None,
        forward_unlocked: ForwardUnlocked | None,
        stage: Any,
    ) -> None:
        self.policy, self.given, self.interface_optimizer = policy, given, interface_optimizer
        self.num_classes, self.labels, self.label_fn = num_classes, labels, label_fn
        self.timeout_s, self.trace, self.stage = timeout_s, trace, stage
        self.check_every_steps, self.fall_back, self.transport = check_every_steps, fall_back, transport
        self.optimizer, self.master_weights, self.forward_unlocked = optimizer, master_weights, forward_unlocked
        # Now, because torch 2.11's sweep leaves FSDP's parameters unsharded, as if there were no replicas.
        found = replica_groups(stage.submod) if data_parallel_groups is None else data_parallel_groups
        self.replicas = [group for group in found if dist.get_world_size(group) > 1]
        self.agreement: Agreement | None = None
        self._shapes = Shapes(stage.stage_index)
        self._every_rank_has_target = False

    @property
    def agreed(self) -> Agreement:
        assert self.agreement is not None, "the stages agree at the first training step"
        return self.agreement

    def prepare(self, schedule: PipelineScheduleSingle, flow: Flow | None, batch: Batch) -> Flow:
        """Called by every rank before each step() and eval(). Raises: ValueError, before anything is sent."""
        args, kwargs = batch.args[0], batch.kwargs[0]
        target = batch.targets[0] if batch.targets is not None else None
        self._shapes.check_even(batch.args, batch.kwargs, batch.targets)
        training = schedule._has_backward
        if training:
            self._check_label_is_there(batch)
            self._check_input_is_there(batch)
        if self._shapes.changed(args, kwargs, target, every_rank_has_target=self._every_rank_has_target):
            self.reset_shapes(schedule, flow)
        if flow is None:
            call = Call(dist.get_rank(), len(batch.args), training, batch.targets is not None)
            self._every_rank_has_target = assembly.every_rank_has_target(call, self.stage)
            flow = assembly.open_flow(
                self.stage,
                len(batch.args),
                self.policy,
                self.timeout_s,
                self.trace,
                self.transport,
                holds_graphs=True,
                masters=self.master_weights,
                unlocked=self.forward_unlocked,
            )
        if not torch_names.is_initialized(schedule, backward=training):
            with self._saying_where_it_failed():
                torch_names.initialize_stage(schedule, args, kwargs, target, batch.loss_kwargs)
                if training:
                    self._agree_or_begin_anew(schedule, flow, batch)
        self._shapes.remember(args, kwargs, target)
        return flow

    def reset_shapes(self, schedule: PipelineScheduleSingle, flow: Flow | None) -> None:
        """The next step finds the shapes anew; what is in flight has the old ones, and is completed."""
        if flow is not None:
            flow.drain()
        torch_names.forget_shapes(schedule)
        self._shapes.forget()

    @contextmanager
    def _saying_where_it_failed(self) -> Iterator[None]:
        """Torch's sweep knows no BoundaryError: of a lost neighbour the backend says an address, not a rank."""
        start = time.perf_counter()
        try:
            yield
        except RuntimeError:
            seconds = time.perf_counter() - start
            print(
                f"[dnipipe] rank {dist.get_rank()}, stage {self.stage.stage_index} of {self.stage.num_stages}: not "
                f"through the first step, in which the stages find shapes one after the other ({seconds:.1f} s). If "
                f"the error speaks of a connection or a timeout, another rank failed before: look at its log first",
                file=sys.stderr,
                flush=True,
            )
            raise

    def _agree_or_begin_anew(self, schedule: PipelineScheduleSingle, flow: Flow, batch: Batch) -> None:
        try:
            self._agree(flow, batch)
        except ValueError:  # raised on every rank alike: a corrected step() shall find nothing half done
            torch_names.forget_shapes(schedule)
            self._shapes.forget()
            raise

    def _agree(self, flow: Flow, batch: Batch) -> None:
        agreement = assembly.agree_over(self._facts(batch), self.stage)
        if self.agreement is None:
            self._say(agreement.summary)
        self.agreement = agreement
        self._every_rank_has_target = agreement.every_rank_has_target
        flow.policy = agreement.policy
        assembly.set_metas(flow, self.stage, agreement)
        if agreement.policy.in_flight == AUTO:
            self.choose_in_flight(self._measured_in_flight(flow, batch), flow)
        if flow.learner is None and agreement.interfaces:
            flow.learner = assembly.build_learner(
                self.stage, agreement, self.given, self.interface_optimizer, self.replicas
            )
            if self.interface_optimizer is None:
                self._say(f"predictors begin at their own rates, here {flow.learner.own_rates}")
        if isinstance(flow, UnlockedFlow) and flow.input_learner is None:
            net_input = _meta_of_input(batch)
            assert net_input is not None, "the stages agreed on it"
            flow.input_learner = assembly.build_input_learner(self.stage, flow.unlocked, net_input, self.replicas)

    def _measured_in_flight(self, flow: Flow, batch: Batch) -> tuple[int, ...]:
        needs_grad = self.agreed.needs_grad
        held, why = measure_in_flight(self.stage, flow, needs_grad, batch.args[0], batch.kwargs[0], self.replicas)
        self._say(why)
        return held

    def choose_in_flight(self, in_flight: Sequence[int], flow: Flow | None) -> None:
        """What in_flight="auto" comes to, from now on. Every rank must call it at the same step."""
        self.policy = replace(self.policy, in_flight=tuple(in_flight))
        if flow is not None and flow.policy.late:
            flow.policy = replace(flow.policy, in_flight=tuple(in_flight))

    @property
    def in_flight_chosen(self) -> list[int]:
        """As choose_in_flight() was told; empty: nothing is chosen."""
        chosen = self.policy.in_flight
        return list(chosen) if isinstance(chosen, tuple) else []

    def _say(self, text: str) -> None:
        if self.stage.is_first:
            print(f"[dnipipe] {text}", file=sys.stderr, flush=True)

    def _facts(self, batch: Batch) -> Facts:
        label = self._own_label(batch, 0)
        return Facts(
            rank=dist.get_rank(),
            stage=self.stage.stage_index,
            num_microbatches=len(batch.args),
            policy=self.policy,
            labels=self.labels,
            has_label_fn=self.label_fn is not None,
            has_target=batch.targets is not None,
            label=TensorMeta(tuple(label.shape), label.dtype) if label is not None else None,
            outputs=torch_names.output_metas(self.stage),
            inputs_needing_grad=torch_names.inputs_needing_grad(self.stage),
            interfaces=assembly.interface_names(self.given),
            num_classes=self.num_classes,
            check_every_steps=self.check_every_steps,
            fall_back=self.fall_back,
            optimizer=self.optimizer,
            no_graphs=why_no_graphs(self.stage.submod),
            forward_unlocked=None if self.forward_unlocked is None else self.forward_unlocked.agreed,
            net_input=_meta_of_input(batch),
            has_input_model=self.forward_unlocked is not None and self.forward_unlocked.model is not None,
        )

    def _check_label_is_there(self, batch: Batch) -> None:
        agreement, stage = self.agreement, self.stage
        if agreement is None or agreement.labels == "none" or stage.is_last:
            return
        received = agreement.relays_label_to(stage.stage_index)
        if not received and self.label_fn is None and batch.targets is None:
            raise ValueError(
                f"stage {stage.stage_index} passed target= at the first step, so its predictor needs one at every "
                f"step(): pass target=, or labels='none'"
            )

    def _check_input_is_there(self, batch: Batch) -> None:
        if self.agreement is not None and self.forward_unlocked is not None and _meta_of_input(batch) is None:
            raise ValueError(missing(dist.get_rank(), self.stage.stage_index))

    def label(self, batch: Batch, microbatch: int) -> Tensor | None:
        """What this stage's predictor is told of one microbatch, where it is not relayed from the stage before."""
        if self.agreed.labels == "none" or self.stage.is_last:
            return None
        label = self._own_label(batch, microbatch)
        assert label is not None, "prepare() has seen to it"
        # a copy: the predictor still needs it when the caller may have reused the memory
        label = label.detach().clone()
        if self.agreed.num_classes and not self.agreed.num_classes_told:
            label.masked_fill_(label >= self.agreed.num_classes, NO_LABEL)
        return label

    def _own_label(self, batch: Batch, microbatch: int) -> Tensor | None:
        if self.label_fn is not None:
            label = self.label_fn(*batch.args[microbatch], **batch.kwargs[microbatch])
        elif batch.targets is not None:
            label = batch.targets[microbatch]
        else:
            return None
        unsigned = is_integer(label.dtype) and not label.dtype.is_signed  # could not hold NO_LABEL
        return label.long() if unsigned else label


def _meta_of_input(batch: Batch) -> TensorMeta | None:
    """Of the net's input of one microbatch, its first argument, where this rank has it."""
    first = batch.args[0][0] if batch.args[0] else None
    return TensorMeta(tuple(first.shape), first.dtype) if isinstance(first, Tensor) else None
