"""Where in an activation of a stack the models are, and where the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Axes of an activation. of_one_model: all but that of the models."""

    ndim: int
    models: int
    batch: int

    @property
    def of_one_model(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(self.ndim) if axis != self.models)

    def column(self, values: Sequence[float], like: Tensor) -> Tensor:
        """A number for each model, to be broadcast over an activation."""
        return like.new_tensor([float(each) for each in values]).view(
            [len(values) if axis == self.models else 1 for axis in range(self.ndim)]
        )

    def average(self, num_models: int, at: Sequence[int], like: Tensor) -> Tensor:
        """Zeros for each model, each of the shape `at` of one image's activation."""
        if self.batch == 0:
            return like.new_zeros(1, num_models, *at)
        return like.new_zeros(num_models, *at, 1)


LAYOUTS = {False: Layout(3, 0, 2), True: Layout(5, 1, 0)}
"""Of fully connected networks, (E, D, B); of convolutional ones, (B, E, C, H, W)."""
