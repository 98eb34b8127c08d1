"""Images as the stacks want them, (features, N), and for each seed an endless order of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dnipipe.data.images import ImageData

from .recipe import HELD_OUT


class Images:
    """The training set without its held-out part, that part, and the test set: (features, N) float32, labels (N,).

    Standardised by the mean and deviation of the training set, two numbers. What is held out does not depend on a seed.

    Args:    limit: keep no more than so many training and test images each; None: all.
    Raises:  ValueError: too few images to hold any out.
    """

    def __init__(self, data: ImageData, device: str = "cpu", limit: int | None = None) -> None:
        images, labels = data.train_images[:limit], data.train_labels[:limit]
        held = int(HELD_OUT * len(images))
        if held < 1:
            raise ValueError(
                f"{len(images)} training images are too few: {HELD_OUT:.0%} are held out, so give 10 or more"
            )
        sample = images.float()
        self.mean, self.deviation = sample.mean(), sample.std()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.num_classes, self.device = data.num_classes, device
        self.train = self._columns(images[order[held:]]), labels[order[held:]].to(device)
        self.held_out = self._columns(images[order[:held]]), labels[order[:held]].to(device)
        self.test = self._columns(data.test_images[:limit]), data.test_labels[:limit].to(device)

    @property
    def features(self) -> int:
        return self.train[0].shape[0]

    def _columns(self, images: Tensor) -> Tensor:
        flat = ((images.float() - self.mean) / self.deviation).flatten(1)
        return flat.T.contiguous().to(self.device)


class Batches:
    """Batch after batch, every image once an epoch, in an order that a model's seed draws.

    Models of one seed see the same batches; with a single seed these are given once, not once for each model.

    Args:    seeds: of each model.
    Raises:  ValueError: the batch is larger than the training set.
    """

    def __init__(self, images: Images, seeds: Sequence[int], batch: int) -> None:
        self.images, self.batch = images, batch
        self.seeds = sorted(set(seeds))
        self.which = torch.tensor([self.seeds.index(seed) for seed in seeds], device=images.device)
        self.per_epoch = len(images.train[1]) // batch
        if self.per_epoch == 0:
            raise ValueError(
                f"batch = {batch} is more than the {len(images.train[1])} training images: take a smaller one"
            )
        self.epoch, self.orders = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """(features, B) and (B,) if all seeds are one, else (E, features, B) and (E, B)."""
        epoch, number = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.orders = torch.stack([self._order(seed, epoch) for seed in self.seeds]).to(self.images.device)
        chosen = self.orders[:, number * self.batch : (number + 1) * self.batch]
        x, labels = self.images.train
        if len(self.seeds) == 1:
            return x[:, chosen[0]], labels[chosen[0]]
        by_seed = x[:, chosen].transpose(0, 1)
        return by_seed[self.which], labels[chosen][self.which]

    def _order(self, seed: int, epoch: int) -> Tensor:
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self.images.train[1]), generator=random)
