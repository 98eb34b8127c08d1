"""One schedule's training, from fresh weights or the newest checkpoint to its result."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import nn

from .. import report
from ..checkpoint import CheckpointFolder, load_stage
from ..config import Config, ScheduleName
from ..data import Corpus
from ..generate import generate, printable
from ..observe.progress import Progress
from ..observe.trace import Span, idle_share
from .cut import Cut
from .facts import NUM_FACTS, record_of
from .groups import Groups
from .pace import Beat, Pace
from .speed import measure_by
from .worker import Worker


class Sink(Protocol):
    """Where lines of metrics go."""

    def write(self, record: Mapping[str, Any]) -> None: ...


class Training:
    """See above. Every rank makes one, together.

    Args: cut: where the model is cut. model: with its first weights.
    """

    def __init__(
        self,
        config: Config,
        name: ScheduleName,
        corpus: Corpus,
        device: torch.device,
        groups: Groups,
        cut: Cut,
        model: nn.Sequential,
    ) -> None:
        self.config, self.name, self.device, self.groups = config, name, device, groups
        self.folder = Path(config.run.output_dir)
        self.checkpoints = CheckpointFolder(
            self.folder / report.CHECKPOINTS / name,
            keep_last=config.run.keep_last,
            group=groups.everyone,
            writers=groups.writers,
        )
        self.worker = Worker(config, name, corpus, device, groups, cut.lengths, model)
        self.speed = measure_by(config, cut.flops_per_token, device, groups.everyone)
        self.pace = Pace(groups.everyone, every=config.run.log_every_steps, device=device, num_facts=NUM_FACTS)
        self.progress = Progress(total_s=config.run.train_seconds, enabled=groups.layout.rank == 0)
        self.spans: list[Span] = []
        self.step = self.resumed_step = 0
        self._resumed_s, self._bubble = 0.0, math.nan
        self._saved_step: int | None = None
        self._sinks: Sequence[Sink] = ()
        self._newest: dict[str, Any] = {}
        self._end = self.folder / report.CHECKPOINTS / name / "result.json"
        self._length = {"steps": config.run.steps, "train_seconds": config.run.train_seconds}

    def resume(self, console: Console) -> report.Result | None:
        """Goes on from the newest checkpoint, if there is one. Returns the result if this schedule had come to its end.

        Raises: ValueError: the checkpoint is of another model.
        """
        step = self.checkpoints.latest()
        result = self._read_result(step)
        if step is not None:
            worker = self.worker
            layout = self.groups.layout
            state, told = load_stage(
                self.checkpoints,
                step,
                layout.stage,
                worker.module,
                worker.cut,
                shared=worker.shared,
                replica=layout.replica,
                num_replicas=layout.num_replicas,
            )
            self.step = self.resumed_step = worker.load_state_dict(state)
            self._saved_step = step if told is None else None
            self._resumed_s = from_rank_0(state["elapsed_s"], self.groups.everyone)
            self.pace.resume(self._resumed_s)
            self.spans = [] if told else [Span(*values) for values in state["spans"]]
            console.print(f"goes on after step {step}" if told is None else f"goes on after step {step}: {told}")
        if result is None and dist.get_rank() == 0:
            report.cut_back(self.folder / report.METRICS, self.name, self.step)
        return result

    def first_step(self) -> None:
        """Finds shapes and warms caches up: a step as any other, but no second of it is counted."""
        if not self._all_steps_done():
            self._train_step()
            self._save_if_due()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def train(self, sinks: Sequence[Sink]) -> report.Result:
        """Trains on for the time or the steps that the config gives; validates now and then and at the end.

        Args: sinks: for metrics, on rank 0.
        """
        self._sinks = sinks
        run = self.config.run
        for until_s in pauses(run.train_seconds, run.eval_every_s, after_s=self._resumed_s):
            beat = self._stretch(until_s)
            val_bits = self.worker.validate()
            self._log(beat.elapsed_s, beat, val_bits=val_bits)
            if self._all_steps_done():
                break
        self.progress.close()
        return report.Result(self.name, self.step, beat.elapsed_s, val_bits, self.worker.corpus.unit)

    def write_sample(self, console: Console) -> None:
        """Lets the model go on from run.sample_prompt, and shows what it writes."""
        run = self.config.run
        if not run.sample_tokens:
            return
        corpus = self.worker.corpus
        tokens = generate(
            self.worker.schedule,
            corpus.encode(run.sample_prompt),
            num_tokens=run.sample_tokens,
            vocab_size=corpus.vocab_size,
            batch_size=self.config.microbatch_size * self.config.pipeline.num_microbatches,
            seq_len=self.config.data.seq_len,
            temperature=run.sample_temperature,
            seed=run.seed,
            device=self.device,
            group=self.groups.stages,
        )
        title = f"{run.sample_tokens} {corpus.unit}s that it writes, at temperature {run.sample_temperature:g}"
        console.print(Panel(Text(printable(corpus.decode(tokens))), title=title, title_align="left", width=100))

    def finish(self, result: report.Result) -> None:
        """Leaves a checkpoint of the end, and then the word that it is the end."""
        if self._saved_step != self.step:
            self._save()
        self.checkpoints.wait()
        if dist.get_rank() == 0:
            end = {"result": asdict(result), "length": self._length, "facts": self.facts(result)}
            report.write_whole(self._end, json.dumps(end))

    def facts(self, result: report.Result) -> dict[str, Any]:
        """What this training came to, for the report, on rank 0."""
        if self._end.exists() and self.step == self.resumed_step:
            facts: dict[str, Any] = json.loads(self._end.read_text(encoding="utf-8"))["facts"]
            return facts
        step_s = result.seconds / result.steps if result.steps else 0.0
        measured = {name: self._newest.get(f"{name}_by_rank") for name in ("peak_memory_mb", "bubble")}
        return {**asdict(result), **self.speed.of(step_s), **measured}

    def _read_result(self, step: int | None) -> report.Result | None:
        """What finish() left, if the newest checkpoint is that of the end and no longer run is asked for."""
        end: dict[str, Any] = {}
        if dist.get_rank() == 0 and self._end.exists():
            end = json.loads(self._end.read_text(encoding="utf-8"))
        end = from_rank_0(end, self.groups.everyone)
        if not end or end["result"]["steps"] != step or end["length"] != self._length:
            return None
        return report.Result(**end["result"])

    def _save(self) -> None:
        state = self.worker.state_dict(self.step)
        state |= {"elapsed_s": self.pace.elapsed_s, "spans": [astuple(span) for span in self.spans]}
        self.checkpoints.save(self.step, state)
        self._saved_step = self.step

    def _save_if_due(self) -> None:
        every = self.config.run.checkpoint_every_steps
        if every and self.step % every == 0:
            self._save()

    def _stretch(self, until_s: float) -> Beat:
        """Trains until so many seconds of training are over."""
        self.pace.start(self.step, until_s=until_s)
        while not (self.pace.is_over(self.step) or self._all_steps_done()):
            self._train_step()
            if self.pace.is_beat(self.step):
                self.pace.beat(self.step, self._facts())
                if self.pace.newest is not None:
                    self._log(self.pace.elapsed_s, self.pace.newest)
            self._save_if_due()
        return self.pace.stop(self.step, self._facts())

    def _facts(self) -> list[float]:
        return self.worker.facts(self._bubble).row()

    def _all_steps_done(self) -> bool:
        return 0 < self.config.run.steps <= self.step

    def _train_step(self) -> None:
        first, end = self.config.run.trace_steps or [0, 0]
        in_window = first <= self.step < end
        self.worker.trace.enabled = in_window or self.pace.is_beat(self.step + 1)
        self.worker.train_step(self.step)
        self.step += 1
        if self.step == end and self.resumed_step <= first:
            self.spans = self.worker.spans()
        elif self.worker.trace.enabled and not in_window:
            self._bubble = idle_share(self.worker.spans())

    def _log(self, elapsed_s: float, beat: Beat, **measured: float) -> None:
        """A line of metrics of what a beat said, with the loss that has come home since."""
        if self.groups.layout.rank:
            return
        facts = record_of(beat.of_ranks, self.groups.layout)
        home = self.worker.loss_come_home()
        if home is not None:
            facts |= {"loss_step": home[0], "loss": home[1] if math.isfinite(home[1]) else None}
        loss_step = facts["loss_step"]
        self._newest = {
            "schedule": self.name,
            "step": self.step,
            "elapsed_s": elapsed_s,
            "told_s": beat.elapsed_s,  # when the numbers by rank, stage and boundary were said
            **facts,
            "loss_age": None if loss_step is None else self.step - 1 - loss_step,
            **self.speed.of(beat.step_s if self.step > self.resumed_step else 0.0),
            "learning_rate": self.worker.learning_rate(self.step - 1),
            **measured,
        }
        for sink in self._sinks:
            sink.write(self._newest)
        shown = {name: self._newest[name] for name in ("step", "loss", "cosine", "tokens_per_s", "elapsed_s")}
        self.progress.update(**shown)


def pauses(train_seconds: float, every_s: float, *, after_s: float = 0.0) -> Iterator[float]:
    """The seconds of training at which it pauses to validate, the last of them its end; without end if that is 0.

    Args: after_s: only those still to come then, and the end in any case.
    """
    total_s = train_seconds or math.inf
    times = itertools.count(every_s, every_s) if every_s else iter(())
    # none within half a stretch of the end: two validations of nearly the same weights say nothing
    within = itertools.takewhile(lambda time_s: time_s < total_s - every_s / 2, times)
    yield from (time_s for time_s in within if time_s > after_s)
    yield total_s


def from_rank_0(value: Any, group: dist.ProcessGroup) -> Any:
    """What rank 0 knows, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]
