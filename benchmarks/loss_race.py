"""One rank's part of the race to 1F1B's loss: which runs there are, in which order, and what their rows say.

    the pace of every contender at every M      chooses each one's own M
    for each seed, at the given M, then at their own:
        short runs                              choose each one's learning rate (first seed)
        equal steps                             1F1B's set the marks
        other lengths, of DNI                   how short a run can be that gets to 1F1B's final loss
        equal time                              as many steps as fit in 1F1B's seconds
    the pace again                              how steady the machine was

What follows from a run follows from numbers that all ranks have alike, so all choose the same.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from benchmarks.contestants import Entry
from benchmarks.loss_rows import EQUAL_STEPS, EQUAL_TIME, LENGTH, SEARCH, LossRow, best_run, label, with_marks
from benchmarks.loss_training import Plan, Racer, Task, Validation, pace_ms, train
from benchmarks.machine import allocated, card, commit
from benchmarks.rows import write_rows
from dnipipe.data import byte_corpus
from dnipipe.schedule.policy import LATE

PACE_WARM_UPS, PACE_ROUNDS, PACE_STEPS = 3, 3, 4
MARGIN = 1.15  # of a run's time over its steps at the pace, for the steps under `wait`


@dataclass(frozen=True)
class Settings:
    """entries: who races, 1F1B first. own_microbatches: of which each takes its fastest M. search_steps: of the runs
    that choose a learning rate; None: whole runs. lengths: by `steps`. limit_s: of everything, since started_s on
    time.time()'s clock."""

    task: Task
    entries: tuple[Entry, ...]
    microbatches: int
    own_microbatches: tuple[int, ...]
    learning_rates: tuple[float, ...]
    search_steps: int | None
    steps: int
    lengths: tuple[float, ...]
    equal_time: bool
    seeds: tuple[int, ...]
    eval_every: int
    files: tuple[Path, ...]
    max_bytes: int
    started_s: float
    limit_s: float
    rows: Path
    command: str


@dataclass(frozen=True)
class Contender:
    """Who races with how many microbatches."""

    entry: Entry
    microbatches: int

    @property
    def key(self) -> tuple[str, int]:
        """As LossRow.contender."""
        return label(self.entry), self.microbatches

    def __str__(self) -> str:
        return f"{self.key[0]}, M = {self.microbatches}"


def race(rank: int, device: torch.device, settings: Settings) -> None:
    """Every rank must call it."""
    with Progress(transient=True, disable=rank != 0) as progress:
        Race(device, settings, progress).run()


