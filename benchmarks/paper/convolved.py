"""The parts of E convolutional networks that train at once: one network with E times the channels, in groups.

Activations are (B, E, C, H, W), so a grouped convolution, batch normalisation and pooling take them without a copy.
One-hot labels, and what comes out of the last layer, are (E, C, B), as in stacked.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnipipe.interface import Conv

from .convolutions import KERNEL, POOL
from .fused_pool import batch_norm, norm_relu_max_pool, norm_relu_mean_pool
from .stacked import affine, padded, stack, widened


class ConvLayer:
    """E layers: filters, batch normalisation, ReLU and pooling.

    Args:    modules: of each model, Sequential(Conv2d, BatchNorm2d, ReLU, MaxPool2d or AvgPool2d).
    Shapes:  x (B, E, C, H, W), or (B, S, C, H, W), each for E / S neighbours -> (B, E, out, H / 3, W / 3).
    """

    def __init__(self, modules: Sequence[nn.Sequential]) -> None:
        norms = [module[1] for module in modules]
        self.parameters = [stack([module[0] for module in modules], "weight"), _scale_and_shift(norms)]
        self.statistics = [stack(norms, name) for name in ("running_mean", "running_var")]
        self.is_of_maximum = isinstance(modules[0][3], nn.MaxPool2d)
        for parameter in self.parameters:
            parameter.requires_grad_()

    def train(self, x: Tensor) -> Tensor:
        """By the statistics of the batch, which also enter the running ones."""
        return self._go(x, training=True)

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """By the running statistics."""
        return self._go(x, training=False)

    def _go(self, x: Tensor, *, training: bool) -> Tensor:
        weight, norm = self.parameters
        x = convolve(weight, x)
        if training:
            pooled = norm_relu_max_pool if self.is_of_maximum else norm_relu_mean_pool
            return pooled(x, norm, self.statistics, POOL)
        out = F.relu(batch_norm(x, norm, self.statistics, training=False)).flatten(1, 2)
        pool = F.max_pool2d if self.is_of_maximum else F.avg_pool2d
        return pool(out, POOL).unflatten(1, weight.shape[:2])


class Head:
    """E last layers.

    Args:    modules: of each model, Sequential(Flatten, Linear).
    Shapes:  x (B, E, C, H, W) -> (E, out, B).
    """

    statistics: list[Tensor] = []

    def __init__(self, modules: Sequence[nn.Sequential]) -> None:
        linears = [module[1] for module in modules]
        self.parameters = [stack(linears, "weight"), stack(linears, "bias").unsqueeze(-1)]
        for parameter in self.parameters:
            parameter.requires_grad_()

    def train(self, x: Tensor) -> Tensor:
        weight, bias = self.parameters
        return affine(weight, bias, x.flatten(2).permute(1, 2, 0))

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        return self.train(x)


class ConvPredictor:
    """E interfaces of one architecture: those of dnipipe.interface.Conv with batch normalisation.

    Args:    interfaces: of each model, all with as many hidden layers; one that is not conditional must see a one-hot
             of zeros. num_classes: C; 0: none is conditional.
    Shapes:  h (B, E, channels, H, W), one_hot (E, C or padded(C), B) -> like h, in units of the interface's scale.
    Fields:  num_hidden_parameters: as in stacked.Predictor; what classes add at each place is of the last layer.
    """

    def __init__(self, interfaces: Sequence[Conv], num_classes: int) -> None:
        columns = [list(modules) for modules in zip(*(each.layers for each in interfaces), strict=True)]
        filters = [column for column in columns if isinstance(column[0], nn.Conv2d)]
        norms = [_scale_and_shift(column) for column in columns if isinstance(column[0], nn.BatchNorm2d)]
        inputs = filters[-1][0].out_channels + padded(num_classes)
        first = filters[0][0].weight.new_zeros(len(interfaces), filters[0][0].out_channels, inputs, KERNEL, KERNEL)
        for own, module in zip(first, filters[0], strict=True):
            own[:, : module.in_channels] = module.weight.detach()
        weights = [stack(column, "weight") for column in filters[1:]]
        rest = [each for pair in zip(norms, weights, strict=True) for each in pair]
        of_class = _gradients_of_classes(interfaces)
        self.parameters = [first, *rest, stack(filters[-1], "bias"), *of_class]
        self.num_hidden_parameters = len(rest)
        self.label_at_places = bool(of_class)
        for parameter in self.parameters:
            parameter.requires_grad_()

    def __call__(self, h: Tensor, one_hot: Tensor) -> Tensor:
        weight, *rest = self.parameters
        of_class = rest.pop() if self.label_at_places else None
        bias = rest.pop()
        if weight.shape[2] > h.shape[2]:
            label = widened(one_hot, weight.shape[2] - h.shape[2]).permute(2, 0, 1)[..., None, None]
            h = torch.cat([h, label.expand(-1, -1, -1, *h.shape[3:])], 2)
        for norm, next_weight in zip(rest[::2], rest[1::2], strict=True):
            h, weight = norm_relu_mean_pool(convolve(weight, h), norm), next_weight
        out = convolve(weight, h) + bias[..., None, None]
        if of_class is None:
            return out
        told = one_hot[:, : of_class.shape[1]].transpose(1, 2) @ of_class
        return out + told.transpose(0, 1).view_as(out)


def _gradients_of_classes(interfaces: Sequence[Conv]) -> list[Tensor]:
    """(E, C, channels * H * W), zeros for who sees no label; nothing where nobody has them."""
    given = [each.of_class for each in interfaces]
    like = next((each for each in given if each is not None), None)
    if like is None:
        return []
    return [torch.stack([torch.zeros_like(like) if each is None else each.detach() for each in given])]


def convolve(weight: Tensor, x: Tensor) -> Tensor:
    """weight (E, out, in, 5, 5), x (B, E or S, in, H, W), each of S for E / S neighbours -> (B, E, out, H, W)."""
    filters = weight.flatten(0, 1)
    if filters.is_cuda:
        # The order that tensor cores take, and the kernels of fused_pool. By clone(), since contiguous() leaves filters
        # of one channel with strides that torch takes for the other order, in which the output would then be.
        filters = filters.clone(memory_format=torch.channels_last)
    filtered = F.conv2d(x.flatten(1, 2), filters, padding=KERNEL // 2, groups=x.shape[1])
    return filtered.unflatten(1, weight.shape[:2])


def _scale_and_shift(norms: Sequence[nn.Module]) -> Tensor:
    """(E, 2, C)."""
    return torch.stack([stack(norms, name) for name in ("weight", "bias")], 1)
