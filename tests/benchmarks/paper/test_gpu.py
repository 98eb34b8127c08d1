"""On a GPU: kernels against torch's operations, captured steps against single ones, a run of stacks side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.paper import every_layer, fused, fused_pool, recipe
from benchmarks.paper.batches import Batches, Images
from benchmarks.paper.captured import Steps
from benchmarks.paper.convolutions import ConvShape
from benchmarks.paper.convolved import convolve
from benchmarks.paper.models import Model, Shape
from benchmarks.paper.rows import read_rows
from benchmarks.paper.stack import Stack
from dnipipe.data.images import ImageData

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(240),
]


def _images(side: int = 28, count: int = 2000) -> ImageData:
    """Ten classes, each a bright row of its own."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    images = torch.randint(60, (count, 1, side, side), generator=random, dtype=torch.uint8)
    images[torch.arange(count), 0, labels] += 150
    return ImageData(images, labels, images.clone(), labels.clone(), num_classes=10)


@pytest.mark.parametrize("shape", [(3, 256, 256), (2, 10, 100), (1, 7, 16)])
def test_normalisation_is_that_of_torch(shape: tuple[int, int, int]) -> None:
    assert fused._kernels() is not None, "Triton builds the kernels here"
    x = torch.randn(shape, device="cuda", requires_grad=True)
    norm = torch.randn(shape[0], 2, shape[1], device="cuda", requires_grad=True)
    grad = torch.randn(shape, device="cuda")
    results = []
    for dtype in (torch.float32, torch.float64):  # double has no kernel
        running = torch.zeros(shape[:2], device="cuda", dtype=dtype), torch.ones(shape[:2], device="cuda", dtype=dtype)
        out = fused.norm_relu(x.to(dtype), norm.to(dtype), running)
        results.append((out, *running, *torch.autograd.grad(out, (x, norm), grad.to(dtype))))
        assert torch.equal(out, fused.norm_relu(x.to(dtype), norm.to(dtype)))
    for own, reference in zip(*results, strict=True):
        torch.testing.assert_close(own, reference.to(own.dtype), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, side, size", [("max", 28, 3), ("mean", 28, 3), ("mean", 9, 1)])
def test_normalisation_with_pooling_is_that_of_torch(kind: str, side: int, size: int) -> None:
    assert fused_pool._kernels() is not None, "Triton builds the kernels here"
    pooled = {"max": fused_pool.norm_relu_max_pool, "mean": fused_pool.norm_relu_mean_pool}[kind]
    shape, number = (64, 6 * 64, side, side), torch.arange(side, device="cuda") % 3
    place = 3 * number[:, None] + number
    x = (9 * (64 * torch.randn(shape, device="cuda")).round() + place) / 576  # no two of a cell are nearly alike
    x = x.contiguous(memory_format=torch.channels_last).unflatten(1, (6, 64)).requires_grad_()
    norm = torch.randn(6, 2, 64, device="cuda", requires_grad=True)
    grad = torch.randn(64, 6, 64, side // size, side // size, device="cuda")
    results = []
    for dtype in (torch.float32, torch.float64):  # double has no kernel
        running = [each.to(dtype) for each in (torch.zeros(6, 64, device="cuda"), torch.ones(6, 64, device="cuda"))]
        out = pooled(x.to(dtype), norm.to(dtype), running, size)
        results.append((out, *running, *torch.autograd.grad(out, (x, norm), grad.to(dtype))))
    for number, (own, reference) in enumerate(zip(*results, strict=True)):
        far = (own - reference).abs() > 1e-5 + 1e-3 * reference.abs()
        # what is nearly 0 before ReLU may come through by one and not by the other, which its channel's gradients feel
        most = 0.02 if number > 2 else 0.0
        assert far.float().mean() <= most, f"{number} of: out, running mean and variance, gradients of x and norm"


@pytest.mark.parametrize("seeds, channels", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_the_first_layer_gives_the_order_of_memory_that_the_kernels_take(seeds: int, channels: int) -> None:
    x = torch.randn(8, seeds * channels, 28, 28, device="cuda").contiguous(memory_format=torch.channels_last)
    out = convolve(torch.randn(4, 16, channels, 5, 5, device="cuda"), x.unflatten(1, (seeds, channels)))
    assert out.flatten(1, 2).is_contiguous(memory_format=torch.channels_last)


def test_adam_is_that_of_torchs_operations() -> None:
    random = torch.Generator("cuda").manual_seed(0)
    own = [torch.randn(3, 50, 33, device="cuda", generator=random), *torch.zeros(2, 3, 50, 33, device="cuda")]
    other = [each.double() for each in own]
    count, rate = torch.zeros(3, device="cuda"), torch.tensor([1e-2, 1e-3, 1e-1], device="cuda")
    decay = torch.tensor([0.0, 1.0, 3.0], device="cuda")
    fires = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]], device="cuda")
    for step in range(5):
        gradient, moves = torch.randn(3, 50, 33, device="cuda", generator=random), fires.T[:, step % 2]
        count += moves
        of_model = count, rate, moves, decay
        fused.adam(own[0], gradient, (own[1], own[2]), of_model)
        doubles = count.double(), rate.double(), moves.double(), decay.double()
        fused.adam(other[0], gradient.double(), (other[1], other[2]), doubles)
    for one, reference in zip(own, other, strict=True):
        torch.testing.assert_close(one.double(), reference, rtol=1e-3, atol=1e-4)  # its exp is a fast one


