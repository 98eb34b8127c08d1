"""What a run would be like, before it runs: checks the config, measures the model, shows split, memory and bubble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from .config import Config
from .measure import Measurement, measure
from .partition import LayerCost
from .plan import Run, Schedule, dni, gpipe, one_f_one_b, peak_in_flight, simulate
from .trainer import Trainer

GRADIENT_AND_MOMENTS = 3
"""Copies beside each parameter: its gradient, and the two moments of Adam."""


def dry_run(config: Config, num_stages: int, device: torch.device, console: Console) -> None:
    """Refuses what the trainer would refuse, and prints what it would do; trains nothing and makes no process group.

    Raises: ValueError, which names the setting.
    """
    Trainer(config, num_stages)
    measurement = measure(config, num_stages, device, console)
    show_measurement(measurement, console)
    run = simulate(_schedule(config, num_stages), measurement.times())
    console.print(_memory_table(measurement, run))
    console.print(
        f"{run.schedule.name}: a step takes {float(run.step_ms):.1f} ms, {float(run.bubble):.1%} of it bubble, if each "
        f"stage takes as long as the slowest, {measurement.slowest.name}, and transfers and optimizer take no time",
        highlight=False,
        soft_wrap=True,
    )


def show_measurement(measurement: Measurement, console: Console) -> None:
    """The layers and the stages that they make, with their times and sizes."""
    sequences, length = measurement.microbatch
    console.print(f"measured on {measurement.where}; a microbatch of {sequences} x {length} bytes", highlight=False)
    console.print(_cost_table("layer", measurement.layers), _cost_table("stage", measurement.stages))
    predicted = "nothing is predicted"
    if measurement.interface is not None:
        cost = f"{measurement.interface_ms:.3f} ms"
        predicted = f"P is what {measurement.interface} takes, at the cut where it takes longest: {cost}"
    console.print(predicted, highlight=False)


def _cost_table(what: str, costs: Sequence[LayerCost]) -> Table:
    table = Table()
    table.add_column(what)
    for heading in ("forward ms", "backward ms", "parameters MB", "saved MB"):
        table.add_column(heading, justify="right")
    for cost in costs:
        numbers = (cost.forward_ms, cost.backward_ms, cost.parameter_bytes / 1e6, cost.saved_bytes / 1e6)
        table.add_row(cost.name, *(f"{number:.3f}" for number in numbers))
    return table


def _schedule(config: Config, num_stages: int) -> Schedule:
    pipeline = config.pipeline
    if pipeline.schedule == "GPipe":
        return gpipe.build(num_stages, pipeline.num_microbatches)
    if pipeline.schedule == "1F1B":
        return one_f_one_b.build(num_stages, pipeline.num_microbatches)
    if pipeline.policy == "wait":
        return dni.wait(num_stages, pipeline.num_microbatches)
    return dni.synthetic(num_stages, pipeline.num_microbatches, lag=pipeline.lag)


def _memory_table(measurement: Measurement, run: Run) -> Table:
    table = Table(
        caption="activations: what the graphs of the microbatches in flight keep; buffers and predictors on top"
    )
    table.add_column("stage")
    for heading in ("weights, gradients, moments MB", "in flight", "activations MB", "together MB"):
        table.add_column(heading, justify="right")
    for stage, in_flight in zip(measurement.stages, peak_in_flight(run.schedule), strict=True):
        fixed, kept = stage.parameter_bytes * (1 + GRADIENT_AND_MOMENTS), stage.saved_bytes * in_flight
        table.add_row(
            stage.name, f"{fixed / 1e6:.1f}", str(in_flight), f"{kept / 1e6:.1f}", f"{(fixed + kept) / 1e6:.1f}"
        )
    return table
