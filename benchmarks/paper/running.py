"""Trains stacks, several side by side if wanted, such that a cut hurts nothing: rows after each stack, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dnipipe.data.images import load_images

from .batches import Images
from .job import Job, by_images, split
from .order import Order
from .rows import PaperRow, joined, read_rows, selected, write_rows
from .training import Training, agreement, fast_products

__all__ = ["Job", "agreement", "finish", "run"]

RESERVE = 0.05, 20.0
"""Of the time limit, and seconds at most: for saving, table and picture."""


class Clock:
    """Whose time it is, and whether it is up: whether the way to the next evaluation, where alone a training stops, may
    be longer than what is left, as it was at its longest."""

    def __init__(self, limit_s: float) -> None:
        share, most = RESERVE
        self.until = time.monotonic() + limit_s - min(share * limit_s, most)
        self.last = time.monotonic()
        self.longest = 0.0
        self.left: dict[int, float] = {}

    def leave(self, place: int) -> None:
        """A training is on its way to its next evaluation."""
        self.left[place] = time.monotonic()

    def arrive(self, place: int) -> None:
        self.longest = max(self.longest, time.monotonic() - self.left[place])

    def share(self, trainings: Sequence[Training]) -> None:
        """The seconds since the last call belong to those that train, in equal parts, so that all together are true."""
        now = time.monotonic()
        for training in trainings:
            training.seconds += (now - self.last) / len(trainings)
        self.last = now

    @property
    def is_up(self) -> bool:
        return time.monotonic() + self.longest > self.until


def run(order: Order, jobs: Sequence[Job]) -> tuple[list[PaperRow], bool]:
    """Trains what has no rows yet; `order.workers` stacks at a time, each on a stream of its own.

    Returns: all rows of the file, with their selection, and whether every job is done.
    """
    rows = read_rows(order.json)
    complete = by_images([job.completed(order) for job in jobs])
    waiting = [job for job in split(complete, order.stack) if not job.is_done(rows)]
    active: dict[int, Training] = {}
    start, clock = _Starter(order), Clock(order.limit_s)
    with fast_products():
        while active or waiting:
            for place in [place for place in range(order.workers) if place not in active][: len(waiting)]:
                active[place] = start(waiting.pop(0), place)
                clock.leave(place)
            place = _next_ready(active)
            clock.arrive(place)
            clock.share(list(active.values()))
            training = active[place]
            training.look()
            if training.is_done:
                rows = joined(rows, training.rows())
                write_rows(rows, order.json)
                training.checkpoint.unlink(missing_ok=True)
                del active[place]
            elif not clock.is_up:
                training.save_if_due()
                training.go_on()
                clock.leave(place)
            if clock.is_up and (active or waiting):
                _stop(active, place)
                return selected(rows), False
    return selected(rows), True


class _Starter:
    """Starts trainings, each on the stream of its place; reads images once for all that want them alike."""

    def __init__(self, order: Order) -> None:
        self.order, is_cuda = order, order.device.startswith("cuda")
        self.streams = [torch.cuda.Stream(order.device) if is_cuda else None for _ in range(order.workers)]
        self.sets: dict[tuple[str, str, bool, int], Images] = {}

    def __call__(self, job: Job, place: int) -> Training:
        assert job.recipe is not None
        order, recipe = self.order, job.recipe
        key = (job.dataset, job.network, recipe.mirror, recipe.shift)
        if key not in self.sets:
            self.sets[key] = Images(
                load_images(job.dataset, order.data),  # type: ignore[arg-type]
                order.device,
                order.limit,
                as_pictures=job.network == "cnn",
                mirror=recipe.mirror,
                shift=recipe.shift,
            )
        return Training(order, job, self.sets[key], self.streams[place])


def _next_ready(active: Mapping[int, Training]) -> int:
    """Lets all take turns until one is to be evaluated."""
    while True:
        for place, training in active.items():
            if training.is_ready:
                return place
        if not any([training.advance() for training in active.values()]):
            time.sleep(2e-4)


def _stop(active: Mapping[int, Training], looked_at: int) -> None:
    """Lets what is under way come to its next evaluation, and keeps it."""
    for place, training in active.items():
        if place != looked_at:
            _next_ready({place: training})
            training.look()
        training.save()


def finish(
    order: Order, rows: Sequence[PaperRow], done: bool, write: Callable[[Sequence[PaperRow], Path], str]
) -> None:
    """Prints and saves the table, and the picture, of what there is."""
    text = write(rows, order.json.with_suffix(".png")) if rows else "no row yet\n"
    order.json.with_suffix(".md").write_text(text) if rows else None
    print(text if done else text + "\nTime is up before the last model: call again to go on.")
