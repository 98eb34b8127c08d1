"""How a label becomes features of an activation's layout: the "conditional" of a conditional interface (cDNI).

Source: Jaderberg et al. 2016, section 2.1 (conditioning on labels).

A negative label (ignore_index, usually -100) means "no label". A label >= num_classes is an error: it raises an
IndexError or RuntimeError on a CPU and a device assert on a GPU, where looking first would mean waiting.
"""

import torch
from torch import Tensor, nn


def require_label(name: str, num_classes: int, label: Tensor | None, *shapes: tuple[int, ...]) -> Tensor:
    """`label` as int64, once it is known to be there and to fit.

    Raises:  ValueError: no label, or one whose shape is not among `shapes`. TypeError: not integers.
    """
    if label is None or tuple(label.shape) not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        got = None if label is None else tuple(label.shape)
        raise ValueError(f"num_classes = {num_classes}, so {name} needs a label of shape {allowed}, got {got}")
    if not is_integer(label.dtype):
        raise TypeError(f"{name} needs integer labels (class indices), got {label.dtype}: pass e.g. label.argmax(-1)")
    return label.long()


def is_integer(dtype: torch.dtype) -> bool:
    """True for dtypes that hold class indices."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def label_shapes(activation: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The label shapes that fit: (B,) for (B, D) and (B, C, H, W); one per token (B, T), or (B,), for (B, T, D)."""
    return (activation[:2], activation[:1]) if len(activation) == 3 else (activation[:1],)


def one_hot(label: Tensor, num_classes: int) -> Tensor:
    """Label (B,) int64 -> (B, num_classes) float32; a negative label gives a row of zeros."""
    # not F.one_hot: it refuses negative labels, and on a CPU it reads the labels' minimum and maximum back
    zeros = torch.zeros(*label.shape, num_classes, device=label.device)
    return zeros.scatter(-1, label.clamp_min(0).unsqueeze(-1), (label >= 0).float().unsqueeze(-1))


def one_hot_channels(
    label: Tensor, num_classes: int, height: int, width: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Label (B,) int64 -> (B, num_classes, height, width) of `dtype`, constant over each channel."""
    return one_hot(label, num_classes).to(dtype)[:, :, None, None].expand(-1, -1, height, width)


class LabelEmbedding(nn.Embedding):
    """Label (B,) or (B, T) int64 -> (B, E) or (B, T, E); row 0 stands for "no label", class c has row c + 1."""

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__(num_classes + 1, features)
        # the size that nn.Linear makes of an activation of RMS 1, so that neither drowns the other at the start
        nn.init.uniform_(self.weight, -1.0, 1.0)

    def forward(self, label: Tensor) -> Tensor:
        return super().forward(label.clamp_min(-1) + 1)


class ConditionedLinear(nn.Module):
    """A linear layer of the activation and the one-hot label, without ever building the one-hot.

    W [h, one_hot(label)] = W_h h + row `label` of a table: over tokens the one-hot alone would be (B, T, vocabulary).

    Args:    features: D. out_features: E. num_classes: 0 ignores the label. name: who to blame in an error.
    Shapes:  h (B, D) with label (B,), h (B, T, D) with label (B, T) or (B,) -> (B, E), (B, T, E).
    Raises:  ValueError: num_classes > 0 and no label that fits.
    """

    def __init__(self, features: int, out_features: int, num_classes: int, *, name: str) -> None:
        super().__init__()
        self.num_classes, self.name = num_classes, name
        self.linear = nn.Linear(features, out_features)
        self.rows = LabelEmbedding(num_classes, out_features) if num_classes > 0 else None

    def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
        out: Tensor = self.linear(h)
        if self.rows is None:
            return out
        rows: Tensor = self.rows(require_label(self.name, self.num_classes, label, *label_shapes(tuple(h.shape))))
        rows = rows.to(out.dtype)  # under autocast the table alone is float32, and the sum would be
        return out + (rows if rows.ndim == out.ndim else rows.unsqueeze(1))
