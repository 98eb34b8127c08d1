"""Several steps in one call: the same as one after the other, also by a captured graph, which a pretended one shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from benchmarks.paper.batches import Batches, Images
from benchmarks.paper.captured import Steps, largest_divisor
from benchmarks.paper.models import Model, Shape
from benchmarks.paper.stack import Stack
from dnipipe.data.images import ImageData

SHAPE = Shape(16, 4, 3, width=8, num_hidden=1, predictor_width=8)
MODELS = [Model(method, seed, 1e-2, 1e-2, p_update=0.5) for seed in (0, 1) for method in ("dni", "cdni")]


def _images() -> Images:
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (120, 1, 4, 4), generator=random, dtype=torch.uint8)
    labels = torch.randint(4, (120,), generator=random)
    return Images(ImageData(pictures, labels, pictures, labels, num_classes=4))


def _draw(step: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(step)
    fires, order = torch.rand(2, len(MODELS), SHAPE.layers, generator=random)
    return (fires < 0.5).float(), order


def _trained(count: int, *, capture: bool = False) -> list[Tensor]:
    """After 12 steps, which is more than an epoch."""
    stack = Stack(SHAPE, MODELS)
    batches = Batches(_images(), [model.seed for model in MODELS], 12)
    steps = Steps(stack, batches, _draw, count, capture=capture)
    for step in range(0, 12, count):
        steps(step)
    return [each.detach().clone() for each in stack.state()]


def test_a_call_of_several_steps_is_as_many_single_ones() -> None:
    for one, several in zip(_trained(1), _trained(4), strict=True):
        assert torch.equal(one, several)


def test_a_captured_call_starts_from_the_state_as_it_was_and_sees_each_calls_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is captured is not run at once, and runs again on the memory of its inputs: so does this pretended graph."""
    made: list[Steps] = []
    run = Steps._run

    class Graph:
        def replay(self) -> None:
            run(made[0], made[0]._inputs)

    @contextmanager
    def graph(graph: Graph, stream: object) -> Iterator[None]:
        monkeypatch.setattr(Steps, "_run", lambda steps, inputs: made.append(steps))
        yield
        monkeypatch.setattr(Steps, "_run", run)

    class Stream:
        def synchronize(self) -> None: ...

    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", graph)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    for one, captured in zip(_trained(1), _trained(4, capture=True), strict=True):
        assert torch.equal(one, captured)
    assert len(made) == 1


def test_the_largest_divisor() -> None:
    assert [largest_divisor(number, 16) for number in (2000, 1000, 7, 17, 16)] == [16, 10, 7, 1, 16]
