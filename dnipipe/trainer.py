"""The trainer: one config in, one folder out. Trains under a schedule, writes text, then trains as long under others.

    load_config -> Trainer(config, num_stages) -> init_process_group -> run(device)
                   refuses what cannot work                            every rank, together

Rank 0 reports, from what it knows itself: the loss comes home beside the gradients. Started again it goes on from the
newest checkpoint, or from the next schedule; batches are a function of seed and step, so nothing else is missing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from . import report
from .checkpoint import CheckpointFolder, load_stage, newest_step
from .config import Config, ScheduleName
from .data import Corpus, open_corpus
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
            not make the model, fewer layers than stages, too little text, a folder with checkpoints of another run.
    """

    def __init__(self, config: Config, num_stages: int) -> None:
        self.config = config
        self.schedules = [config.pipeline.schedule, *config.run.compare_with]
        if len(set(self.schedules)) < len(self.schedules):
            raise ValueError(
                f"run.compare_with = {config.run.compare_with}: it must name other schedules than pipeline.schedule = "
                f"{config.pipeline.schedule}, each once"
            )
        if "1F1B" in self.schedules and config.pipeline.num_microbatches < num_stages:
            raise ValueError(
                f"pipeline.num_microbatches = {config.pipeline.num_microbatches}: 1F1B needs at least as many as there "
                f"are stages, {num_stages}; raise it, or start fewer ranks"
            )
        split_sequential(make_model(config.model), num_stages)
        self.corpus = read_corpus(config)
        report.refuse_another_run(config)

    def run(self, device: torch.device) -> list[report.Result]:
        """Does all of it. Every rank must call it. Returns one result per schedule, the same on every rank."""
        folder, rank = Path(self.config.run.output_dir), dist.get_rank()
        group = dist.new_group(backend="gloo")  # for clocks, bytes and files: small things on the CPU, on any machine
        console = Console(quiet=rank != 0, highlight=False)
        results: list[report.Result] = []
        traces: dict[str, list[Span]] = {}
        if rank == 0:
            self._begin(folder)
        for name in self.schedules:
            console.print(f"\n[bold]{name}[/bold]")
            training = Training(self.config, name, self.corpus, device, group)
            result = training.resume(console)
            if result is None:
                with MetricsFile(folder / report.METRICS if rank == 0 else os.devnull) as metrics:
                    result = training.train(metrics)
                if not results:
                    training.write_sample(console)
                training.finish(result)
            results.append(result)
            traces[name] = _gather(training.spans, group)
        if rank == 0:
            self._write_traces(console, folder, traces)
            report.show(console, folder, results)
        return results

    def _begin(self, folder: Path) -> None:
        """Rank 0, before any other rank looks: clears the folder, unless there is something in it to go on from."""
        newest = newest_step(folder / report.CHECKPOINTS / self.schedules[0])
        if newest is None or self.config.run.resume == "never":
            report.clear(folder)
        report.write_whole(folder / report.CONFIG, self.config.to_yaml())

    def _write_traces(self, console: Console, folder: Path, traces: dict[str, list[Span]]) -> None:
        window = self.config.run.trace_steps
        if not window:
            return
        report.write_traces(folder, traces, num_steps=window[1] - window[0])
        for name in (name for name, spans in traces.items() if not spans):
            console.print(f"no timeline of {name}: it never ran from step {window[0]} to {window[1]} without a stop")