def _stack(network: str, models: list[Model], images: Images) -> Stack:
    shape = Shape(784, 10, 4, width=32, num_hidden=1, predictor_width=48)
    return Stack(
        shape if network == "fcn" else ConvShape(**vars(shape) | {"width": 8, "predictor_width": 8}), models, "cuda"
    )


@pytest.mark.parametrize("network, sparse", [("fcn", False), ("fcn", True), ("cnn", False)])
def test_captured_steps_are_those_that_are_not(network: str, sparse: bool) -> None:
    images = Images(_images(count=400), "cuda", as_pictures=network == "cnn")
    chance = 0.5 if sparse else 1.0
    models = [Model(method, seed, 1e-3, 1e-3, p_update=chance) for seed in (0, 1) for method in ("dni", "cdni")]

    def draw(step: int) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(step)
        fires, order = torch.rand(2, len(models), 4, generator=random)
        return ((fires < chance).float(), order) if sparse else ()

    states = []
    for capture in (False, True):
        with torch.cuda.stream(torch.cuda.Stream()):
            stack = _stack(network, models, images)
            batches = Batches(images, [model.seed for model in models], 64)
            steps = Steps(stack, batches, draw, 4, capture=capture)
            for step in range(0, 12, 4):  # more than an epoch
                steps(step)
                stack.scale_rates(1 - step / 12)
            torch.cuda.synchronize()
            states.append([each.detach().clone() for each in stack.state()])
    for own, other in zip(*states, strict=True):
        far = (own - other).abs() > 1e-3 + 1e-2 * other.abs()  # Adam makes a step of a weight's rounding, too
        assert far.float().mean() < 0.01


def test_stacks_side_by_side_leave_rows_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.paper.running.load_images", lambda name, folder: _images())
    tiny = replace(recipe.OURS, steps=200, evaluate_every=100, batch=64, width=32, predictor_width=32)
    monkeypatch.setitem(recipe.RECIPES, "ours", tiny)
    path = tmp_path / "rows.json"
    options = ["--device", "cuda", "--json", str(path), "--layers", "3,4", "--network", "fcn,cnn", "--steps", "200"]
    options += ["--filters", "8"]
    every_layer.main([*options, "--limit-s", "1"])
    every_layer.main(options)
    rows = read_rows(path)
    assert len(rows) == 2 * 2 * 3 * (2 + 4 + 3 * 2)
    assert all(row.test_error_percent < 30 for row in rows if row.method == "bprop" and row.model == "fcn")
    assert not list(tmp_path.glob("*.pt*"))
