"""What a run would be like, before it runs: checks the config, measures the model, shows split, memory and bubble."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from .config import Config
from .partition import LayerCost
from .plan import simulate
from .trainer import Trainer
from .trainer.cut import held, plan_of, state_bytes
from .trainer.measure import Measurement, measure


def dry_run(config: Config, world_size: int, device: torch.device, console: Console) -> None:
    """Refuses what the trainer would refuse, and prints what it would do; trains nothing and makes no process group.

    Raises: ValueError, which names the setting.
    """
    trainer = Trainer(config, world_size)
    measurement = measure(config, trainer.take_model(), trainer.num_stages, device, console)
    show_measurement(measurement, console)
    run = simulate(plan_of(config, trainer.num_stages), measurement.times())
    console.print(_memory_table(config, measurement))
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


def _memory_table(config: Config, measurement: Measurement) -> Table:
    table = Table(
        caption="activations: what the graphs of the microbatches in flight keep; buffers and predictors on top"
    )
    table.add_column("stage")
    for heading in ("weights, gradients, moments MB", "in flight", "activations MB", "together MB"):
        table.add_column(heading, justify="right")
    for stage, in_flight in zip(measurement.stages, held(config, len(measurement.stages)), strict=True):
        fixed, kept = state_bytes(config, stage.parameter_bytes, len(measurement.stages)), stage.saved_bytes * in_flight
        table.add_row(
            stage.name, f"{fixed / 1e6:.1f}", str(in_flight), f"{kept / 1e6:.1f}", f"{(fixed + kept) / 1e6:.1f}"
        )
    return table
