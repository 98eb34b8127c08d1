"""The dtype in which an interface computes: that of the activation if it is bfloat16 or float16, else float32.

Beside its matrix products an interface costs as much as it moves memory, and each change of dtype is one more pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)

NORMS_IN_FLOAT32 = ("cpu",)
"""Devices whose LayerNorm sums the gradients of its weights in the dtype of its input, which many tokens do not fit."""


def own_view(h: Tensor) -> Tensor:
    """`h` without its graph: as it is if it is in half precision, which precision_of(h) serves, else in float32."""
    return h.detach() if h.dtype in HALF else h.detach().float()


def precision_of(h: Tensor) -> torch.autocast:
    """Autocast to the dtype of `h` if that is bfloat16 or float16, else none: the caller's own autocast has no say."""
    low = h.dtype in HALF
    # no cache: inside a caller's autocast its half-precision copies of the weights would outlive the optimizer step
    return torch.autocast(h.device.type, dtype=h.dtype if low else None, enabled=low, cache_enabled=False)


def full_precision(h: Tensor) -> torch.autocast:
    """No autocast on the device of `h`: around a backward, which the caller's autocast would otherwise reach."""
    return torch.autocast(h.device.type, enabled=False)


def as_factor(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 scale, (), as a factor or divisor of a large tensor of `dtype`.

    Rounded to bfloat16 if that is `dtype`: on a GPU operations of mixed dtypes take several times as long. Not to
    float16, in which the RMS of a gradient may be next to nothing: there the result is float32.
    """
    return scale.view(1) if dtype == torch.float16 else scale.to(dtype)


def product_sum(one: Tensor, other: Tensor) -> Tensor:
    """The sum of products, (), float32, of two tensors of one shape."""
    # not torch.dot: on a CPU its last bits depend on where in memory the tensors lie
    if one.dtype == torch.float16:
        one = one.float()  # the product of two small gradients is nothing in float16
    return (one * other).sum(dtype=torch.float32)


def square_sum(tensor: Tensor) -> Tensor:
    """The sum of squares, (), float32, in one pass."""
    # row by row: on a CPU the norm of millions of elements at once is wrong in the fourth digit
    rows = tensor.flatten(2) if tensor.ndim > 2 else tensor
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32 if tensor.dtype in HALF else None)
    return norms.square().sum(dtype=torch.float32)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm whose output has the dtype of its input; the statistics are float32 in any case.

    Under autocast torch's own copies its input to float32 on a GPU, and returns float32 for a matrix product to copy
    back.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or x.device.type in NORMS_IN_FLOAT32:
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        with full_precision(x):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
