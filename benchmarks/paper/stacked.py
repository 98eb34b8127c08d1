"""The parts of E networks that train at once, each with weights, statistics and moments of its own.

A part holds E of everything, and one batched matrix product serves them all. Activations are (E, features, B): so
batch normalisation is a layer norm over the last dimension, which torch has in one kernel. Nothing here waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dnipipe.interface import MLP

EPS = 1e-5  # of nn.BatchNorm1d, as is the momentum
MOMENTUM = 0.1
BETA_1, BETA_2, ADAM_EPS = 0.9, 0.999, 1e-8  # of torch.optim.Adam


class Adam:
    """torch.optim.Adam for E models, each with its own learning rate, and each free to sit a step out.

    Args:    parameters: each (E, ...), changed in place. learning_rate: (E,).
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rate: Tensor) -> None:
        self.parameters, self.learning_rate = list(parameters), learning_rate
        self.count = torch.zeros_like(learning_rate)
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], moves: Tensor | None = None) -> None:
        """moves: (E,), 1 for a model that makes this step and 0 for one that does not; None: all do."""
        moves = torch.ones_like(self.count) if moves is None else moves
        self.count += moves
        count = self.count.clamp_min(1)  # who has never moved divides by nothing
        rate = self.learning_rate * moves / (1 - BETA_1**count)
        spread = (1 - BETA_2**count).sqrt()
        for parameter, gradient, first, second in zip(self.parameters, gradients, self.first, self.second, strict=True):
            shape = (-1,) + (1,) * (parameter.ndim - 1)
            first.lerp_(gradient, ((1 - BETA_1) * moves).view(shape))
            second.lerp_(gradient.square(), ((1 - BETA_2) * moves).view(shape))
            deviation = second.sqrt().div_(spread.view(shape)).add_(ADAM_EPS)
            parameter.addcmul_(first / deviation, rate.view(shape), value=-1)

    def state(self) -> list[Tensor]:
        return [self.count, *self.first, *self.second]


class Layer:
    """E layers: a matrix product and, but for the last layer, batch normalisation and ReLU.

    Args:    modules: of each model, Sequential(nn.Linear, nn.BatchNorm1d, nn.ReLU) or Sequential(nn.Linear), whose
             weights these start from.
    Shapes:  x (E, in, B), or (in, B), the same for all -> (E, out, B).
    """

    def __init__(self, modules: Sequence[nn.Sequential]) -> None:
        linears = [module[0] for module in modules]
        self.parameters = [_stack(linears, "weight"), _stack(linears, "bias").unsqueeze(-1)]
        self.statistics: list[Tensor] = []
        if len(modules[0]) > 1:
            norms = [module[1] for module in modules]
            self.parameters += [_stack(norms, name).unsqueeze(-1) for name in ("weight", "bias")]
            self.statistics = [_stack(norms, name).unsqueeze(-1) for name in ("running_mean", "running_var")]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def train(self, x: Tensor) -> Tensor:
        """By the statistics of the batch, which also enter the running ones."""
        out = affine(self.parameters[0], self.parameters[1], x)
        if not self.statistics:
            return out
        normal, mean, inverse = torch.native_layer_norm(out, out.shape[-1:], None, None, EPS)
        self._remember(mean, inverse, out.shape[-1])
        return torch.relu(torch.addcmul(self.parameters[3], normal, self.parameters[2]))

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """By the running statistics."""
        out = affine(self.parameters[0], self.parameters[1], x)
        if not self.statistics:
            return out
        mean, variance = self.statistics
        scale = self.parameters[2] * (variance + EPS).rsqrt()
        return torch.relu((out - mean) * scale + self.parameters[3])

    @torch.no_grad()
    def _remember(self, mean: Tensor, inverse: Tensor, batch: int) -> None:
        variance = (inverse.detach() ** -2 - EPS).clamp_min(0) * (batch / (batch - 1))
        self.statistics[0].lerp_(mean.detach(), MOMENTUM)
        self.statistics[1].lerp_(variance, MOMENTUM)


class Predictor:
    """E interfaces of one architecture: those of dnipipe.interface.MLP with batch normalisation.

    Args:    interfaces: of each model, all with as many hidden layers; one that is not conditional gets a table of
             zeros, which must see a one-hot of zeros.
             num_classes: C.
    Shapes:  h (E, D, B), one_hot (E, C, B) -> (E, D, B), in units of the interface's scale.
    """

    def __init__(self, interfaces: Sequence[MLP], num_classes: int) -> None:
        firsts = [interface.first for interface in interfaces]
        linears = [first.linear for first in firsts]
        self.parameters = [_stack(linears, "weight"), _stack(linears, "bias").unsqueeze(-1)]
        out_features = linears[0].out_features
        tables = [
            first.linear.weight.new_zeros(out_features, num_classes) if first.rows is None else first.rows.weight[1:].T
            for first in firsts
        ]
        self.parameters.append(torch.stack(tables).detach().clone())
        for modules in zip(*(interface.rest for interface in interfaces), strict=True):
            if not isinstance(modules[0], nn.ReLU):
                self.parameters += [
                    _stack(modules, "weight") if isinstance(modules[0], nn.Linear) else _column(modules, "weight"),
                    _column(modules, "bias"),
                ]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __call__(self, h: Tensor, one_hot: Tensor) -> Tensor:
        weight, bias, table, *rest = self.parameters
        out = torch.baddbmm(affine(weight, bias, h), table, one_hot)
        for gamma, beta, weight, bias in zip(*(rest[number::4] for number in range(4)), strict=True):
            normal = torch.native_layer_norm(out, out.shape[-1:], None, None, EPS)[0]
            out = affine(weight, bias, torch.relu(torch.addcmul(beta, normal, gamma)))
        return out


def affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """weight (E, out, in), bias (E, out, 1), x (E, in, B) or (in, B) -> (E, out, B)."""
    if x.ndim == 3:
        return torch.baddbmm(bias, weight, x)
    # one input for all: one matrix product instead of E
    return torch.addmm(bias.flatten(0, 1), weight.flatten(0, 1), x).unflatten(0, weight.shape[:2])


def _stack(modules: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([getattr(module, name) for module in modules]).detach().clone()


def _column(modules: Sequence[nn.Module], name: str) -> Tensor:
    return _stack(modules, name).unsqueeze(-1)
