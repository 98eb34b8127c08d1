"""A stage's flow under DeepSpeed: opened with the engine, agreed upon in the first batch, then only driven.

The first batch is a synchronous sweep over the stages, by DeepSpeed's own sends: the first microbatch goes forward
once, so that every stage knows its shapes and all agree on labels and interfaces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..interface import Learner, TensorMeta, is_integer
from ..observe.trace import Trace
from ..schedule import assembly
from ..schedule.agreement import Agreement
from ..schedule.facts import Facts
from ..schedule.preparation import NO_LABEL
from ..schedule.watch import Watch
from .block import Block
from .stage import PipeStage, metas_of


class Flowing:
    """Args: replicas: the group of this stage's replicas, none without any. grad_scale: as Flow's.
             dynamic: whether shapes may differ from one microbatch to the next.

    Fields: flow: dnipipe's, with two boundaries. agreement: None before the first batch, and after a change of shape.
    """

    def __init__(
        self,
        block: Block,
        stage: PipeStage,
        num_microbatches: int,
        replicas: Sequence[dist.ProcessGroup],
        grad_scale: Callable[[], float],
        dynamic: bool,
    ) -> None:
        self.block, self.stage, self.replicas = block, stage, list(replicas)
        self.dynamic = dynamic
        self.policy = block.schedule_policy(may_post_ahead=not dynamic)
        self.agreement: Agreement | None = None
        trace = Trace(rank=dist.get_rank(), stage=stage.stage_index, device=stage.device, enabled=False)
        transport = "group" if dynamic else block.transport
        self.flow = assembly.open_flow(
            stage, num_microbatches, self.policy, block.timeout_s, trace, transport, announces=dynamic
        )
        self.flow.grad_scale = grad_scale
        self._watch = Watch(block.check_every_steps, block.fall_back, [stage.group, *self.replicas], block.timeout_s)
        self._resume: dict[str, Any] | None = None
        self._announced = False
        self.synthetic = False
        """Whether the current batch uses predicted gradients."""

    @property
    def agreed(self) -> Agreement:
        assert self.agreement is not None, "the stages agree in the first batch"
        return self.agreement

    def agree(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], label: Tensor | None) -> None:
        """Settles what all stages must settle, from one microbatch. Every rank must call it in the same batch.

        Raises: ValueError on all ranks alike, where they contradict each other or no interface is known.
        """
        flow, stage = self.flow, self.stage
        received = () if stage.is_first else inputs
        stage.remember(received, outputs)
        agreement = assembly.agree_over(self._facts(received, outputs, label), stage)
        if not self._announced:
            self._say(agreement.summary)
        self.agreement, self._announced = agreement, True
        flow.policy = agreement.policy
        assembly.set_metas(flow, stage, agreement)
        if flow.learner is None and agreement.interfaces:
            flow.learner = self._learner(agreement)
        self._restore()

    def _learner(self, agreement: Agreement) -> Learner:
        rate = self.block.interface_learning_rate
        optimizer = partial(torch.optim.Adam, lr=rate) if rate is not None else None
        learner = assembly.build_learner(self.stage, agreement, self.block.interfaces, optimizer, self.replicas)
        if rate is None:
            self._say(f"predictors begin at their own rates, here {learner.own_rates}")
        return learner

    def _say(self, text: str) -> None:
        if self.stage.is_first and dist.get_rank() == 0:
            print(f"[dnipipe] {text}", file=sys.stderr, flush=True)

    def _facts(self, received: Sequence[Tensor], outputs: Sequence[Tensor], label: Tensor | None) -> Facts:
        return Facts(
            rank=dist.get_rank(),
            stage=self.stage.stage_index,
            num_microbatches=self.flow.num_microbatches,
            policy=self.policy,
            labels=self.block.labels,
            has_label_fn=False,
            has_target=label is not None,
            label=TensorMeta(tuple(label.shape), label.dtype) if label is not None else None,
            outputs=metas_of(outputs),
            inputs_needing_grad=tuple(tensor.is_floating_point() for tensor in received),
            interfaces=self.block.interfaces,
            num_classes=self.block.num_classes,
            check_every_steps=self.block.check_every_steps,
            fall_back=self.block.fall_back,
            no_graphs="DeepSpeed's optimizers write weights in place",
        )

    def label(self, batch: Any) -> Tensor | None:
        """What the first stage's iterator gave beside the input: a tensor, or the first of several; None: neither."""
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        if isinstance(labels, tuple | list):
            labels = next(iter(labels), None)
        if not isinstance(labels, Tensor):
            return None
        # a copy: the predictor still needs it when the caller may have reused the memory
        label = labels.detach().to(self.stage.device, copy=True)
        unsigned = is_integer(label.dtype) and not label.dtype.is_signed  # could not hold NO_LABEL
        return label.long() if unsigned else label

    def told(self, label: Tensor | None) -> Tensor | None:
        """What this stage's predictor is told, given the label of its own batch."""
        if self.agreed.labels == "none" or self.stage.is_last:
            return None
        if label is None:
            raise ValueError(
                f"stage {self.stage.stage_index}: the first batch had labels, this one has none, and the predictors "
                f'need one for each microbatch: give a tensor as batch[1], or set "dnipipe.labels": "none"'
            )
        if self.agreed.num_classes and not self.agreed.num_classes_told:
            label.masked_fill_(label >= self.agreed.num_classes, NO_LABEL)
        return label

    def check_shapes(self, outputs: Sequence[Tensor]) -> None:
        """Raises: ValueError: this stage's outputs are not as agreed, and the next stage waits for those."""
        if self.dynamic:
            return
        agreed = tuple((torch.Size(meta.shape), meta.dtype) for meta in self.stage.outputs)
        if metas_of(outputs) != agreed:
            was, now = ([f"{tuple(shape)} {dtype}" for shape, dtype in metas] for metas in (agreed, metas_of(outputs)))
            raise ValueError(
                f"stage {self.stage.stage_index}: the outputs of one microbatch were {', '.join(was)} and are "
                f"{', '.join(now)}: call engine.reset_activation_shape() on every rank before the first batch of "
                f"another shape, drop a last, smaller microbatch of the data, or build the PipelineModule with "
                f"dynamic_shape=True"
            )

    def begin_batch(self) -> None:
        self.synthetic = not self.flow.waits
        self.flow.begin_step()

    def end_batch(self) -> None:
        self.flow.confirm()
        self.flow.end_step()
        self._watch.after_step(self.flow)

    def forget_shapes(self) -> None:
        """The next batch sweeps anew; what is in flight has the old shapes, and is completed."""
        self.flow.drain()
        self.agreement = None

    def set_num_microbatches(self, num_microbatches: int) -> None:
        """From the next batch on. Every rank must call it after the same batch."""
        if num_microbatches != self.flow.num_microbatches:
            self.flow.drain()
            self.flow.num_microbatches = num_microbatches

    def state_dict(self) -> dict[str, Any]:
        """Predictors, their optimizer, counters, what is in flight. Saving changes nothing. Every rank must call it."""
        return self._resume or {"flow": self.flow.state_dict(), "watch": self._watch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where state_dict() was called. Every rank must call it, before its next batch."""
        self._resume = state
        if self.agreement is not None:
            self._restore()

    def _restore(self) -> None:
        """Before the first batch there are no predictors to restore, so a state that was loaded waits until then."""
        if self._resume is not None:
            self.flow.load_state_dict(self._resume["flow"])
            self._watch.load_state_dict(self._resume["watch"], self.flow.device)
            self._resume = None
