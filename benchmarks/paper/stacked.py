"""The parts of E fully connected networks that train at once, each with weights, statistics and moments of its own.

A part holds E of everything, and one batched matrix product serves them all. Activations are (E, features, B): so
batch normalisation is a layer norm over the last dimension, in one kernel. Nothing here waits for the device.

A linear map before a batch normalisation has no bias: what it adds, the normalisation takes away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnipipe.interface import MLP

from .fused import EPS, adam, norm_relu


class Adam:
    """torch.optim.AdamW for E models, each with its own learning rate, and each free to sit a step out.

    Args:    parameters: each (E, ...), contiguous, changed in place. learning_rate: (E,), kept: what is written into
             it holds from the next step on, also for a captured step. weight_decay: (E,), of the first parameter; None:
             of none.
    """

    def __init__(self, parameters: Sequence[Tensor], learning_rate: Tensor, weight_decay: Tensor | None = None) -> None:
        self.parameters, self.learning_rate = list(parameters), learning_rate
        no_decay = torch.zeros_like(learning_rate)
        self.decays = [no_decay if weight_decay is None else weight_decay, *[no_decay] * (len(self.parameters) - 1)]
        self.count = torch.zeros_like(learning_rate)
        self.all_move = torch.ones_like(learning_rate)
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], moves: Tensor | None = None) -> None:
        """moves: (E,), 1 for a model that makes this step and 0 for one that does not; None: all do."""
        moves = self.all_move if moves is None else moves
        self.count += moves
        moments = zip(self.first, self.second, strict=True)
        for parameter, gradient, own, decay in zip(self.parameters, gradients, moments, self.decays, strict=True):
            adam(parameter, gradient, own, (self.count, self.learning_rate, moves, decay))

    def state(self) -> list[Tensor]:
        return [self.count, *self.first, *self.second]


class Layer:
    """E layers: a matrix product and, but for the last layer, batch normalisation and ReLU.

    Args:    modules: of each model, Sequential(nn.Linear, nn.BatchNorm1d, nn.ReLU) or Sequential(nn.Linear), whose
             weights these start from.
    Shapes:  x (E, in, B), or (S, in, B), each for E / S neighbours, or (in, B), the same for all -> (E, out, B).
    """

    def __init__(self, modules: Sequence[nn.Sequential]) -> None:
        linears = [module[0] for module in modules]
        self.parameters = [stack(linears, "weight")]
        self.statistics: list[Tensor] = []
        if len(modules[0]) > 1:
            norms = [module[1] for module in modules]
            self.parameters.append(torch.stack([stack(norms, name) for name in ("weight", "bias")], 1))
            self.statistics = [stack(norms, name) for name in ("running_mean", "running_var")]
        else:
            self.parameters.append(stack(linears, "bias").unsqueeze(-1))
        for parameter in self.parameters:
            parameter.requires_grad_()

    def train(self, x: Tensor) -> Tensor:
        """By the statistics of the batch, which also enter the running ones."""
        weight, other = self.parameters
        if not self.statistics:
            return affine(weight, other, x)
        return norm_relu(product(weight, x), other, self.statistics)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """By the running statistics."""
        weight, other = self.parameters
        if not self.statistics:
            return affine(weight, other, x)
        mean, variance = self.statistics
        scale = other[:, 0] * (variance + EPS).rsqrt()
        return torch.addcmul(
            (other[:, 1] - mean * scale).unsqueeze(-1), product(weight, x), scale.unsqueeze(-1)
        ).relu_()


class Predictor:
    """E interfaces of one architecture: those of dnipipe.interface.MLP with batch normalisation.

    The label enters as further features, one-hot, as many as padded(C).

    Args:    interfaces: of each model, all with as many hidden layers; one that is not conditional must see a one-hot
             of zeros. num_classes: C; 0: none is conditional.
    Shapes:  h (E, D, B), one_hot (E, C, B) or, to save a copy, (E, padded(C), B) -> (E, D, B), in units of the
             interface's scale.
    Fields:  num_hidden_parameters: so many of `parameters` are those of hidden layers, and come first.
    """

    def __init__(self, interfaces: Sequence[MLP], num_classes: int) -> None:
        firsts = [interface.first for interface in interfaces]
        lasts = [first.linear for first in firsts]
        weight = stack(lasts, "weight")
        if num_classes > 0:
            table = weight.new_zeros(*weight.shape[:2], padded(num_classes))
            for own, first in zip(table, firsts, strict=True):
                if first.rows is not None:
                    own[:, :num_classes] = first.rows.weight[1:].detach().T
            weight = torch.cat([weight, table], -1)
        self.parameters = [weight]
        for modules in zip(*(interface.rest for interface in interfaces), strict=True):
            if isinstance(modules[0], nn.Linear):
                self.parameters.append(stack(modules, "weight"))
                lasts = list(modules)
            elif not isinstance(modules[0], nn.ReLU):
                self.parameters.append(torch.stack([stack(modules, name) for name in ("weight", "bias")], 1))
        self.num_hidden_parameters = len(self.parameters) - 1
        self.parameters.append(stack(lasts, "bias").unsqueeze(-1))
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __call__(self, h: Tensor, one_hot: Tensor) -> Tensor:
        weight, *rest, bias = self.parameters
        if weight.shape[-1] > h.shape[1]:
            h = torch.cat([h, widened(one_hot, weight.shape[-1] - h.shape[1])], 1)
        for norm, next_weight in zip(rest[::2], rest[1::2], strict=True):
            h, weight = norm_relu(product(weight, h), norm), next_weight
        return affine(weight, bias, h)


def padded(num_classes: int) -> int:
    """The next multiple of 16: so many features of a label keep rows of memory aligned, which products are fast by."""
    return -(-num_classes // 16) * 16


def widened(one_hot: Tensor, classes: int) -> Tensor:
    """(E, C, B) -> (E, classes, B), zeros added."""
    missing = classes - one_hot.shape[1]
    return F.pad(one_hot, (0, 0, 0, missing)) if missing else one_hot


def affine(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """weight (E, out, in), bias (E, out, 1), x as in product -> (E, out, B)."""
    if x.ndim == 3 and len(x) == len(weight):
        return torch.baddbmm(bias, weight, x)
    return product(weight, x) + bias


def product(weight: Tensor, x: Tensor) -> Tensor:
    """weight (E, out, in), x (E, in, B), or (S, in, B), each for E / S neighbours, or (in, B) -> (E, out, B)."""
    x = x if x.ndim == 3 else x.unsqueeze(0)
    # one input for some: one matrix product for them instead of one each
    rows = weight.reshape(len(x), -1, weight.shape[-1])
    return torch.bmm(rows, x).view(*weight.shape[:2], x.shape[-1])


def stack(modules: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([getattr(module, name) for module in modules]).detach().clone()
