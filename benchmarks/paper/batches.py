"""Images on the device as the bytes they are; for each seed an endless order of them; batches made on the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from dnipipe.data.images import ImageData

from .recipe import HELD_OUT


class Images:
    """The training set without its held-out part, that part, and the test set: (N, C, H, W) uint8, labels (N,).

    What is held out does not depend on a seed.

    Args:    limit: keep no more than so many training and test images each; None: all. as_pictures: how a stack wants
             them: (N, 1, C, H, W), of convolutional networks, else columns, (features, N).
             mirror: train on each image and its mirror image. shift: and on each moved by so many pixels to all eight
             sides; what comes in there is the edge again.
    Raises:  ValueError: too few images to hold any out.
    """

    def __init__(
        self,
        data: ImageData,
        device: str = "cpu",
        limit: int | None = None,
        *,
        as_pictures: bool = False,
        mirror: bool = False,
        shift: int = 0,
    ) -> None:
        images, labels = data.train_images[:limit], data.train_labels[:limit]
        held = int(HELD_OUT * len(images))
        if held < 1:
            raise ValueError(
                f"{len(images)} training images are too few: {HELD_OUT:.0%} are held out, so give 10 or more"
            )
        sample = images.float()
        self.mean, self.factor = sample.mean().to(device), sample.std().reciprocal().to(device)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.num_classes, self.device, self.as_pictures = data.num_classes, device, as_pictures
        self.train = images[order[held:]].to(device), labels[order[held:]].to(device)
        self.train = _copied(*self.train, mirror=mirror, shift=shift)
        self.held_out = images[order[:held]].to(device), labels[order[:held]].to(device)
        self.test = data.test_images[:limit].to(device), data.test_labels[:limit].to(device)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train[0].shape[1:]
        return channels, height, width

    @property
    def features(self) -> int:
        return self.train[0][0].numel()

    def prepared(self, images: Tensor) -> Tensor:
        """Standardised by the mean and deviation of the training set, two numbers, and laid out for a stack.

        Shapes:  (N, C, H, W) -> (features, N) or (N, 1, C, H, W); (S, N, C, H, W) -> (S, features, N) or
                 (N, S, C, H, W).
        """
        standard = (images - self.mean) * self.factor
        if not self.as_pictures:
            return standard.flatten(-3).transpose(-1, -2)
        pictures = standard.transpose(0, 1) if images.ndim == 5 else standard.unsqueeze(1)
        if not images.is_cuda:
            return pictures
        # the order of memory that tensor cores take: channels last, of all seeds side by side
        flat = pictures.flatten(1, 2).contiguous(memory_format=torch.channels_last)
        return flat.unflatten(1, pictures.shape[1:3])


def _copied(images: Tensor, labels: Tensor, *, mirror: bool, shift: int) -> tuple[Tensor, Tensor]:
    """All copies one after the other; (N, C, H, W), (N,)."""
    copies = [images, images.flip(-1)] if mirror else [images]
    moves = list(product((0, shift, -shift), repeat=2)) if shift else [(0, 0)]
    moved = torch.cat([_moved(_moved(copy, down, 2), right, 3) for copy in copies for down, right in moves])
    return moved, labels.repeat(len(copies) * len(moves))


def _moved(images: Tensor, by: int, dim: int) -> Tensor:
    side = images.shape[dim]
    return images.index_select(dim, (torch.arange(side, device=images.device) - by).clamp(0, side - 1))


class Batches:
    """Batch after batch, every image once an epoch, in an order that a model's seed draws.

    Models of one seed see the same batches. These are given once for each of the S seeds if the models of a seed are
    neighbours, and as many for each; else once for each model, so that S = E.

    Args:    seeds: of each model.
    Raises:  ValueError: the batch is larger than the training set.
    """

    def __init__(self, images: Images, seeds: Sequence[int], batch: int) -> None:
        self.images, self.batch = images, batch
        distinct = list(dict.fromkeys(seeds))
        each = len(seeds) // len(distinct)
        are_neighbours = list(seeds) == [seed for seed in distinct for _ in range(each)]
        self.seeds = distinct if are_neighbours else list(seeds)
        self.per_epoch = len(images.train[1]) // batch
        if self.per_epoch == 0:
            raise ValueError(
                f"batch = {batch} is more than the {len(images.train[1])} training images: take a smaller one"
            )
        self.epoch, self.orders = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """What prepared() makes of (B, C, H, W) and labels (B,) if S = 1, else of (S, B, C, H, W) and (S, B)."""
        return self.take(self.indices(step, 1)[0])

    def indices(self, step: int, count: int) -> Tensor:
        """Which images `count` batches from `step` on have: (count, S, B)."""
        parts = []
        while count > 0:
            epoch, number = divmod(step, self.per_epoch)
            here = min(count, self.per_epoch - number)
            parts.append(self._of_epoch(epoch)[number : number + here])
            step, count = step + here, count - here
        return torch.cat(parts)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of these images, (S, B)."""
        indices = indices[0] if len(indices) == 1 else indices
        images, labels = self.images.train
        return self.images.prepared(images[indices]), labels[indices]

    def _of_epoch(self, epoch: int) -> Tensor:
        """(batches, S, B)."""
        if epoch != self.epoch:
            orders = {seed: self._order(seed, epoch) for seed in dict.fromkeys(self.seeds)}
            together = torch.stack([orders[seed] for seed in self.seeds])
            if self.images.train[0].is_cuda:
                together = together.pin_memory()  # so that the copy waits for nothing
            self.epoch, self.orders = epoch, together.to(self.images.device, non_blocking=True)
        return self.orders.unflatten(1, (self.per_epoch, self.batch)).transpose(0, 1)

    def _order(self, seed: int, epoch: int) -> Tensor:
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.images.train[1]), generator=random)
        return order[: self.per_epoch * self.batch]
