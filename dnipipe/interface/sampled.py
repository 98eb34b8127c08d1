"""Cross-entropy over a large vocabulary from a few of its classes: those that are labels here, and some of the others.

    log sum over all classes exp(logit)  ~  log( sum over the labels exp(logit) + others / drawn * sum over drawn ones )

Source: sampled softmax, Bengio and Senecal 2008; Jean et al. 2015. Here labels are not sampled: each enters once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = (math.sqrt(5) - 1) / 2


class SampledCrossEntropy(nn.Module):
    """Classes are drawn in a fixed order that comes back after `num_classes` of them, the next `num_samples` each step.

    So all are drawn equally often and spread evenly, and nothing comes from a random number generator: that is the
    model's, and its dropout must not depend on the interface.

    Args:    num_classes: C. num_samples: K, from 1 to C.
    Raises:  ValueError: num_samples out of range.
    """

    first: Tensor

    def __init__(self, num_classes: int, num_samples: int) -> None:
        super().__init__()
        if not 1 <= num_samples <= num_classes:
            raise ValueError(
                f"samples = {num_samples} must be from 1 to num_classes = {num_classes}: give fewer, or None for all"
            )
        self.num_classes, self.num_samples = num_classes, num_samples
        self.stride = next(n for n in range(max(1, int(GOLDEN * num_classes)), 0, -1) if math.gcd(n, num_classes) == 1)
        self.register_buffer("first", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, label: Tensor, classify: nn.Linear, ignore_index: int) -> Tensor:
        """The sum, (), over the labels that are not ignored of an estimate of their cross-entropy.

        Shapes: x (N, E), label (N,) int64; classify: E -> C.
        """
        counts = label != ignore_index
        known = label.where(counts, 0)
        # how often each class is a label here; no torch.unique, which waits for the device
        times = torch.zeros(self.num_classes, device=x.device).scatter_add(0, known, counts.float())
        drawn = (self.first + torch.arange(self.num_samples, device=x.device)) * self.stride % self.num_classes
        is_other = times[drawn] == 0
        share = (times == 0).sum() / is_other.sum().clamp_min(1)
        # each label of the microbatch is a column, so a class that is one several times shares its weight of 1
        log_times = times[known].log()
        log_weights = torch.cat([(-log_times).where(counts, -torch.inf), share.log().where(is_other, -torch.inf)])
        columns = torch.cat([known, drawn])
        logits = F.linear(x, F.embedding(columns, classify.weight), classify.bias[columns])
        target = torch.arange(label.shape[0], device=x.device).where(counts, ignore_index)
        total = F.cross_entropy(logits.float() + log_weights, target, ignore_index=ignore_index, reduction="sum")
        return total - log_times.where(counts, 0.0).sum()

    @torch.no_grad()
    def end_step(self) -> None:
        self.first.add_(self.num_samples).remainder_(self.num_classes)
