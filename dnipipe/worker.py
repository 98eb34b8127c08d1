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
from .data import Corpus
from .observe.chunks import waits_between, watch_chunks
from .observe.trace import Span, Trace
from .optim import StageOptimizer, learning_rate_at
from .partition.recompute import recompute
from .partition.sequential import named_layers, split_sequential
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


def token_loss(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """Mean cross-entropy of a token in nats."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), target_BT.flatten())


class Worker:
    """What one rank trains under one schedule. Made anew from the same config, it starts from the same weights.

    Every rank draws the whole batch by itself, from the seed and the step: nobody sends inputs or labels.
    """

    def __init__(self, config: Config, name: ScheduleName, corpus: Corpus, device: torch.device) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        rank, num_stages = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(config.run.seed)
        stages = split_sequential(make_model(config.model), num_stages)
        self.cut = [[name for name, _ in named_layers(stage)] for stage in stages]
        """The layers of every stage, by name."""
        module = recompute(stages[rank]) if config.model.recompute else stages[rank]
        self.module = module.to(device, getattr(torch, config.model.dtype))
        self.stage = PipelineStage(self.module, rank, num_stages, device)
        self.trace = Trace(rank=rank, stage=rank, device=device, enabled=False)
        self.schedule = self._make_schedule(name)
        self.optimizer = self._make_optimizer()
        self.loss: tuple[int, Tensor] | None = None
        """The newest (step, mean loss), on the last stage."""

    def _make_schedule(self, name: ScheduleName) -> Any:
        pipeline = self.config.pipeline
        if name != "DNI":
            watch_chunks([self.stage], self.trace)
            return get_schedule_class(name)(self.stage, pipeline.num_microbatches, loss_fn=token_loss)
        return ScheduleDNI(
            self.stage,
            pipeline.num_microbatches,
            loss_fn=token_loss,
            interface=None if pipeline.interface == "auto" else pipeline.interface,
            interface_optimizer=partial(torch.optim.Adam, lr=self.config.optim.interface_learning_rate),
            policy=pipeline.policy,
            lag=pipeline.lag,
            unlock_after_steps=None if pipeline.policy == "wait" else pipeline.unlock_after_steps,
            trace=self.trace,
        )

    def _make_optimizer(self) -> StageOptimizer:
        optim = self.config.optim
        learning_rate = partial(
            learning_rate_at,
            peak=optim.learning_rate,
            warmup_steps=optim.warmup_steps,
            total_steps=self.config.run.steps,
            schedule=optim.schedule,
            final_fraction=optim.final_fraction,
        )
        return StageOptimizer(
            self.module,
            name=optim.name,
            learning_rate=learning_rate,
            weight_decay=optim.weight_decay,
            betas=(optim.betas[0], optim.betas[1]),
            clip=optim.clip,
            head=self.module[-1] if self.stage.is_last else None,
        )

    def train_step(self, step: int) -> None:
        """One optimizer step on the batch of `step`."""
        losses: list[Tensor] = []
        input_BT, target_BT = self._batch("train", step)
        self.schedule.step(*self._fed(input_BT), target=target_BT, losses=losses if self.stage.is_last else None)
        if losses:
            self.loss = (step, torch.stack([loss.detach() for loss in losses]).mean())
        with self.trace.span("optimizer"):
            self.optimizer.step(step)

    def validate(self, group: dist.ProcessGroup) -> float:
        """Bits per byte or token on validation batches, on every rank. Every rank must call it after the same step."""
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
        state = {
            "step": step,
            "cut": self.cut,
            "random": self._random_states(),
            "model": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if isinstance(self.schedule, ScheduleDNI):
            state["schedule"] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """Takes up where state_dict() was called, and returns the number of steps done. Every rank must call it."""
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.schedule, ScheduleDNI):
            self.schedule.load_state_dict(state.get("schedule", {}))
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        step: int = state["step"]
        return step

    def _random_states(self) -> dict[str, Tensor]:
        """Of the generators that a model with dropout draws from."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

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
