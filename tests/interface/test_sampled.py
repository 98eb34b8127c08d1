"""The sampled cross-entropy against the full one, and against the estimate written out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from dnipipe.interface import LocalHead
from dnipipe.interface.sampled import SampledCrossEntropy

C, E, N = 11, 4, 6


def made(num_samples: int) -> tuple[SampledCrossEntropy, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return SampledCrossEntropy(C, num_samples), nn.Linear(E, C), torch.randn(N, E)


def by_hand(classify: nn.Linear, x: Tensor, label: list[int], drawn: list[int]) -> Tensor:
    """The sum over rows of log(sum over the set of labels + others / drawn others * sum over these) - own logit."""
    logits, own = classify(x).double(), {c for c in label if c != -100}
    others = [c for c in drawn if c not in own]
    total = torch.zeros((), dtype=torch.float64)
    for row, c in enumerate(label):
        if c != -100:
            sums = logits[row, sorted(own)].exp().sum()
            if others:
                sums = sums + (C - len(own)) / len(others) * logits[row, others].exp().sum()
            total = total + sums.log() - logits[row, c]
    return total


@pytest.mark.parametrize("label", [[3, 1, 3, 7, 10, 3], [-100, 0, 5, -100, 0, 2], [4] * N], ids=str)
def test_with_all_classes_drawn_it_is_the_cross_entropy(label: list[int]) -> None:
    sampled, classify, x = made(C)
    full = nn.functional.cross_entropy(classify(x), torch.tensor(label), reduction="sum")
    expected = torch.autograd.grad(full, [*classify.parameters()])
    got = sampled(x, torch.tensor(label), classify, -100)
    torch.testing.assert_close(got, full)
    for mine, other in zip(torch.autograd.grad(got, [*classify.parameters()]), expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_with_some_drawn_it_is_the_estimate_written_out(num_samples: int) -> None:
    sampled, classify, x = made(num_samples)
    label = [3, 1, -100, 7, 3, 0]
    for step in range(5):
        drawn = [(num_samples * step + k) % C * sampled.stride % C for k in range(num_samples)]
        got = sampled(x, torch.tensor(label), classify, -100)
        torch.testing.assert_close(got.double(), by_hand(classify, x, label, drawn), rtol=1e-5, atol=1e-5)
        sampled.end_step()


@pytest.mark.parametrize("num_classes, num_samples", [(1, 1), (2, 1), (10, 3), (11, 3), (12, 5), (50_000, 1000)])
def test_all_classes_are_drawn_equally_often(num_classes: int, num_samples: int) -> None:
    sampled = SampledCrossEntropy(num_classes, num_samples)
    steps = num_classes // math.gcd(num_classes, num_samples)
    order = torch.arange(steps * num_samples) * sampled.stride % num_classes
    assert torch.equal(order.bincount(minlength=num_classes), torch.full((num_classes,), len(order) // num_classes))
    for _ in range(steps):
        sampled.end_step()
    assert sampled.first.item() == 0


def test_no_random_number_of_the_models_is_drawn() -> None:
    head, h = LocalHead(8, C, samples=3), torch.randn(5, 8)
    before = torch.get_rng_state()
    head.learn(h, torch.randint(C, (5,), generator=torch.Generator()), h)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_samples", [0, C + 1])
def test_a_number_of_samples_out_of_range_is_refused(num_samples: int) -> None:
    with pytest.raises(ValueError) as refused:
        LocalHead(8, C, samples=num_samples)
    assert str(refused.value) == (
        f"samples = {num_samples} must be from 1 to num_classes = 11: give fewer, or None for all"
    )


def test_it_learns_what_the_full_head_learns() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(16, 200)
    heads = [LocalHead(16, 200), LocalHead(16, 200, samples=40)]
    optimizers = [torch.optim.Adam(head.parameters(), lr=1e-2) for head in heads]
    h = torch.randn(8000, 16)
    label = (h @ teacher).argmax(-1)
    for some, labels in zip(h.split(32), label.split(32), strict=True):
        for head, optimizer in zip(heads, optimizers, strict=True):
            head.learn(some, labels, some)
            head.end_step(1)
            optimizer.step()
            optimizer.zero_grad()
    full, sampled = (head.synthetic_grad(h, label) for head in heads)
    assert torch.cosine_similarity(full.flatten(), sampled.flatten(), dim=0) > 0.95
