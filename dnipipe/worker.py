"""One rank's part of a training run: its stage of the model, its optimizer, and the schedule that joins the stages."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from .config import Config, ModelConfig, ScheduleName
from .data import ByteCorpus
from .observe.chunks import waits_between, watch_chunks
from .observe.trace import Span, Trace
from .partition.sequential import split_sequential
from .schedule import ScheduleDNI


def make_model(config: ModelConfig) -> nn.Sequential:
    """Calls the factory that the config names.

    Raises: ValueError: no such module or function, or options that it does not take.
    """
    module, _, function = config.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.factory = {config.factory!r}: {error}; give module:function of a model") from error
    try:
        model: nn.Sequential = factory(**config.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.options = {config.options}: {config.factory} does not take them: {error}") from error
    return model


def byte_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Mean cross-entropy of a byte in nats."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten())


class Worker:
    """What one rank trains under one schedule. Made anew from the same config, it starts from the same weights.

    Every rank draws the whole batch by itself, from the seed and the step: nobody sends inputs or labels.
    """

    def __init__(self, config: Config, name: ScheduleName, corpus: ByteCorpus, device: torch.device) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        rank, num_stages = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.run.seed)
        self.module = split_sequential(make_model(config.model), num_stages)[rank].to(device)
        self.stage = PipelineStage(self.module, rank, num_stages, device)
        self.trace = Trace(rank=rank, stage=rank, device=device, enabled=False)
        self.schedule = self._make_schedule(name)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay
        )
        self.loss: tuple[int, Tensor] | None = None
        """The newest (step, mean loss), on the last stage."""

    def _make_schedule(self, name: ScheduleName) -> Any:
        pipeline = self.config.pipeline
        if name != "DNI":
            watch_chunks([self.stage], self.trace)
            return get_schedule_class(name)(self.stage, pipeline.num_microbatches, loss_fn=byte_loss)
        return ScheduleDNI(
            self.stage,
            pipeline.num_microbatches,
            loss_fn=byte_loss,
            interface=None if pipeline.interface == "auto" else pipeline.interface,
            interface_optimizer=partial(torch.optim.Adam, lr=self.config.optim.interface_learning_rate),
            policy=pipeline.policy,
            lag=pipeline.lag,
            unlock_after_steps=None if pipeline.policy == "wait" else pipeline.unlock_after_steps,
            trace=self.trace,
        )

    def train_step(self, step: int) -> None:
        """One optimizer step on the batch of `step`."""
        losses: list[Tensor] = []
        input_BT, target_BT = self._batch("train", step)
        self.schedule.step(*self._fed(input_BT), target=target_BT, losses=losses if self.stage.is_last else None)
        if losses:
            self.loss = (step, torch.stack([loss.detach() for loss in losses]).mean())
        optim = self.config.optim
        with self.trace.span("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = optim.learning_rate * min(1.0, (step + 1) / max(1, optim.warmup_steps))
            if optim.clip:
                # of this stage alone: a norm over all stages would make them wait for each other
                nn.utils.clip_grad_norm_(self.module.parameters(), optim.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def validate(self, group: dist.ProcessGroup) -> float:
        """Bits per byte on some validation batches, on every rank. Every rank must call it after the same step."""
        total = torch.zeros(1, dtype=torch.float64)
        self.module.eval()
        for step in self.validation_steps():
            losses: list[Tensor] = []
            input_BT, target_BT = self._batch("validation", step)
            with torch.no_grad():
                self.schedule.eval(
                    *self._fed(input_BT), target=target_BT, losses=losses if self.stage.is_last else None
                )
            if losses:
                total += torch.stack(losses).mean().double().cpu()
        self.module.train()
        dist.all_reduce(total, group=group)
        return total.item() / self.config.run.eval_batches / math.log(2)

    def validation_steps(self) -> range:
        """Which batches: run.eval_batches of them, the same each time, from all over the validation text."""
        run = self.config.run
        num_batches = len(self.corpus.validation) // (run.batch_size * self.config.data.seq_len)
        apart = max(1, num_batches // run.eval_batches)
        return range(0, apart * run.eval_batches, apart)

    def news(self) -> dict[str, Any]:
        """loss, loss_step and cosine, as far as this rank's schedule knows them, else None."""
        metrics: dict[str, Any] = self.schedule.metrics if isinstance(self.schedule, ScheduleDNI) else {}
        news = {name: metrics.get(name, math.nan) for name in ("loss", "loss_step", "cosine")}
        if math.isnan(news["loss"]):
            news["loss_step"] = math.nan
        return {name: None if math.isnan(value) else value for name, value in news.items()}

    def state_dict(self, step: int) -> dict[str, Any]:
        """What this rank needs to go on after `step` steps. Every rank must call it."""
        state = {"step": step, "model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        if isinstance(self.schedule, ScheduleDNI):
            state["schedule"] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Takes up where state_dict() was called, and returns the number of steps done. Every rank must call it."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.schedule, ScheduleDNI):
            self.schedule.load_state_dict(state.get("schedule", {}))
        step: int = state["step"]
        return step

    def spans(self) -> list[Span]:
        """What the trace holds, and forgets. Of torch's own schedules the time between two pieces of work is a wait."""
        spans = self.trace.export()
        return spans if isinstance(self.schedule, ScheduleDNI) else spans + waits_between(spans)

    def _batch(self, split: Any, step: int) -> tuple[Tensor, Tensor]:
        run = self.config.run
        input_BT, target_BT = self.corpus.batch(
            split, step=step, batch_size=run.batch_size, seq_len=self.config.data.seq_len, seed=run.seed
        )
        return input_BT.to(self.device, non_blocking=True), target_BT.to(self.device, non_blocking=True)

    def _fed(self, input_BT: Tensor) -> list[Tensor]:
        return [input_BT] if self.stage.is_first else []
