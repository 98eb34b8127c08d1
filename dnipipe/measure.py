"""What the model of a config costs, measured here in one process: what `dnipipe plan --config` plans with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .config import Config
from .interface import Learner, TensorMeta, build_interface, choose_interface
from .partition import LayerCost, each_layer, split_sequential, stage_costs
from .partition.cost import timed
from .plan import Times
from .worker import make_model, token_loss

REPEATS = 5


@dataclass(frozen=True)
class Measurement:
    """What one microbatch costs.

    Fields: microbatch: its shape (B, T). where: device and threads, in words. layers, stages: in their order.
            interface: what predicts at the boundary where that takes longest; None: there is none to predict at, or
            nothing is known to suit. interface_ms: predicting and learning there.
    """

    microbatch: tuple[int, int]
    where: str
    layers: list[LayerCost]
    stages: list[LayerCost]
    interface: str | None
    interface_ms: float

    @property
    def slowest(self) -> LayerCost:
        """The stage that takes longest."""
        return max(self.stages, key=lambda stage: stage.total_ms)

    def times(self, transfer: object = 0) -> Times:
        """To plan with, as if every stage took as long as the slowest; B and W are half of its backward each.

        To the microsecond: what is finer is noise, and the simulation counts in the finest digit.
        """
        forward, backward, interface = (
            Fraction(f"{time_ms:.3f}")
            for time_ms in (self.slowest.forward_ms, self.slowest.backward_ms, self.interface_ms)
        )
        return Times.ms(forward, backward / 2, backward / 2, transfer, interface)


def measure(config: Config, num_stages: int, device: torch.device, console: Console) -> Measurement:
    """Makes the model, cuts it as the trainer does, and measures its layers and the predictors at its cuts.

    On a CPU it runs with as many threads as a rank has. Weights are fresh, and the bytes are random.

    Raises: ValueError: a factory that does not make the model, fewer layers than stages, a layer that fails, or an
            interface that the activation does not suit.
    """
    model = make_model(config.model)
    try:
        lengths = [len(stage) for stage in split_sequential(model, num_stages)]
    except TypeError as error:
        raise ValueError(f"model.factory = {config.model.factory!r}: {error}") from error
    shape = (config.run.batch_size // config.pipeline.num_microbatches, config.data.seq_len)
    model = model.to(getattr(torch, config.model.dtype))
    input_BT, target_BT = torch.randint(config.data.vocab_size or 256, (2, *shape)).to(device)
    with _threads_of_a_rank(device) as where:
        walk = each_layer(model, input_BT, partial(token_loss, target_BT=target_BT), repeats=REPEATS)
        layers, ends = _walk(walk, lengths, console)
        *boundaries, logits_BTV = ends
        interfaces = [_interface(config, h, target_BT, logits_BTV.shape[-1]) for h in boundaries]
    interface_ms, interface = max(interfaces, key=lambda measured: measured[0], default=(0.0, None))
    return Measurement(shape, where, layers, stage_costs(layers, lengths), interface, interface_ms)


def _walk(
    walk: Iterator[tuple[LayerCost, Tensor]], lengths: list[int], console: Console
) -> tuple[list[LayerCost], list[Tensor]]:
    """The cost of each layer, and the output of each stage, beside a bar."""
    layers, outputs = [], []
    last_layers = set(accumulate(lengths))
    # auto_refresh would start a thread that competes with what is measured
    bar = track(
        walk,
        "measuring layers",
        total=sum(lengths),
        auto_refresh=False,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    for number, (cost, output) in enumerate(bar, start=1):
        layers.append(cost)
        if number in last_layers:
            outputs.append(output)
    return layers, outputs


def _interface(config: Config, h: Tensor, target_BT: Tensor, num_classes: int) -> tuple[float, str | None]:
    """Milliseconds that predicting and learning take at an activation, and what was chosen to do so."""
    label = TensorMeta(tuple(target_BT.shape), target_BT.dtype)
    name: str | None = config.pipeline.interface
    if name == "auto":
        name = choose_interface(TensorMeta(tuple(h.shape), h.dtype), label, num_classes)
    if name is None:
        return 0.0, None
    try:
        learner = Learner([build_interface(name, h, num_classes=num_classes, label=label)])
    except ValueError as error:
        raise ValueError(f"pipeline.interface = {config.pipeline.interface!r}: {error}") from error
    activation, true_grad = h.detach(), torch.randn_like(h)

    def predict_and_learn() -> None:
        learner.predict([activation], target_BT)
        learner.learn([activation], target_BT, [true_grad])

    predict_and_learn()
    return median(timed(predict_and_learn, h.device)[0] for _ in range(REPEATS)), name


@contextmanager
def _threads_of_a_rank(device: torch.device) -> Iterator[str]:
    """On a CPU one thread, as torchrun gives a rank, unless OMP_NUM_THREADS says otherwise there as here."""
    if device.type != "cpu":
        yield torch.cuda.get_device_name(device)
        return
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield f"the CPU, threads: {torch.get_num_threads()}"
    finally:
        torch.set_num_threads(before)
