"""Which interface suits an activation: chosen by its layout, built for its shape and device.

(B, D)        local_head  with integer labels, else mlp
(B, C, H, W)  conv        convolutional layers
(B, T, D)     local_head  with integer labels; without them nothing is known to be safe, so you must choose
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .base import Interface
from .conditional import is_integer, label_shapes
from .conv import Conv
from .linear import Linear
from .local_head import LocalHead
from .mlp import MLP
from .potential import Potential
from .scaled import sampled_head, scaled_head
from .transformer import Transformer


@dataclass(frozen=True)
class TensorMeta:
    """What is known of a tensor before it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Kind:
    """A kind of interface: its class, the ranks it takes, the dimension whose size it is built for, and whether it
    classifies and so always needs num_classes."""

    build: Callable[..., Interface]
    ranks: tuple[int, ...]
    dim: int
    classifies: bool = False


_LAYOUTS: Mapping[int, str] = MappingProxyType({2: "(B, D)", 3: "(B, T, D)", 4: "(B, C, H, W)"})
_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "linear": _Kind(Linear, (2, 3), -1),
        "mlp": _Kind(MLP, (2, 3), -1),
        "conv": _Kind(Conv, (4,), 1),
        "local_head": _Kind(LocalHead, (2, 3), -1, classifies=True),
        "scaled_head": _Kind(scaled_head, (2, 3), -1, classifies=True),
        "sampled_head": _Kind(sampled_head, (2, 3), -1, classifies=True),
        "transformer": _Kind(Transformer, (3,), -1),
        "potential": _Kind(Potential, (2, 3), -1),
    }
)


def choose_interface(activation: TensorMeta, label: TensorMeta | None, num_classes: int) -> str | None:
    """The name of the interface that suits, for build_interface; None if none is known to suit.

    Where rows are to be classified, by num_classes > 0 and integer labels of shape (B,), or (B, T) for a sequence, a
    local head is safest: a regressed gradient lets a residual stream explode, and silenced the ReLUs of an AlexNet on
    CIFAR-10 for good (docs/log.md).
    """
    if not activation.dtype.is_floating_point:
        return None
    match len(activation.shape):
        case 4:
            return "conv"
        case 2 | 3 if num_classes > 0 and _fits(label, activation):
            return "local_head"
        case 2:
            return "mlp"
    return None


def build_interface(
    name: str,
    activation: TensorMeta | Tensor,
    *,
    num_classes: int = 0,
    label: TensorMeta | Tensor | None = None,
    **options: Any,
) -> Interface:
    """A fresh interface for activations like `activation`, with float32 parameters on its device (TensorMeta: the CPU).

    Args:    name: "linear", "mlp", "conv", "local_head", "scaled_head", "sampled_head", "transformer" or
             "potential".
             num_classes, label: conditional on the label if num_classes > 0 and `label` fits the activation, else not.
             A head always needs num_classes.
             options: passed to the class, e.g. width=256 or normalise=False.
    Raises:  ValueError: an unknown name; an activation of a rank that the kind does not take; what its class refuses.
    """
    kind = check_interface(name, activation, num_classes=num_classes)
    shape = tuple(activation.shape)
    conditional = kind.classifies or _fits(label, activation)
    interface = kind.build(shape[kind.dim], num_classes=num_classes if conditional else 0, **options)
    device = activation.device if isinstance(activation, Tensor) else torch.device("cpu")
    return interface.to(device=device, dtype=torch.float32)


def check_interface(name: str, activation: TensorMeta | Tensor, *, num_classes: int) -> _Kind:
    """Says whether build_interface can make it, without making it. Raises: ValueError."""
    kind = _KINDS.get(name)
    if kind is None:
        raise ValueError(
            f"unknown interface {name!r}: choose one of {', '.join(_KINDS)}, or pass an Interface of your own"
        )
    shape = tuple(activation.shape)
    if len(shape) not in kind.ranks:
        takes = " or ".join(_LAYOUTS[rank] for rank in kind.ranks)
        fitting = [other for other, its in _KINDS.items() if len(shape) in its.ranks]
        cure = f"choose {' or '.join(fitting)}" if fitting else "wrap your own module in Custom"
        raise ValueError(f"interface {name!r} takes an activation of shape {takes}, got {shape}: {cure}")
    if kind.classifies and num_classes < 1:
        raise ValueError(
            f"num_classes = {num_classes}: a local head classifies; give the number of classes, at least 1"
        )
    return kind


def _fits(label: TensorMeta | Tensor | None, activation: TensorMeta | Tensor) -> bool:
    return label is not None and is_integer(label.dtype) and tuple(label.shape) in label_shapes(tuple(activation.shape))
