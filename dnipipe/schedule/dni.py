"""ScheduleDNI: torch's pipeline schedule, without the bubble.

    ScheduleDNI(stage, n_microbatches=M, loss_fn=f).step(x, target=y)        # where Schedule1F1B stood

    1F1B, stage 0   F0 F1 .. B0 .. B1      (waits for stage 1 to answer)
    DNI,  stage 0   F0 B0 F1 B1 F2 B2      (B0 uses a predicted gradient; the true one comes beside h2 and teaches)

The class only translates between torch's stage and `Flow`, which holds the algorithm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from ..boundary import BoundaryError
from ..observe.trace import Trace
from . import torch_names
from .arguments import check_arguments
from .assembly import InterfaceChoice, as_list
from .choose import choose_late_weights
from .evaluation import evaluate
from .flow import Flow
from .forward_unlocked import ForwardUnlocked, Start
from .late import LateFlow
from .policy import AUTO, DEFAULT_LAG, Policy
from .preparation import Batch, Preparation
from .standing import NOT_STARTED
from .unlocked_flow import UnlockedFlow
from .watch import Watch


class ScheduleDNI(PipelineScheduleSingle):
    """A drop-in for torch's Schedule1F1B whose stages never wait for a gradient.

    Args (the first seven as torch's Schedule1F1B):
      stage: a torch PipelineStage, one per rank. n_microbatches: M, any number >= 1, also below the number of stages.
      interface: how to predict the gradient at this stage's output: a name ("linear", "mlp", "conv", "local_head",
        "scaled_head", "sampled_head", "transformer", "potential"), an Interface or any module called as
        module(activation, label), one per output that needs a gradient; None chooses by the activation and the label.
      interface_optimizer: parameters -> Optimizer of the predictors; None: Adam, each at its own rate.
      policy: "wait" (true gradients, as 1F1B), "synthetic", "stale" (the true gradient, when it is here), "corrected"
        (synthetic at once, true - synthetic later), or "auto", by stages, microbatches and `optimizer` (choose.py). Or
        one after the other: "wait:200,synthetic:800,stale" is wait for 200 step() calls, synthetic for 800 more, then
        stale. What is under way when one ends is completed: predictors learn from it, its backwards join the next
        update. stale and corrected refuse FSDP and hooks on parameters, which would not see their copies (late.py).
      unlock_after_steps: step() calls under wait before a policy of one name; None: none, for auto what it chooses.
      optimizer: of the weights, "AdamW" or "Muon", which each auto goes by; None: another.
      in_flight: microbatches that each stage but the last holds under stale and corrected, or the first alone; "auto"
        measures how many hide the transfers; None: the least, num_stages - i on stage i (Policy).
      late_weights: of a late backward: "auto", "predicted", "predicted*2" or "predicted@3", "old", "new" (Policy).
        steps_per_update: step() calls for each step of the optimizer. master_weights: float32 copies that it moves, by
        parameter, where parameters are in half precision; predictions are made of them.
      lag: microbatches, at least 1, until the true gradient trains a predictor; also how far a stage may lead.
      transport: what carries the exchanges: "group" (the process group: NCCL, gloo), "direct" (copies between GPUs of
        one host, which occupy no multiprocessor), "auto" (direct where all stages share one GPU, else group).
      post_ahead: whether the receive of a step's first activation is posted before that step begins; None: not over
        NCCL, where it hides one transfer per step, but is work of the GPU: torch.cuda.synchronize() followed by a
        barrier never returns then, unless every rank calls flush() before.
      num_classes: of the labels; None reads it off the last stage's output.
      labels: "local" (every rank passes target=), "relay" (the first stage's travel with the activations), "none";
        "auto" takes what is there. label_fn: derives them on the first stage, as label_fn(*args, **kwargs) of one
        microbatch.
      forward_unlocked: under policy synthetic a stage may start from a synthetic input while the real one is late;
        every rank then passes the net's input, as in step(x, target=y).
      check_every_steps: how often, in step() calls, the stages agree by one small all-reduce whether to fall back to
        `wait`; the only collective across stages after the first step. 0: never. fall_back: False only warns.
      timeout_s: seconds that a rank waits for a neighbour. data_parallel_groups: where this stage's replicas are; None
        finds DDP and FSDP2. trace: records what this rank does when.
    Raises: ValueError for bad values; BoundaryError (rank, stage, microbatch, peer, seconds) when a neighbour is lost.
    Source: Jaderberg et al. 2016, Decoupled Neural Interfaces using Synthetic Gradients.
    """

    def __init__(
        self,
        stage: Any,
        n_microbatches: int,
        loss_fn: Callable[..., Tensor] | None = None,
        args_chunk_spec: Any = None,
        kwargs_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        scale_grads: bool = True,
        *,
        interface: InterfaceChoice = None,
        interface_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        policy: str = "auto",
        lag: int = DEFAULT_LAG,
        unlock_after_steps: int | None = None,
        transport: str = "auto",
        post_ahead: bool | None = None,
        in_flight: int | Sequence[int] | str | None = None,
        late_weights: str = AUTO,
        steps_per_update: int = 1,
        master_weights: Mapping[nn.Parameter, Tensor] | None = None,
        optimizer: str | None = None,
        num_classes: int | None = None,
        labels: str = "auto",
        label_fn: Callable[..., Tensor] | None = None,
        forward_unlocked: ForwardUnlocked | None = None,
        check_every_steps: int = 100,
        fall_back: bool = True,
        timeout_s: float = 600.0,
        data_parallel_groups: Sequence[dist.ProcessGroup] | None = None,
        trace: Trace | None = None,
    ) -> None:
        weights = (choose_late_weights(late_weights, optimizer), steps_per_update)
        self.policy = Policy(policy, lag, unlock_after_steps, post_ahead, in_flight, *weights)
        choices = (labels, transport, check_every_steps, timeout_s, optimizer, forward_unlocked)
        check_arguments(stage, self.policy, n_microbatches, *choices, interface_optimizer)
        super().__init__(
            stage, n_microbatches, loss_fn, args_chunk_spec, kwargs_chunk_spec, output_merge_spec, scale_grads
        )
        device = torch.device(stage.device)
        self.trace = trace or Trace(rank=dist.get_rank(), stage=stage.stage_index, device=device, enabled=False)
        self._preparation = Preparation(
            policy=self.policy,
            given=as_list(interface),
            interface_optimizer=interface_optimizer,
            num_classes=num_classes,
            labels=labels,
            label_fn=label_fn if stage.is_first else None,
            timeout_s=timeout_s,
            trace=self.trace,
            check_every_steps=check_every_steps,
            fall_back=fall_back,
            data_parallel_groups=data_parallel_groups,
            transport=transport,
            optimizer=optimizer,
            master_weights=master_weights,
            forward_unlocked=forward_unlocked,
            stage=stage,
        )
        groups = [stage.group, *self._preparation.replicas]
        self._watch = Watch(check_every_steps, fall_back, groups, timeout_s)
        self._failure: BaseException | None = None
        self._flow: Flow | None = None
        self._resume: dict[str, Any] | None = None

    def _step_microbatches(
        self,
        arg_mbs: list[Any] | None = None,
        kwarg_mbs: list[Any] | None = None,
        target_mbs: list[Any] | None = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """What torch's step() and eval() call, with the microbatches split."""
        args, kwargs = torch_names.check_inputs(self, arg_mbs, kwarg_mbs, target_mbs, losses)
        batch = Batch(args, kwargs, target_mbs, return_outputs, loss_kwargs)
        if self._failure is not None:
            raise RuntimeError(
                f"an earlier step failed in the middle ({self._failure!r}) and lost its microbatches: build the "
                f"schedule anew on every rank and load the last state"
            ) from self._failure
        flow = self._flow = self._preparation.prepare(self, self._flow, batch)
        with self._watching_for_failure():
            if self._has_backward:
                self._restore()
                self._train(flow, batch)
            else:
                evaluate(self, flow, batch, self.trace)
            flow.confirm()
            torch_names.publish_losses(self, losses)
            if self._has_backward:
                flow.join()
                self._stage.perform_reduce_grad(self._n_microbatches if self.scale_grads else 1)
                flow.end_step()
                self._watch.after_step(flow)

    @contextmanager
    def _watching_for_failure(self) -> Iterator[None]:
        """A lost neighbour: says where this rank stands. Whatever fails in here leaves messages that nobody takes."""
        try:
            yield
        except BaseException as failure:
            self._failure = failure
            if isinstance(failure, BoundaryError):
                print(self.dump_state(), file=sys.stderr, flush=True)
            raise

    def _train(self, flow: Flow, batch: Batch) -> None:
        flow.begin_step()
        if isinstance(flow, LateFlow) and flow.late:
            for microbatch in range(self._n_microbatches):
                self._forward(flow, batch, microbatch)
                needs_grad = self._preparation.agreed.needs_grad
                flow.hold(*torch_names.take_graph(self._stage, microbatch, needs_grad))
            return
        with flow.step_weights():
            for slot in range(self._n_microbatches + flow.delay):
                if slot < self._n_microbatches:
                    self._forward(flow, batch, slot)
                else:
                    flow.send_nothing()
                if slot >= flow.delay:
                    self._backward(flow, slot - flow.delay)

    def _forward(self, flow: Flow, batch: Batch, microbatch: int) -> None:
        stage, agreement, received = self._stage, self._preparation.agreed, None
        if not stage.is_first:
            received = flow.receive(*batch.args[microbatch][:1])
        if received is not None and agreement.relays_label_to(stage.stage_index):
            label: Tensor | None = received.pop()
        else:
            label = self._preparation.label(batch, microbatch)
        with self.trace.span(flow.forward_span, microbatch=microbatch), flow.forward_weights():
            output, outputs = torch_names.forward(
                stage, microbatch, received, batch.args[microbatch], batch.kwargs[microbatch], save=batch.save_outputs
            )
            # on the last stage it only counts
            flow.send(outputs, agreement.needs_grad, label, agreement.relays_label_to(stage.stage_index + 1))
            if stage.is_last:
                flow.report_loss(torch_names.compute_loss(self, output, batch.targets, microbatch, batch.loss_kwargs))

    def _backward(self, flow: Flow, microbatch: int) -> None:
        loss, output_grads = None, None
        if self._stage.is_last:
            loss = torch_names.loss_for_backward(self, microbatch)
        else:
            output_grads = flow.output_grads()
        with self.trace.span("backward", microbatch=microbatch):
            last = microbatch == self._n_microbatches - 1
            needs_grad = self._preparation.agreed.needs_grad
            grads = torch_names.backward(self._stage, microbatch, output_grads, needs_grad, loss, last=last)
        flow.give(grads)
        flow.settle()

    def flush(self) -> None:
        """Takes in all true gradients still on their way, and lets the predictors learn from them.

        Every rank must call it after the same step(). Training goes on afterwards as if it had just begun to unlock.
        Under stale and corrected it completes the backwards under way and adds what they give to the parameters'
        gradients, scaled as step() does: optimizer.step() takes it.
        """
        if self._flow is not None:
            with self._watching_for_failure():
                self._flow.flush()
                self._flow.join(self._n_microbatches if self.scale_grads else 1)

    def reset_shapes(self) -> None:
        """Tells that the next step() has inputs of other shapes. Every rank must call it after the same step().

        Not needed where every rank passes target= and its shape changes too.
        """
        with self._watching_for_failure():
            self._preparation.reset_shapes(self, self._flow)

    def state_dict(self) -> dict[str, Any]:
        """Predictors, their optimizer, counters, what is in flight. Every rank must call it.

        Saving changes nothing, but under stale and corrected, whose graphs cannot be saved: there it completes the
        backwards under way, and what they give joins the next step's update, here as in a run that goes on from this.
        """
        if self._flow is None or self._resume is not None:
            return self._resume or {}
        with self._watching_for_failure():
            chosen = self._preparation.in_flight_chosen
            return {"flow": self._flow.state_dict(), "watch": self._watch.state_dict(), "in_flight": chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was called. Every rank must call it, before its next step()."""
        self._resume = state or None
        if self.policy.in_flight == AUTO and state.get("in_flight"):
            self._preparation.choose_in_flight(state["in_flight"], self._flow)
        if self._flow is not None and self._preparation.agreement is not None:
            self._restore()

    def _restore(self) -> None:
        """Before the first step there are no predictors to restore, so a state that was loaded waits until then."""
        if self._resume is not None and self._flow is not None:
            self._flow.load_state_dict(self._resume["flow"])
            self._watch.load_state_dict(self._resume["watch"], self._flow.device)
            self._resume = None

    @property
    def early_starts(self) -> tuple[Start, ...]:
        """What this stage began from synthetic inputs, the newest 65536; as late= (all stages') they repeat the run."""
        return tuple(self._flow.early_starts) if isinstance(self._flow, UnlockedFlow) else ()

    @property
    def metrics(self) -> dict[str, float | int | str]:
        """step, policy, loss (the newest true mean loss of a step known here, nan before the first) and its loss_step,
        cosine and r2 of the predictors, in_flight (true gradients outstanding), wait_s (for neighbours); of synthetic
        inputs early_starts (how many), early_in_step ("0 2": of the last step), input_r2. Waits for the device."""
        return dict(NOT_STARTED) if self._flow is None else self._flow.metrics()

    def dump_state(self) -> str:
        """One line that says where this rank stands, for a log."""
        flow, stage = self._flow, self._stage
        where = f"[dnipipe] rank {dist.get_rank()}, stage {stage.stage_index} of {stage.num_stages}"
        return f"{where}: not started" if flow is None else f"{where}: {flow.describe()}"