class Training:
    """One schedule's training, from fresh weights to its result."""

    def __init__(
        self,
        config: Config,
        name: ScheduleName,
        corpus: Corpus,
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        self.config, self.name, self.device, self.group = config, name, device, group
        self.folder = Path(config.run.output_dir)
        self.checkpoints = CheckpointFolder(
            self.folder / report.CHECKPOINTS / name, keep_last=config.run.keep_last, group=group
        )
        self.worker = Worker(config, name, corpus, device)
        self.pace = Pace(group, every=config.run.log_every_steps, device=device)
        self.progress = Progress(total_s=config.run.train_seconds, enabled=dist.get_rank() == 0)
        self.spans: list[Span] = []
        self.step = self._resumed_step = 0
        self._resumed_s = 0.0
        self._saved_step: int | None = None
        self._metrics: MetricsFile | None = None
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
            state, told = load_stage(self.checkpoints, step, dist.get_rank(), worker.module, worker.cut)
            self.step = self._resumed_step = worker.load_state_dict(state)
            self._saved_step = step if told is None else None
            self._resumed_s = _from_rank_0(state["elapsed_s"], self.group)
            self.pace.resume(self._resumed_s)
            self.spans = [] if told else [Span(*values) for values in state["spans"]]
            console.print(f"goes on after step {step}" if told is None else f"goes on after step {step}: {told}")
        if result is None and dist.get_rank() == 0:
            report.cut_back(self.folder / report.METRICS, self.name, self.step)
        return result

    def train(self, metrics: MetricsFile) -> report.Result:
        """Trains for the time or the steps that the config gives; validates now and then and at the end."""
        self._metrics = metrics
        if not self._all_steps_done():
            self._train_step()  # finds shapes and warms caches up: a step as any other, but no second of it is counted
            self._save_if_due()
        run = self.config.run
        for until_s in pauses(run.train_seconds, run.eval_every_s, after_s=self._resumed_s):
            beat = self._stretch(until_s)
            val_bits = self.worker.validate(self.group)
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
            batch_size=run.batch_size,
            seq_len=self.config.data.seq_len,
            temperature=run.sample_temperature,
            seed=run.seed,
            device=self.device,
            group=self.group,
        )
        title = f"{run.sample_tokens} {corpus.unit}s that it writes, at temperature {run.sample_temperature:g}"
        console.print(Panel(Text(printable(corpus.decode(tokens))), title=title, title_align="left", width=100))

    def finish(self, result: report.Result) -> None:
        """Leaves a checkpoint of the end, and then the word that it is the end."""
        if self._saved_step != self.step:
            self._save()
        self.checkpoints.wait()
        if dist.get_rank() == 0:
            report.write_whole(self._end, json.dumps({"result": asdict(result), "length": self._length}))

    def _read_result(self, step: int | None) -> report.Result | None:
        """What finish() left, if the newest checkpoint is that of the end and no longer run is asked for."""
        end: dict[str, Any] = {}
        if dist.get_rank() == 0 and self._end.exists():
            end = json.loads(self._end.read_text(encoding="utf-8"))
        end = _from_rank_0(end, self.group)
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
            if self.pace.after_step(self.step, self.worker.loss) and self.pace.newest is not None:
                self._log(self.pace.elapsed_s, self.pace.newest)
            self._save_if_due()
        return self.pace.stop(self.step, self.worker.loss)

    def _all_steps_done(self) -> bool:
        return 0 < self.config.run.steps <= self.step

    def _train_step(self) -> None:
        window = self.config.run.trace_steps or [0, 0]
        self.worker.trace.enabled = window[0] <= self.step < window[1]
        self.worker.train_step(self.step)
        self.step += 1
        if self.step == window[1] and self._resumed_step <= window[0]:
            self.spans = self.worker.spans()

    def _log(self, elapsed_s: float, beat: Beat, **measured: float) -> None:
        if dist.get_rank() or self._metrics is None:
            return
        news = self.worker.news()
        if news["loss"] is None and math.isfinite(beat.loss):
            news |= {"loss": beat.loss, "loss_step": beat.loss_step}
        trained = self.step > self._resumed_step
        tokens_per_s = self.config.run.batch_size * self.config.data.seq_len / beat.step_s if trained else 0.0
        shown = {"tokens_per_s": tokens_per_s, "elapsed_s": elapsed_s}
        self._metrics.write({"schedule": self.name, "step": self.step, **news, **shown, **measured})
        self.progress.update(step=self.step, loss=news["loss"], cosine=news["cosine"], **shown)


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


def read_corpus(config: Config) -> Corpus:
    """What a config trains on. Raises: ValueError: it cannot be read, or is too little; it names the settings."""
    data = config.data
    try:
        corpus = open_corpus(
            data.kind,
            data.files,
            max_bytes=int(data.max_mb * 1e6),
            tokenizer=data.tokenizer,
            token_dtype=data.token_dtype,
            vocab_size=data.vocab_size,
        )
        for split in ("train", "validation"):
            corpus.batch(split, step=0, batch_size=1, seq_len=data.seq_len, seed=0)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"data.files, data.max_mb or data.seq_len: {error}") from error
    return corpus


def _from_rank_0(value: Any, group: dist.ProcessGroup) -> Any:
    """What rank 0 knows, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def _gather(spans: list[Span], group: dist.ProcessGroup) -> list[Span]:
    """The spans of all ranks, on rank 0."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(spans, everyone, dst=0, group=group)
    return [span for of_rank in everyone or [] for span in of_rank]
