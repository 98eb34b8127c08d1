"""Predictors beside gradients that carry DeepSpeed's factors.

DeepSpeed divides the loss by the gradient accumulation steps, and multiplies it by the loss scale in fp16, before the
last stage goes backward; so all gradients on the wire carry these factors. Predictors learn and predict gradients of
the mean loss of one microbatch, as everywhere in dnipipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..interface import Learner


class ScaledLearner(Learner):
    """A Learner whose gradients outside are `scale()` times those inside. The rest as in Learner, whose parts it takes.

    Args: scale: what DeepSpeed multiplies the loss of one microbatch by, at present; more than 0.
    """

    def __init__(self, learner: Learner, scale: Callable[[], float]) -> None:
        self.__dict__.update(vars(learner))
        self.scale = scale

    def predict(self, hs: Sequence[Tensor], label: Tensor | None) -> tuple[Tensor, ...]:
        scale = self.scale()
        return tuple(grad.mul_(scale) for grad in super().predict(hs, label))

    def learn(self, hs: Sequence[Tensor], label: Tensor | None, true_grads: Sequence[Tensor]) -> None:
        scale = self.scale()
        super().learn(hs, label, [_unscaled(grad, scale) for grad in true_grads])


def _unscaled(grad: Tensor, scale: float) -> Tensor:
    if grad.dtype != torch.float16:
        return grad if scale == 1.0 else grad / scale
    # float32, where a small gradient without its loss scale is not lost; an overflow downstream teaches nothing
    return torch.nan_to_num(grad.float() / scale, nan=0.0, posinf=0.0, neginf=0.0)
