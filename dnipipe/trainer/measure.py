"""What the model of a config costs here, and where that says to cut it. The planner and the trainer go by it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ..config import Config
from ..interface import Learner, TensorMeta, build_interface, choose_interface
from ..partition import LayerCost, each_layer, stage_costs
from ..partition.cost import timed
from ..plan import Times
from .cut import choose_lengths
from .model import token_loss
from .policy import planned_policy

REPEATS = 5
WARM_UPS = 3  # a predictor is small: what its first calls set up would count for several times its work


@dataclass(frozen=True)
class Measurement:
    """What one microbatch costs.

    Fields: microbatch: its shape (B, T). where: device and threads, in words. layers, stages: in their order.
            lengths: layers of each stage. interface: what predicts at the boundary where that takes longest; None:
            there is none to predict at, or nothing is known to suit. interface_ms: predicting and learning there.
    """

    microbatch: tuple[int, int]
    where: str
    layers: list[LayerCost]
    lengths: list[int]
    interface: str | None
    interface_ms: float

    @property
    def stages(self) -> list[LayerCost]:
        return stage_costs(self.layers, self.lengths)

    @property
    def flops_per_token(self) -> float:
        """Floating-point operations that a token takes to train: its forward, and twice that for the backward."""
        return 3 * sum(layer.forward_flops for layer in self.layers) / (self.microbatch[0] * self.microbatch[1])

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


def measure(
    config: Config,
    model: nn.Sequential,
    num_stages: int,
    device: torch.device,
    console: Console,
    *,
    to_compare: bool = False,
) -> Measurement:
    """Measures the layers of a model and the predictors that its cuts need, and cuts it as the config says.

    Args:    to_compare: measures predictors also where the config's run would predict nothing.

    On a CPU it runs with as many threads as a rank has. The model takes the config's dtype, and its weights are left
    as they are; the tokens are random.

    Raises: ValueError: a layer that fails, an interface that the activation does not suit, or no cut that fits.
    """
    shape = (config.microbatch_size, config.data.seq_len)
    model = model.to(getattr(torch, config.model.dtype))
    input_BT, target_BT = torch.randint(config.data.vocab_size or 256, (2, *shape)).to(device)
    with _threads_of_a_rank(device) as where:
        walk = each_layer(model, input_BT, partial(token_loss, target_BT=target_BT), repeats=REPEATS)
        layers, outputs = _walk(walk, len(model), console)
        predicted = _Predicted(config, target_BT, num_classes=outputs[-1].shape[-1], num_stages=num_stages)
        in_the_middle = outputs[len(outputs) // 2 - 1]
        extra_ms = predicted.at(in_the_middle)[0] if num_stages > 1 and predicted.by_the_run else 0.0
        lengths = choose_lengths(config, layers, num_stages, extra_ms, device)
        boundaries = [outputs[end - 1] for end in accumulate(lengths[:-1])]
        interfaces = [predicted.at(meta) for meta in boundaries if to_compare or predicted.by_the_run]
    interface_ms, interface = max(interfaces, key=lambda measured: measured[0], default=(0.0, None))
    return Measurement(shape, where, layers, lengths, interface, interface_ms)


def _walk(
    walk: Iterator[tuple[LayerCost, Tensor]], num_layers: int, console: Console
) -> tuple[list[LayerCost], list[Tensor]]:
    """The cost of each layer, and its output as shape and dtype alone (on meta), beside a bar."""
    # auto_refresh would start a thread that competes with what is measured
    bar = track(
        walk,
        "measuring layers",
        total=num_layers,
        auto_refresh=False,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    measured = [(cost, output.detach().to("meta")) for cost, output in bar]
    return _level([cost for cost, _ in measured]), [output for _, output in measured]


def _level(costs: list[LayerCost]) -> list[LayerCost]:
    """Layers that are alike in all that can be counted get the median of their times, whose differences are noise."""

    def kind(cost: LayerCost) -> tuple[object, ...]:
        sizes = (cost.parameter_bytes, cost.saved_bytes, cost.output_bytes, cost.forward_flops)
        return (cost.name.partition(" ")[2], *sizes)

    alike = {kind(cost): [each for each in costs if kind(each) == kind(cost)] for cost in costs}
    return [
        replace(
            cost,
            forward_ms=median(each.forward_ms for each in alike[kind(cost)]),
            backward_ms=median(each.backward_ms for each in alike[kind(cost)]),
        )
        for cost in costs
    ]


class _Predicted:
    """What predicting a gradient costs, once for each kind of activation."""

    def __init__(self, config: Config, target_BT: Tensor, num_classes: int, num_stages: int) -> None:
        last_policy = planned_policy(config, num_stages).phases[-1].policy  # what most of a run goes by
        self.by_the_run = config.pipeline.schedule == "DNI" and last_policy != "stale"
        """Whether what most of a run goes by predicts."""
        self._config, self._target_BT, self._num_classes = config, target_BT, num_classes
        self._known: dict[tuple[torch.Size, torch.dtype], tuple[float, str | None]] = {}

    def at(self, meta: Tensor) -> tuple[float, str | None]:
        """Milliseconds that predicting and learning take at an activation, and what was chosen to do so."""
        key = (meta.shape, meta.dtype)
        if key not in self._known:
            self._known[key] = self._measure(torch.randn_like(meta, device=self._target_BT.device))
        return self._known[key]

    def _measure(self, h: Tensor) -> tuple[float, str | None]:
        pipeline, target_BT = self._config.pipeline, self._target_BT
        label = TensorMeta(tuple(target_BT.shape), target_BT.dtype)
        name: str | None = pipeline.interface
        if name == "auto":
            name = choose_interface(TensorMeta(tuple(h.shape), h.dtype), label, self._num_classes)
        if name is None:
            return 0.0, None
        try:
            learner = Learner([build_interface(name, h, num_classes=self._num_classes, label=label)])
        except ValueError as error:
            if not self.by_the_run:  # which never builds it
                return 0.0, None
            raise ValueError(f"pipeline.interface = {pipeline.interface!r}: {error}") from error
        true_grad = torch.randn_like(h)

        def predict_and_learn() -> None:
            learner.predict([h], target_BT)
            learner.learn([h], target_BT, [true_grad])

        for _ in range(WARM_UPS):
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
