"""The trainer: one config in, one folder out. Trains under a schedule, writes text, then trains as long under others.

    load_config -> Trainer(config, num_stages) -> init_process_group -> run(device)
                   refuses what cannot work                            every rank, together

Rank 0 reports, from what it knows itself: the loss comes home beside the gradients.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from . import report
from .checkpoint import save_checkpoint
from .config import Config, ScheduleName
from .data import ByteCorpus, byte_corpus, stdlib_sources
from .generate import generate, printable
from .observe.metrics import MetricsFile
from .observe.progress import Progress
from .observe.trace import Span
from .pace import Beat, Pace
from .partition.sequential import split_sequential
from .worker import Worker, make_model


class Trainer:
    """Checks, before there is any process group, all that a config asks for; then runs it.

    Args:   num_stages: the number of ranks.
    Raises: ValueError, which names the setting: a schedule that cannot run so few microbatches, a factory that does
            not make the model, fewer layers than stages, too little text.
    """

    def __init__(self, config: Config, num_stages: int) -> None:
        self.config = config
        schedules = [config.pipeline.schedule, *config.run.compare_with]
        if "1F1B" in schedules and config.pipeline.num_microbatches < num_stages:
            raise ValueError(
                f"pipeline.num_microbatches = {config.pipeline.num_microbatches}: 1F1B needs at least as many as there "
                f"are stages, {num_stages}; raise it, or start fewer ranks"
            )
        split_sequential(make_model(config.model), num_stages)
        self.corpus = _read_corpus(config)

    def run(self, device: torch.device) -> list[report.Result]:
        """Does all of it. Every rank must call it. Returns one result per schedule, the same on every rank."""
        folder, rank = Path(self.config.run.output_dir), dist.get_rank()
        group = dist.new_group(backend="gloo")  # for clocks, bytes and files: small things on the CPU, on any machine
        console = Console(quiet=rank != 0, highlight=False)
        results: list[report.Result] = []
        traces: dict[str, list[Span]] = {}
        if rank == 0:
            report.clear(folder)
            (folder / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        with MetricsFile(folder / "metrics.jsonl" if rank == 0 else os.devnull) as metrics:
            for name in [self.config.pipeline.schedule, *self.config.run.compare_with]:
                console.print(f"\n[bold]{name}[/bold]")
                training = Training(self.config, name, self.corpus, device, group, metrics)
                results.append(training.train())
                traces[name] = _gather(training.spans, group)
                if len(results) == 1:
                    training.write_sample(console)
                    state = training.worker.state_dict(training.step)
                    save_checkpoint(folder / "checkpoint", rank, state, group=group)
        if rank == 0:
            self._write_traces(console, folder, traces)
            report.show(console, folder, results)
        return results

    def _write_traces(self, console: Console, folder: Path, traces: dict[str, list[Span]]) -> None:
        window = self.config.run.trace_steps
        if not window:
            return
        report.write_traces(folder, traces, num_steps=window[1] - window[0])
        for name in (name for name, spans in traces.items() if not spans):
            console.print(f"no timeline of {name}: it ended before step {window[1]}, the end of run.trace_steps")


class Training:
    """One schedule's training, from fresh weights to its result."""

    def __init__(
        self,
        config: Config,
        name: ScheduleName,
        corpus: ByteCorpus,
        device: torch.device,
        group: dist.ProcessGroup,
        metrics: MetricsFile,
    ) -> None:
        self.config, self.name, self.device, self.group, self.metrics = config, name, device, group, metrics
        self.worker = Worker(config, name, corpus, device)
        self.pace = Pace(group, every=config.run.log_every_steps, device=device)
        self.progress = Progress(total_s=config.run.train_seconds, enabled=dist.get_rank() == 0)
        self.spans: list[Span] = []
        self.step = 0

    def train(self) -> report.Result:
        """Trains for the time or the steps that the config gives; validates now and then and at the end."""
        self._train_step()  # finds shapes and warms caches up: a step as any other, but no second of it is counted
        run = self.config.run
        for until_s in pauses(run.train_seconds, run.eval_every_s):
            beat = self._stretch(until_s)
            val_bpb = self.worker.validate(self.group)
            self._log(beat.elapsed_s, beat, val_bpb=val_bpb)
            if self._all_steps_done():
                break
        self.progress.close()
        return report.Result(self.name, self.step, beat.elapsed_s, val_bpb)

    def write_sample(self, console: Console) -> None:
        """Lets the model go on from run.sample_prompt, and shows what it writes."""
        run = self.config.run
        if not run.sample_bytes:
            return
        text = generate(
            self.worker.schedule,
            run.sample_prompt.encode(),
            num_bytes=run.sample_bytes,
            batch_size=run.batch_size,
            seq_len=self.config.data.seq_len,
            temperature=run.sample_temperature,
            seed=run.seed,
            device=self.device,
            group=self.group,
        )
        title = f"{run.sample_bytes} bytes that it writes, at temperature {run.sample_temperature:g}"
        console.print(Panel(Text(printable(text)), title=title, title_align="left", width=100))

    def _stretch(self, until_s: float) -> Beat:
        """Trains until so many seconds of training are over."""
        self.pace.start(self.step, until_s=until_s)
        while not (self.pace.is_over(self.step) or self._all_steps_done()):
            self._train_step()
            if self.pace.after_step(self.step, self.worker.loss) and self.pace.newest is not None:
                self._log(self.pace.elapsed_s, self.pace.newest)
        return self.pace.stop(self.step, self.worker.loss)

    def _all_steps_done(self) -> bool:
        return 0 < self.config.run.steps <= self.step

    def _train_step(self) -> None:
        window = self.config.run.trace_steps or [0, 0]
        self.worker.trace.enabled = window[0] <= self.step < window[1]
        self.worker.train_step(self.step)
        self.step += 1
        if self.step == window[1]:
            self.spans = self.worker.spans()

    def _log(self, elapsed_s: float, beat: Beat, **measured: float) -> None:
        if dist.get_rank():
            return
        news = self.worker.news()
        if news["loss"] is None and math.isfinite(beat.loss):
            news |= {"loss": beat.loss, "loss_step": beat.loss_step}
        bytes_per_s = self.config.run.batch_size * self.config.data.seq_len / beat.step_s
        shown = {"bytes_per_s": bytes_per_s, "elapsed_s": elapsed_s}
        self.metrics.write({"schedule": self.name, "step": self.step, **news, **shown, **measured})
        self.progress.update(step=self.step, loss=news["loss"], cosine=news["cosine"], **shown)


def pauses(train_seconds: float, every_s: float) -> Iterator[float]:
    """The seconds of training at which it pauses to validate, the last of them its end; without end if that is 0."""
    total_s = train_seconds or math.inf
    times = itertools.count(every_s, every_s) if every_s else iter(())
    # none within half a stretch of the end: two validations of nearly the same weights say nothing
    yield from itertools.takewhile(lambda time_s: time_s < total_s - every_s / 2, times)
    yield total_s


def _read_corpus(config: Config) -> ByteCorpus:
    data = config.data
    paths = [Path(path) for path in data.files] or stdlib_sources()
    try:
        corpus = byte_corpus(paths, max_bytes=int(data.max_mb * 1e6))
        for split in ("train", "validation"):
            corpus.batch(split, step=0, batch_size=1, seq_len=data.seq_len, seed=0)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.files, data.max_mb or data.seq_len: {error}") from error
    return corpus


def _gather(spans: list[Span], group: dist.ProcessGroup) -> list[Span]:
    """The spans of all ranks, on rank 0."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(spans, everyone, dst=0, group=group)
    return [span for of_rank in everyone or [] for span in of_rank]
