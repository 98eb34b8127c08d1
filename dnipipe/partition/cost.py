"""What each layer of a row costs for one microbatch: time there and back, and memory between the two.

Each layer runs by itself, as a copy, on the detached output of the layer before it. So the model is left as it was, and
only one layer at a time must find room on the device.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .sequential import named_layers, runs

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class LayerCost:
    """One layer, or a stage of several, for one microbatch.

    Fields: name: in the model, and the class, as in "3 Block". forward_ms, backward_ms: the latter of both input and
            weights. parameter_bytes: of its weights. saved_bytes: what it keeps from forward to backward beside
            weights and buffers. output_bytes: what it hands on. forward_flops: floating-point operations of its
            forward, without the loss, a multiply-add counted as two.

    forward_flops are those that torch's FlopCounterMode knows: matrix products, convolutions and attention, of which
    causal attention and any other mask count in full, as if every token looked at every one. What is done number by
    number counts nothing, and neither does a fused kernel that it does not know, such as an LSTM's on a CPU.
    """

    name: str
    forward_ms: float
    backward_ms: float
    parameter_bytes: int
    saved_bytes: int
    output_bytes: int
    forward_flops: int = 0

    @property
    def total_ms(self) -> float:
        """Forward and backward."""
        return self.forward_ms + self.backward_ms


def measure_layers(
    model: nn.Sequential, microbatch: Tensor, loss: Callable[[Tensor], Tensor], *, repeats: int = 5
) -> list[LayerCost]:
    """Measures every layer; weights, gradients, buffers, mode and random numbers stay as they are.

    A layer's input needs a gradient where it would in the whole model, so it is not computed for the microbatch itself.

    Args:
        model: layers that take one tensor and return one; may lie on another device.
        microbatch: what the first layer takes; its device is where all run.
        loss: counts to the last layer.
        repeats: how often each layer is timed, after one warm-up; the median counts.

    Raises: ValueError: repeats < 1, or a layer fails or returns no tensor; the message names it.
            TypeError: the model is no nn.Sequential.
    """
    return [cost for cost, _ in each_layer(model, microbatch, loss, repeats=repeats)]


def each_layer(
    model: nn.Sequential, microbatch: Tensor, loss: Callable[[Tensor], Tensor], *, repeats: int = 5
) -> Iterator[tuple[LayerCost, Tensor]]:
    """measure_layers() one by one, each cost with the layer's output, detached."""
    if not isinstance(model, nn.Sequential):
        raise TypeError(f"only the layers of an nn.Sequential are measured, got {type(model).__name__}: make it one")
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: each layer is timed at least once")
    layers, h = named_layers(model), microbatch
    for number, (name, layer) in enumerate(layers, start=1):
        own_layer = copy.deepcopy(layer).to(microbatch.device)
        run = _Run(f"{name} {type(layer).__name__}", own_layer, loss if number == len(layers) else None)
        gpus = [microbatch.device] if microbatch.is_cuda else []
        try:
            with torch.random.fork_rng(gpus), torch.enable_grad():
                cost, h = run.measure(h, repeats)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            given = f"{h.dtype} of shape {tuple(h.shape)}"
            raise ValueError(f"layer {run.name} cannot be measured on a {given}: {error}") from error
        yield cost, h


def stage_costs(layers: Sequence[LayerCost], lengths: Sequence[int]) -> list[LayerCost]:
    """The costs of stages of so many layers each. Memory that two layers of a stage share is counted twice.

    Raises: ValueError: a stage without layers, or lengths that are not all layers together.
    """
    return [_sum(layers[start:end]) for start, end in runs(lengths, len(layers))]


def timed(work: Callable[[], ResultT], device: torch.device) -> tuple[float, ResultT]:
    """Milliseconds that some work takes until the device has done it, and its result."""
    _wait_for(device)
    start_s = time.perf_counter()
    result = work()
    _wait_for(device)
    return (time.perf_counter() - start_s) * 1e3, result


@dataclass(frozen=True)
class _Run:
    """A layer to be measured; loss: of the last layer alone."""

    name: str
    layer: nn.Module
    loss: Callable[[Tensor], Tensor] | None

    def measure(self, h: Tensor, repeats: int) -> tuple[LayerCost, Tensor]:
        """The cost at the input h, and the output, which needs a gradient where the layer's does."""
        output, saved_bytes, forward_flops = self._warm_up(h)
        times = [self._times(h) for _ in range(repeats)]
        forward_ms, backward_ms = (median(column) for column in zip(*times, strict=True))
        parameter_bytes = sum(_bytes(parameter) for parameter in self.layer.parameters())
        cost = LayerCost(
            self.name, forward_ms, backward_ms, parameter_bytes, saved_bytes, _bytes(output), forward_flops
        )
        return cost, output

    def _warm_up(self, h: Tensor) -> tuple[Tensor, int, int]:
        """The output, the bytes saved, and the operations. Not timed: counting takes time, too."""
        saved, flops = _Saved(self.layer), FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
        with saved.watching():
            with flops:
                output = self._output(self._entry(h))
            result = self._result(output)
        if result.requires_grad:
            self._backward(result)
        return output.detach().requires_grad_(output.requires_grad), saved.num_bytes, flops.get_total_flops()

    def _times(self, h: Tensor) -> tuple[float, float]:
        entry = self._entry(h)
        forward_ms, result = timed(lambda: self._result(self._output(entry)), h.device)
        if not result.requires_grad:
            return forward_ms, 0.0
        backward_ms, _ = timed(lambda: self._backward(result), h.device)
        return forward_ms, backward_ms

    def _entry(self, h: Tensor) -> Tensor:
        # a clone, because a layer may work in place, which a leaf that needs a gradient does not allow
        return h.detach().requires_grad_(h.requires_grad).clone()

    def _output(self, entry: Tensor) -> Tensor:
        output = self.layer(entry)
        if not isinstance(output, Tensor):
            raise TypeError(f"it returned a {type(output).__name__}, and a layer must return one tensor")
        return output

    def _result(self, output: Tensor) -> Tensor:
        """Where the backward starts."""
        return output if self.loss is None else self.loss(output)

    def _backward(self, result: Tensor) -> None:
        torch.autograd.backward(result, torch.ones_like(result))


class _Saved:
    """Counts what a graph keeps, each storage once, without the weights and buffers of its layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in chain(layer.parameters(), layer.buffers())}
        self._kept: dict[int, torch.UntypedStorage] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._owned:
            self._kept[storage.data_ptr()] = storage  # held, so that no other storage takes its place
        return tensor.detach()  # the tensor itself would keep its own graph alive

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


def _sum(layers: Sequence[LayerCost]) -> LayerCost:
    first, last = layers[0], layers[-1]
    return LayerCost(
        name=first.name if len(layers) == 1 else f"{first.name} to {last.name}",
        forward_ms=sum(layer.forward_ms for layer in layers),
        backward_ms=sum(layer.backward_ms for layer in layers),
        parameter_bytes=sum(layer.parameter_bytes for layer in layers),
        saved_bytes=sum(layer.saved_bytes for layer in layers),
        output_bytes=last.output_bytes,
        forward_flops=sum(layer.forward_flops for layer in layers),
    )


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Queries times keys, then times values, as torch counts it on a GPU. Each (B, H, T, D); keys may have fewer H."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# without it, attention counts nothing on a CPU (torch 2.13)
_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
