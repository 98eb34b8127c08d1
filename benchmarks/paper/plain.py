"""One model of the paper alone, of torch's modules and optimizer and dnipipe's interfaces.

The stack starts from its weights, and the tests hold the stack against its steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnipipe.interface import MLP, Conv, Learner

from .convolutions import ConvShape, build_conv_interfaces, build_conv_layers
from .models import PREDICTED, STALE, TRUE, Model, Shape


def build_layers(shape: Shape) -> list[nn.Sequential]:
    """The layers of one network, drawn as torch draws them, unless shape.identity."""
    pairs = list(zip(shape.sizes, shape.sizes[1:], strict=False))
    # no bias before a batch norm, which would take it away again
    hidden = [nn.Sequential(nn.Linear(n, m, bias=False), nn.BatchNorm1d(m), nn.ReLU()) for n, m in pairs[:-1]]
    for linear in (layer[0] for layer in hidden[1:] if shape.identity):
        assert isinstance(linear, nn.Linear)
        nn.init.eye_(linear.weight)
    return [*hidden, nn.Sequential(nn.Linear(*pairs[-1]))]


def build_interfaces(shape: Shape, conditional: bool) -> list[MLP]:
    """One after each hidden layer; none if the shape has none."""
    if shape.num_hidden is None:
        return []
    options = {"num_hidden": shape.num_hidden, "width": shape.predictor_width}
    classes = shape.num_classes if conditional else 0
    return [
        MLP(shape.width, classes, batch_norm=True, normalise=shape.normalise, **options)
        for _ in range(shape.layers - 1)
    ]


def build(shape: Shape, model: Model) -> tuple[list[nn.Sequential], list[MLP] | list[Conv]]:
    """Layers and interfaces as the model's seed draws them, on the CPU; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        conditional = model.method == "cdni"
        if isinstance(shape, ConvShape):
            classes = shape.num_classes if conditional else 0
            return build_conv_layers(shape), build_conv_interfaces(shape, classes)
        return build_layers(shape), build_interfaces(shape, conditional)


def _adam(layer: nn.Sequential, model: Model) -> torch.optim.Optimizer:
    """Weight decay is for what has several dimensions: neither norms nor biases."""
    groups = [
        {"params": [each for each in layer.parameters() if each.ndim > 1], "weight_decay": model.weight_decay},
        {"params": [each for each in layer.parameters() if each.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=model.learning_rate)


def _interface_adam(interface: MLP | Conv, model: Model, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """What is of no hidden layer is of the last one."""
    layers = [interface.first, *interface.rest] if isinstance(interface, MLP) else list(interface.layers)
    hidden = {own for layer in layers[:-1] for own in layer.parameters()}
    groups: tuple[list[Tensor], list[Tensor]] = ([], [])
    for own in parameters:
        groups[own in hidden].append(own)
    rates = zip(groups, (model.rate_of_last, model.predictor_rate), strict=True)
    return torch.optim.Adam([{"params": own, "lr": each} for own, each in rates if own])


class PlainModel:
    """Trains one model the slow way.

    Args:    dtype: float64 for comparisons; then dnipipe's interfaces must be kept from computing in float32.
    """

    def __init__(self, shape: Shape, model: Model, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        layers, interfaces = build(shape, model)
        self.layers = [layer.to(device, dtype) for layer in layers]
        self.sources, self.decay = model.sources(shape.layers), model.decay
        self.averages = [torch.zeros(shape.at(cut), dtype=dtype, device=device) for cut in range(1, shape.layers)]
        self.optimizers = [_adam(layer, model) for layer in layers]
        self.learners = [
            Learner([interface.to(device, dtype)], partial(_interface_adam, interface, model))
            for interface in interfaces
        ]

    def step(self, x: Tensor, label: Tensor) -> None:
        """All layers guess first, then go backward; x (B, features) or (B, C, H, W), label (B,)."""
        inputs, outputs = self._forward(x)
        guesses = [self._guess(cut, outputs[cut], label) for cut in range(len(self.sources))]
        gradient = self._loss_gradient(outputs[-1], label)
        for number in reversed(range(len(self.layers))):
            self._update(number, outputs[number], gradient)
            if number > 0:
                gradient = self._gradient_of(number, inputs, label, guesses)

    def sparse_step(self, x: Tensor, label: Tensor, fires: Sequence[bool], order: Sequence[int]) -> None:
        """Layer after layer in `order`, each asking its interface when its turn has come; only those that fire."""
        inputs, outputs = self._forward(x)
        for number in (number for number in order if fires[number]):
            is_last = number == len(self.layers) - 1
            guess = None if is_last else self._guess(number, outputs[number], label)
            gradient = self._loss_gradient(outputs[-1], label) if guess is None else guess
            self._update(number, outputs[number], gradient)
            if number > 0:
                self._learn(number - 1, inputs[number], label)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """Logits (N, C) by the running statistics."""
        for layer in self.layers:
            x = layer.eval()(x)
            layer.train()
        return x

    def _forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        inputs, outputs = [], []
        for layer in self.layers:
            inputs.append(x.detach().requires_grad_())
            outputs.append(layer(inputs[-1]))
            x = outputs[-1]
        return inputs, outputs

    def _loss_gradient(self, logits: Tensor, label: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(leaf, label), leaf)[0]

    def _guess(self, cut: int, h: Tensor, label: Tensor) -> Tensor:
        if self.sources[cut] == PREDICTED:
            return self.learners[cut].predict([h.detach()], label)[0]
        return self.averages[cut].expand_as(h)  # zeros, unless stale gradients enter it

    def _update(self, number: int, output: Tensor, gradient: Tensor) -> None:
        self.optimizers[number].zero_grad()
        output.backward(gradient)
        self.optimizers[number].step()

    def _learn(self, cut: int, h: Tensor, label: Tensor) -> None:
        assert h.grad is not None, "the layer above has gone backward"
        self.learners[cut].learn([h.detach()], label, [h.grad])
        self.learners[cut].end_step()

    def _gradient_of(self, number: int, inputs: list[Tensor], label: Tensor, guesses: list[Tensor]) -> Tensor:
        """What the layer below layer `number` goes backward against; what came home is learned from."""
        true, source = inputs[number].grad, self.sources[number - 1]
        assert true is not None, "the layer has gone backward"
        if source == TRUE:
            return true
        if source == PREDICTED:
            self._learn(number - 1, inputs[number], label)
        if source == STALE:
            average = self.averages[number - 1]
            self.averages[number - 1] = average * self.decay + true.mean(0) * (1 - self.decay)
        return guesses[number - 1]
