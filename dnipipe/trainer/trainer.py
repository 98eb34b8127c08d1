"""The trainer: one config in, one folder out. Trains under a schedule, writes text, then trains as long under others.

    load_config -> Trainer(config, world_size) -> init_process_group -> run(device)
                   refuses what cannot work                             every rank, together

Rank 0 reports. Started again it goes on from the newest checkpoint, or from the next schedule; batches are a function
of seed and step, so nothing else is missing.
"""

from __future__ import annotations

import importlib.util
import platform
import shlex
import sys
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from .. import report
from ..checkpoint import newest_step
from ..config import Config
from ..observe.metrics import MetricsFile
from ..observe.tensorboard import TensorBoardFile
from ..observe.trace import Span
from ..partition.balance import balanced_cuts
from .cut import FILE, Cut
from .data import read_corpus
from .groups import Groups
from .layout import stages_for
from .measure import measure
from .model import make_model
from .policy import policy_of
from .startup import Startup
from .training import Sink, Training, from_rank_0
from .unlocked import check_unlocked_config


class Trainer:
    """Checks, before there is any process group, all that a config asks for; then runs it.

    Args:   world_size: the number of ranks. startup: what the process did before.
    Raises: ValueError, which names the setting: processes that make no whole pipelines, a schedule that cannot run so
            few microbatches, a factory that does not make the model, fewer layers than stages, too little text, a
            folder with checkpoints of another run.
    """

    def __init__(self, config: Config, world_size: int, startup: Startup | None = None) -> None:
        self.config, self.startup = config, startup or Startup()
        self.num_stages = stages_for(world_size, config.pipeline.num_replicas)
        self.schedules = [config.pipeline.schedule, *config.run.compare_with]
        if len(set(self.schedules)) < len(self.schedules):
            raise ValueError(
                f"run.compare_with = {config.run.compare_with}: it must name other schedules than pipeline.schedule = "
                f"{config.pipeline.schedule}, each once"
            )
        if "1F1B" in self.schedules and config.pipeline.num_microbatches < self.num_stages:
            raise ValueError(
                f"pipeline.num_microbatches = {config.pipeline.num_microbatches}: 1F1B needs at least as many as there "
                f"are stages, {self.num_stages}; raise it, or start fewer ranks"
            )
        policy_of(config).check(self.num_stages)
        if config.run.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("run.tensorboard = True: tensorboard is not installed; pip install 'dnipipe[tensorboard]'")
        torch.manual_seed(config.run.seed)
        self._model: nn.Sequential | None = make_model(config.model)  # with the weights that the first schedule trains
        self.num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        balanced_cuts([1.0] * len(self._model), self.num_stages)
        self.corpus = read_corpus(config)
        check_unlocked_config(config, self.schedules, self.corpus.vocab_size, self.num_stages)
        report.refuse_another_run(config)
        self.startup.done("settings, model and data")

    def run(self, device: torch.device) -> list[report.Result]:
        """Does all of it. Every rank must call it. Returns one result per schedule, the same on every rank."""
        folder, rank = Path(self.config.run.output_dir), dist.get_rank()
        groups = Groups.make(self.num_stages)
        # a log has no width of its own, and the tables need more than the 80 columns that are then assumed
        console = Console(quiet=rank != 0, highlight=False, width=None if sys.stdout.isatty() else 120)
        self.startup.done("processes join")
        if rank == 0:
            self._begin(folder)
        cut = self._cut(folder, device, groups, console)
        console.print(cut.table())
        facts = self._facts(device, groups, cut)
        results: list[report.Result] = []
        traces: dict[str, list[Span]] = {}
        for name in self.schedules:
            console.print(f"\n[bold]{name}[/bold]")
            training = Training(self.config, name, self.corpus, device, groups, cut, self.take_model())
            result = training.resume(console)
            if result is None:
                result = self._train(training, folder, console, groups)
            results.append(result)
            traces[name] = _gather(training.spans, groups.everyone)
            if rank == 0:
                facts["results"].append(training.facts(result))
                report.write_facts(folder, facts)
        if rank == 0:
            self._write_traces(console, folder, traces)
            if self.config.run.report:
                report.write_page(folder)
            report.show(console, folder, results)
        return results

    def _begin(self, folder: Path) -> None:
        """Rank 0, before any other rank looks: clears the folder, unless there is something in it to go on from."""
        newest = newest_step(folder / report.CHECKPOINTS / self.schedules[0])
        if newest is None or self.config.run.resume == "never":
            report.clear(folder)
            (folder / FILE).unlink(missing_ok=True)
        report.write_whole(folder / report.CONFIG, self.config.to_yaml())

    def _cut(self, folder: Path, device: torch.device, groups: Groups, console: Console) -> Cut:
        """The cut of the run that goes on, or a new one, the same on every rank.

        Raises: ValueError: none fits; on every rank.
        """
        found: Cut | str = ""
        if groups.layout.rank == 0:
            try:
                found = Cut.read(folder, self.num_stages) or self._new_cut(folder, device, console)
            except ValueError as error:
                found = str(error)
        found = from_rank_0(found, groups.everyone)
        if isinstance(found, str):
            raise ValueError(found)
        self.startup.done("measure and split")
        return found

    def _new_cut(self, folder: Path, device: torch.device, console: Console) -> Cut:
        assert self._model is not None, "before the first schedule takes it"
        measured = measure(self.config, self._model, self.num_stages, device, console)
        cut = Cut(measured.lengths, measured.stages, measured.flops_per_token)
        report.write_whole(folder / FILE, cut.to_json())
        return cut

    def take_model(self) -> nn.Sequential:
        """The model with its first weights; made anew from the second time on, for somebody trains what is taken."""
        model, self._model = self._model, None
        if model is None:
            torch.manual_seed(self.config.run.seed)
            model = make_model(self.config.model)
        return model

    def _train(self, training: Training, folder: Path, console: Console, groups: Groups) -> report.Result:
        run, first = self.config.run, training.name == self.schedules[0]
        training.first_step()
        if first:
            self.startup.done("first step")
            console.print(self.startup.in_words(), soft_wrap=True)
        with ExitStack() as open_files:
            sinks: list[Sink] = []
            if groups.layout.rank == 0:
                sinks.append(open_files.enter_context(MetricsFile(folder / report.METRICS)))
                if run.tensorboard:
                    board = TensorBoardFile(
                        folder / report.TENSORBOARD / training.name, resumed_step=training.resumed_step
                    )
                    sinks.append(open_files.enter_context(board))
            result = training.train(sinks)
        if first:
            training.write_sample(console)
        training.finish(result)
        return result

    def _write_traces(self, console: Console, folder: Path, traces: dict[str, list[Span]]) -> None:
        window = self.config.run.trace_steps
        if not window:
            return
        report.write_traces(folder, traces, num_steps=window[1] - window[0])
        for name in (name for name, spans in traces.items() if not spans):
            console.print(f"no timeline of {name}: it never ran from step {window[0]} to {window[1]} without a stop")

    def _facts(self, device: torch.device, groups: Groups, cut: Cut) -> dict[str, Any]:
        """Of the run, for its report."""
        devices: list[Any] = [None] * dist.get_world_size()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        dist.all_gather_object(devices, f"{platform.node()}, {device}: {name}", group=groups.everyone)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda}
        return {
            "command": shlex.join(sys.argv),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {each: version for each, version in versions.items() if version},
            "devices": devices,
            "num_stages": self.num_stages,
            "num_replicas": groups.layout.num_replicas,
            "parameters": self.num_parameters,
            "flops_per_token": cut.flops_per_token,
            "split": cut.facts(getattr(torch, self.config.model.dtype).itemsize),
            "startup_s": self.startup.phases,
            "results": [],
        }


def _gather(spans: list[Span], group: dist.ProcessGroup) -> list[Span]:
    """The spans of all ranks, on rank 0."""
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(spans, everyone, dst=0, group=group)
    return [span for of_rank in everyone or [] for span in of_rank]
