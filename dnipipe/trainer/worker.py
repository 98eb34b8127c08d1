"""One rank's part of a training run: its stage of the model, its optimizer, and the schedule that joins the stages."""

from __future__ import annotations

import math
import resource
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn.parallel import DistributedDataParallel

from ..config import Config, ScheduleName
from ..data import Corpus
from ..observe.chunks import waits_between, watch_chunks
from ..observe.trace import Span, Trace
from ..optim import Clip, StageClip, StageOptimizer, TravellingClip, learning_rate_at
from ..partition import Tie, cut_sequential, part_ties, shared_names
from ..partition.recompute import recompute
from ..partition.sequential import named_layers
from ..schedule import ScheduleDNI, TiedWeights
from ..schedule.torch_names import mend_ddp
from .facts import Facts
from .groups import Groups
from .model import token_loss
from .policy import policy_of
from .unlocked import unlocked_of


class Worker:
    """What one rank trains under one schedule.

    Args: lengths: layers of each stage. model: the whole, with its first weights; this rank keeps its stage of it.

    Every rank draws the whole batch by itself, from the seed and the step: nobody sends inputs or labels.
    """

    def __init__(
        self,
        config: Config,
        name: ScheduleName,
        corpus: Corpus,
        device: torch.device,
        groups: Groups,
        lengths: list[int],
        model: nn.Sequential,
    ) -> None:
        self.config, self.corpus, self.device, self.groups = config, corpus, device, groups
        self.layout = layout = groups.layout
        self.shared = shared_names(model)
        stages = cut_sequential(model, lengths)
        ties = part_ties(stages)
        self.cut = [[name for name, _ in named_layers(stage)] for stage in stages]
        """The layers of every stage, by name."""
        self.module = self._own(stages[layout.stage])
        self.stage = PipelineStage(
            self._replicated(self.module), layout.stage, layout.num_stages, device, group=groups.pipeline
        )
        self.trace = Trace(rank=layout.rank, stage=layout.stage, device=device, enabled=False)
        self.tied: dict[str, TiedWeights] = {}
        """By the name of the weight on the earlier of its two stages."""
        for tie in ties:
            self._tie(tie)
        self.optimizer = self._make_optimizer()
        self.unlocked = unlocked_of(config, corpus.vocab_size, layout.stage) if name == "DNI" else None
        self.schedule = self._make_schedule(name)
        self.loss: tuple[int, Tensor] | None = None
        """The newest (step, mean loss), on the last stage."""
        self._waited_in_validation_s = 0.0

    def _own(self, stage: nn.Sequential) -> nn.Sequential:
        """This rank's stage on its device."""
        model = self.config.model
        module = (recompute(stage) if model.recompute else stage).to(self.device, getattr(torch, model.dtype))
        if model.compile:
            for _, layer in named_layers(module):
                layer.compile()  # one by one: blocks are alike, so that one compilation serves all of them
        return module

    def _replicated(self, module: nn.Sequential) -> nn.Module:
        """The module, whose gradients are averaged over the replicas if there are several."""
        if self.groups.replicas is None or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        return DistributedDataParallel(module, process_group=self.groups.replicas)

    def _make_schedule(self, name: ScheduleName) -> Any:
        pipeline, policy = self.config.pipeline, policy_of(self.config)
        rate = self.config.optim.interface_learning_rate
        if name != "DNI":
            watch_chunks([self.stage], self.trace)
            schedule = get_schedule_class(name)(
                self.stage, pipeline.num_microbatches, loss_fn=token_loss, scale_grads=self._accumulate == 1
            )
            mend_ddp(schedule)
            return schedule
        return ScheduleDNI(
            self.stage,
            pipeline.num_microbatches,
            loss_fn=token_loss,
            interface=None if pipeline.interface == "auto" else pipeline.interface,
            interface_optimizer=partial(torch.optim.Adam, lr=rate) if rate is not None else None,
            policy=policy.name,
            lag=policy.lag,
            in_flight=policy.in_flight,
            late_weights=policy.late_weights,
            steps_per_update=self._accumulate,
            master_weights=self.optimizer.masters,
            unlock_after_steps=policy.unlock_after_steps,
            optimizer=self.config.optim.name,
            transport=pipeline.transport,
            forward_unlocked=self.unlocked,
            scale_grads=self._accumulate == 1,
            trace=self.trace,
        )

    @property
    def _accumulate(self) -> int:
        return self.config.pipeline.accumulate

    def _tie(self, tie: Tie) -> None:
        """Makes this rank's end of a weight that two stages share, if it has one. Every rank must call it."""
        ends = (tie.first_stage, tie.last_stage)
        group = self.groups.pair(ends)
        if group is None:
            return
        here = self.layout.stage
        name, there = (tie.first_name, ends[1]) if here == ends[0] else (tie.last_name, ends[0])
        self.tied[tie.first_name] = TiedWeights(
            self.module.get_parameter(name), group, stage=here, peer=self.layout.rank_of(there), peer_stage=there
        )

    def _make_optimizer(self) -> StageOptimizer:
        optim = self.config.optim
        clip: Clip = StageClip(optim.clip)
        if optim.clip_by == "travelling":
            clip = TravellingClip(optim.clip, self.groups.norms)
        return StageOptimizer(
            self.module,
            name=optim.name,
            learning_rate=self.learning_rate,
            weight_decay=optim.weight_decay,
            betas=(optim.betas[0], optim.betas[1]),
            clip=clip,
            head=self.module[-1] if self.stage.is_last else None,
            alone=[tied.weight for tied in self.tied.values()],
        )

    def learning_rate(self, step: int) -> float:
        """Of the weights, in one step."""
        optim = self.config.optim
        return learning_rate_at(
            step,
            peak=optim.learning_rate,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.run.steps,
            schedule=optim.schedule,
            final_fraction=optim.final_fraction,
        )

    def train_step(self, step: int) -> None:
        """One optimizer step on the batch of `step`."""
        self._seed(step)
        losses: list[Tensor] = []
        parts = (batch.chunk(self._accumulate) for batch in self._batch("train", step))
        for input_BT, target_BT in zip(*parts, strict=True):
            of_pass: list[Tensor] | None = [] if self.stage.is_last else None
            self.schedule.step(*self._fed(input_BT), target=target_BT, losses=of_pass)
            losses += [loss.detach() for loss in of_pass or ()]
        if losses:
            self.loss = (step, torch.stack(losses).mean())
        for tied in self.tied.values():
            tied.after_backward()
        with self.trace.span("optimizer"):
            # the schedule makes a mean of one pass itself
            passes = self._accumulate
            self.optimizer.step(step, divide_by=1 if passes == 1 else passes * self.config.pipeline.num_microbatches)

    def _seed(self, step: int) -> None:
        """What dropout draws depends on seed, step and rank alone, so that a checkpoint need not hold it."""
        source = (self.config.run.seed, step, self.layout.rank)
        (seed,) = np.random.SeedSequence(source).generate_state(1, np.uint64)
        torch.manual_seed(int(seed) >> 1)

    def validate(self) -> float:
        """Bits per byte or token on validation batches, on every rank. Every rank must call it after the same step."""
        waited_s = self._waited_s()
        total = torch.zeros(1, dtype=torch.float64)
        self.module.eval()
        for step in self.validation_steps():
            losses: list[Tensor] = []
            parts = [batch.chunk(self._accumulate) for batch in self._batch("validation", step)]
            for input_BT, target_BT in zip(*parts, strict=True):
                of_pass: list[Tensor] | None = [] if self.stage.is_last else None
                with torch.no_grad():
                    self.schedule.eval(*self._fed(input_BT), target=target_BT, losses=of_pass)
                losses += of_pass or []
            if losses:
                total += torch.stack(losses).mean().double().cpu()
        self.module.train()
        self._waited_in_validation_s += self._waited_s() - waited_s
        dist.all_reduce(total, group=self.groups.everyone)
        return total.item() / (self.config.run.eval_batches * self.layout.num_replicas * math.log(2))

    def validation_steps(self) -> range:
        """Which batches: run.eval_batches of them, the same each time, from all over the validation text."""
        run = self.config.run
        num_batches = len(self.corpus.validation) // (run.batch_size * self.config.data.seq_len)
        apart = max(1, num_batches // run.eval_batches)
        return range(0, apart * run.eval_batches, apart)

    def facts(self, bubble: float) -> Facts:
        """What this rank knows of itself; reads from the device, and so waits for it."""
        metrics = self.schedule.metrics if isinstance(self.schedule, ScheduleDNI) else {}
        loss_step, loss = self.loss if self.loss is not None else (math.nan, math.nan)
        if self.device.type == "cuda":
            memory_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Facts(
            loss=float(loss),
            loss_step=loss_step,
            bubble=bubble,
            memory_mb=memory_bytes / 1e6,
            grad_norm=float(self.optimizer.grad_norm),
            wait_s=self._waited_s() - self._waited_in_validation_s,
            **{name: float(metrics.get(name, math.nan)) for name in self._told},
        )

    @property
    def _told(self) -> tuple[str, ...]:
        """What facts() takes from the schedule under the name that it has there."""
        return ("cosine", "r2") if self.unlocked is None else ("cosine", "r2", "early_starts", "input_r2")

    def _waited_s(self) -> float:
        """Seconds that this rank waited for its neighbours, as far as its schedule counts them."""
        return float(self.schedule.metrics["wait_s"]) if isinstance(self.schedule, ScheduleDNI) else math.nan

    def loss_come_home(self) -> tuple[int, float] | None:
        """The newest (step, mean loss) that the gradients brought to this stage, if the schedule lets them."""
        if self.layout.num_replicas > 1 or not isinstance(self.schedule, ScheduleDNI):
            return None
        metrics = self.schedule.metrics
        loss_step = int(metrics["loss_step"])
        return None if loss_step < 0 else (loss_step // self._accumulate, float(metrics["loss"]))

    def state_dict(self, step: int) -> dict[str, Any]:
        """What this rank needs to go on after `step` steps. Every rank must call it.

        Of the replicas all but the first leave out what is the same there.
        """
        state: dict[str, Any] = {"step": step, "cut": self.cut, "num_replicas": self.layout.num_replicas}
        if isinstance(self.schedule, ScheduleDNI):
            state["schedule"] = self.schedule.state_dict()
        of_stage = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.tied:
            of_stage["tied"] = {name: tied.state_dict() for name, tied in self.tied.items()}
        return state if self.layout.replica else {**state, **of_stage}

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Takes up where state_dict() was called, and returns the number of steps done. Every rank must call it."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.schedule, ScheduleDNI):
            self.schedule.load_state_dict(state.get("schedule", {}))
        for name, tied in self.tied.items():
            if name in state.get("tied", {}):
                tied.load_state_dict(state["tied"][name])
        step: int = state["step"]
        return step

    def spans(self) -> list[Span]:
        """What the trace holds, and forgets. Of torch's own schedules the time between two pieces of work is a wait."""
        spans = self.trace.export()
        return spans if isinstance(self.schedule, ScheduleDNI) else spans + waits_between(spans)

    def _batch(self, split: Any, step: int) -> tuple[Tensor, Tensor]:
        run, layout = self.config.run, self.layout
        input_BT, target_BT = self.corpus.batch(
            split,
            step=step,
            batch_size=run.batch_size // layout.num_replicas,
            seq_len=self.config.data.seq_len,
            seed=run.seed,
            replica=layout.replica,
            num_replicas=layout.num_replicas,
        )
        return input_BT.to(self.device, non_blocking=True), target_BT.to(self.device, non_blocking=True)

    def _fed(self, input_BT: Tensor) -> list[Tensor]:
        return [input_BT] if self.stage.is_first or self.unlocked is not None else []
