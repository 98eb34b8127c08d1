"""A run's folder: which files lie there, and how the reports of one run never mix with those of another."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

from ..checkpoint import newest_step
from ..config import SECTIONS, Config, load_config

CHECKPOINTS, METRICS, CONFIG = "checkpoint", "metrics.jsonl", "config.yaml"
FACTS, PAGE, TIMELINE, TENSORBOARD = "run.json", "report.html", "timeline.png", "tensorboard"
RUN_SETTINGS_THAT_COUNT = ("seed", "batch_size")
"""The others of the section run say how long it is and how it reports, and may change when it goes on."""
MAY_CHANGE = (
    "model.compile",
    "model.recompute",
    "pipeline.num_replicas",
    "pipeline.split",
    "pipeline.layers_per_stage",
    "pipeline.max_stage_gb",
    "pipeline.transport",
)
"""Settings of where and how the same is computed."""

FILES: Mapping[str, str] = MappingProxyType(
    {
        PAGE: "all of this on one page, for a browser",
        TIMELINE: "what each rank did when, one schedule above the other",
        "trace": "the same to zoom in, at https://ui.perfetto.dev",
        METRICS: "loss, speed and validation, a line each",
        TENSORBOARD: "the same, for tensorboard --logdir",
        FACTS: "where it ran, how it was split, what came out",
        CONFIG: "every setting of this run",
        CHECKPOINTS: "weights, optimizer and predictors of every stage",
    }
)


def clear(folder: Path) -> None:
    """Makes the folder, and removes what an earlier run reported there, so that nobody takes it for this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("trace*.json"), *(folder / name for name in (TIMELINE, METRICS, FACTS, PAGE))]:
        path.unlink(missing_ok=True)
    for name in (CHECKPOINTS, TENSORBOARD):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def refuse_another_run(config: Config) -> None:
    """Raises: ValueError: the folder holds checkpoints to go on from, but of other settings; it names the first."""
    folder = Path(config.run.output_dir)
    found = (newest_step(each) for each in (folder / CHECKPOINTS).glob("*"))
    if config.run.resume == "never" or all(step is None for step in found):
        return
    cure = "choose another run.output_dir, or begin anew by run.resume=never"
    try:
        before = load_config(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"run.output_dir = {str(folder)!r} holds checkpoints of nobody knows which settings ({error}): {cure}"
        ) from error
    for section, name in ((kind.section, each.name) for kind in SECTIONS for each in fields(kind)):
        old, new = (getattr(getattr(settings, section), name) for settings in (before, config))
        counts = name in RUN_SETTINGS_THAT_COUNT if section == "run" else f"{section}.{name}" not in MAY_CHANGE
        if old != new and counts:
            raise ValueError(
                f"{section}.{name} = {new!r}: the checkpoints in run.output_dir = {str(folder)!r} were made with "
                f"{old!r}; set it so, {cure}"
            )


def cut_back(metrics: Path, schedule: str, step: int) -> None:
    """Removes the lines that a schedule wrote after `step` steps, or at a validation then: it will write them again."""
    if not metrics.exists():
        return
    kept = [line for line in metrics.read_text(encoding="utf-8").splitlines() if not _repeated(line, schedule, step)]
    write_whole(metrics, "".join(f"{line}\n" for line in kept))


def write_whole(path: Path, text: str) -> None:
    """The file has its old content or all of the new one, whenever the process is killed."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _repeated(line: str, schedule: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # a kill cut it short
        return True
    # a line of steps is written before the checkpoint after them, one of a validation after it
    return record["schedule"] == schedule and (record["step"], "val_bits" in record) > (step, False)