class Race:
    """Fields: rows: of all runs so far, the same on every rank."""

    def __init__(self, device: torch.device, settings: Settings, progress: Progress) -> None:
        self.device, self.settings, self.progress = device, settings, progress
        self.corpus = byte_corpus(settings.files, max_bytes=settings.max_bytes)
        self.validation = Validation(settings.task, self.corpus, device)
        self.rows: list[LossRow] = []
        self._facts = self._describe()
        self._paces: dict[Contender, float] = {}
        self._afterwards: dict[Contender, float] = {}
        self._own: dict[Entry, int] = {}
        self._rates: dict[Any, float] = {}
        self._overhead_s = self._reserve_s = 0.0

    def run(self) -> None:
        self._time_all()
        given = [Contender(entry, self.settings.microbatches) for entry in self.settings.entries]
        given = [each for each in given if each in self._paces]
        own = [Contender(entry, m) for entry, m in self._own.items() if m != self.settings.microbatches]
        for seed in self.settings.seeds:
            for contenders in (given, own):
                self._race(contenders, seed)
        self._reserve_s = 0.0
        for contender in dict.fromkeys([*given, *own]):
            if self._there_is_time(self._pace_s, f"{contender}: its pace once more"):
                self._afterwards[contender] = self._pace_ms(contender)
        self._write()

    def _race(self, contenders: list[Contender], seed: int) -> None:
        settings = self.settings
        for contender in contenders:
            self._search(contender, seed)
        for contender in contenders:
            if self._best(contender, seed) is None:
                self._train(contender, seed, EQUAL_STEPS, settings.steps)
        for contender in contenders:
            for length in settings.lengths if contender.entry.schedule == "DNI" else ():
                self._train(contender, seed, LENGTH, round(length * settings.steps))
        for contender in contenders if settings.equal_time else ():
            self._train_equal_time(contender, contenders, seed)

    def _search(self, contender: Contender, seed: int) -> None:
        """Chooses the learning rate of a contender, unless that is done. Torch's schedules all compute the gradients of
        backpropagation, whatever M: theirs is 1F1B's."""
        settings, key = self.settings, self._rate_key(contender)
        if key in self._rates:
            return
        self._rates[key] = settings.learning_rates[len(settings.learning_rates) // 2]  # where time is up
        if len(settings.learning_rates) == 1:
            return
        purpose = EQUAL_STEPS if settings.search_steps is None else SEARCH
        for rate in settings.learning_rates:
            self._train(contender, seed, purpose, settings.search_steps or settings.steps, rate)
        best = best_run(self._of(contender, seed), purpose)
        if best is not None and best.learning_rate is not None:
            self._rates[key] = best.learning_rate

    @staticmethod
    def _rate_key(contender: Contender) -> Any:
        return contender if contender.entry.schedule == "DNI" else "backpropagation"

    def _train_equal_time(self, contender: Contender, rivals: Iterable[Contender], seed: int) -> None:
        """Against 1F1B at its M of this comparison; at the given one if it has no other."""
        own = next((each for each in rivals if each.entry.schedule == "1F1B"), None)
        pacemaker = own or Contender(self.settings.entries[0], self.settings.microbatches)
        run, to_beat = self._best(contender, seed), self._best(pacemaker, seed)
        if contender == pacemaker or run is None or to_beat is None or not run.seconds or not to_beat.seconds:
            return
        self._train(contender, seed, EQUAL_TIME, round(self.settings.steps * to_beat.seconds / run.seconds))

    def _best(self, contender: Contender, seed: int) -> LossRow | None:
        return best_run(self._of(contender, seed), EQUAL_STEPS)

    def _of(self, contender: Contender, seed: int) -> list[LossRow]:
        """The contender's rows."""
        return [row for row in self.rows if row.contender == contender.key and row.seed == seed]

    def _train(self, contender: Contender, seed: int, purpose: str, steps: int, rate: float | None = None) -> None:
        settings = self.settings
        rate = self._rates[self._rate_key(contender)] if rate is None else rate
        what = f"{contender}, seed {seed}: {purpose}, {steps} steps at {rate:g}"
        if not self._there_is_time(steps * self._paces[contender] / 1e3 * MARGIN + self._overhead_s, what):
            return
        start_s = time.perf_counter()
        racer, before = self._build(contender, steps, seed, rate, self._unlock(purpose, steps))
        bar = self.progress.add_task(what, total=steps)
        run = train(
            racer, self.validation, settings.eval_every, before, lambda s: self.progress.update(bar, completed=s)
        )
        self.progress.remove_task(bar)
        self._overhead_s = max(self._overhead_s, time.perf_counter() - start_s - run.seconds)
        self._say(f"{what}: {run.seconds:.1f} s, {run.bpb:.4f} bits a byte")
        fell = not math.isfinite(run.bpb)
        self.rows.append(
            self._row(
                contender,
                seed=seed,
                purpose=purpose,
                learning_rate=rate,
                unlock_after_steps=racer.plan.unlock_after_steps if contender.entry.schedule == "DNI" else None,
                steps=steps,
                seconds=run.seconds,
                step_ms=run.seconds / run.curve[-1][0] * 1e3,
                final_bpb=None if fell else run.bpb,
                peak_bytes=run.peak_bytes,
                curve=[list(point) for point in (run.curve[:-1] if fell else run.curve)],
            )
        )
        self._write()

    def _build(self, contender: Contender, steps: int, seed: int, rate: float, unlock: int) -> tuple[Racer, int]:
        """A racer, and what was on the device before it."""
        gc.collect()  # the run before is no longer there
        before = allocated(self.device)
        plan = Plan(contender.entry, contender.microbatches, rate, steps, seed, unlock)
        return Racer(plan, self.settings.task, self.corpus, self.device), before

    def _unlock(self, purpose: str, steps: int) -> int:
        """Steps under `wait` of a DNI run. A short run to choose a learning rate has as many as a whole one, at most
        half of its own: policies differ in what they do with the steep beginning, and that is not what it asks."""
        if purpose != SEARCH:
            return self.settings.task.unlock(steps)
        return min(self.settings.task.unlock(self.settings.steps), steps // 2)

    def _time_all(self) -> None:
        """The pace of all at each M, and so each one's own."""
        settings, start_s = self.settings, time.perf_counter()
        counts = dict.fromkeys([settings.microbatches, *settings.own_microbatches])
        bar = self.progress.add_task("pace", total=len(counts) * len(settings.entries))
        for entry in settings.entries:
            for contender in (Contender(entry, m) for m in counts):
                try:
                    self._paces[contender] = self._pace_ms(contender)
                    self._say(f"{contender}: {self._paces[contender]:.1f} ms a step")
                except ValueError as error:
                    if contender.microbatches == settings.microbatches:
                        reason = str(error).splitlines()[0]
                        self.rows.append(self._row(contender, seed=settings.seeds[0], refused=reason))
                self.progress.advance(bar)
            known = {m: self._paces[Contender(entry, m)] for m in counts if Contender(entry, m) in self._paces}
            if settings.own_microbatches and known:
                self._own[entry] = min(known, key=lambda m: known[m])
        self.progress.remove_task(bar)
        self._reserve_s = time.perf_counter() - start_s
        self._pace_s = self._reserve_s / (len(counts) * len(settings.entries))

    def _pace_ms(self, contender: Contender) -> float:
        steps = PACE_WARM_UPS + PACE_ROUNDS * PACE_STEPS
        racer, _ = self._build(contender, steps, 0, self.settings.learning_rates[0], unlock=0)
        return pace_ms(racer, PACE_WARM_UPS, PACE_ROUNDS, PACE_STEPS)

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            self.progress.console.print(text, highlight=False, soft_wrap=True)

    def _there_is_time(self, needed_s: float, what: str) -> bool:
        """By the clock of the first rank, which tells all."""
        settings = self.settings
        ends_s = time.time() - settings.started_s + needed_s + self._reserve_s
        answer = [ends_s <= settings.limit_s]
        dist.broadcast_object_list(answer, src=0)
        if not answer[0] and dist.get_rank() == 0:
            print(f"left out, for --limit-s {settings.limit_s:g} is used up: {what}", file=sys.stderr)
        return answer[0]

    def _write(self) -> None:
        if dist.get_rank() == 0:
            before, after = ({each.key: ms for each, ms in of.items()} for of in (self._paces, self._afterwards))
            rows = [
                replace(row, before_ms=before.get(row.contender), after_ms=after.get(row.contender))
                for row in self.rows
            ]
            write_rows(with_marks(rows, self.settings.microbatches), self.settings.rows)

    def _row(self, contender: Contender, **of_run: Any) -> LossRow:
        entry, workload = contender.entry, self.settings.task.cut(contender.microbatches)
        by_group = "nccl" if self.device.type == "cuda" else "gloo"
        return LossRow(
            schedule=entry.schedule,
            interface=entry.interface,
            policy=entry.policy,
            transport="direct" if entry.transport == "direct" else by_group,
            microbatches=contender.microbatches,
            own_microbatches=self._own.get(entry),
            microbatch_size=workload.microbatch_size,
            in_flight=self.settings.task.in_flight if entry.policy in LATE else None,
            late_weights=entry.late_weights,
            **self._facts,
            **of_run,
        )

    def _describe(self) -> dict[str, Any]:
        """What is the same for all rows."""
        settings, workload = self.settings, self.settings.task.workload
        return dict(
            device=self.device.type,
            card=card(self.device),
            optimizer=settings.task.optimizer,
            stages=workload.stages,
            seq_len=workload.seq_len,
            width=workload.width,
            blocks_per_stage=workload.blocks_per_stage,
            num_parameters=sum(p.numel() for p in self.validation.model.parameters()),
            dtype=str(workload.dtype).removeprefix("torch."),
            commit=commit(),
            torch=torch.__version__,
            date=date.today().isoformat(),
            command=settings.command,
        )
