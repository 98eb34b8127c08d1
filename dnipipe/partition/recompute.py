"""A stage that keeps only what goes into each layer, and runs the layer again when its backward comes.

Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost; torch.utils.checkpoint does the work.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from .sequential import named_layers


class Recomputed(nn.Sequential):
    """The same layers under the same names: the same outputs and gradients, for one more forward per layer."""

    def forward(self, input: Any) -> Any:
        for layer in self:
            # not reentrant: torch's stages backpropagate from several outputs at once, and inputs may need no gradient
            input = checkpoint(layer, input, use_reentrant=False) if self.training else layer(input)
        return input


def recompute(stage: nn.Sequential) -> Recomputed:
    """The stage's own layers, not copies."""
    return Recomputed(OrderedDict(named_layers(stage)))
