"""The paper's experiments at the size of a test."""

from __future__ import annotations

import pytest

from tests.benchmarks.paper.made_up import TINY, made_up_images


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up images for every dataset, and --quick is a few steps of small networks."""
    monkeypatch.setattr("benchmarks.paper.running.load_images", lambda name, folder: made_up_images())
    monkeypatch.setattr("benchmarks.paper.order.QUICK", TINY)
    monkeypatch.setattr("benchmarks.paper.convolutional_recipe.QUICK_FILTERS", 4)
    monkeypatch.setattr("benchmarks.paper.sparse_updates.QUICK_RUNS", 3)
    monkeypatch.setattr("benchmarks.paper.complete_unlock.QUICK_RUNS", 3)
    monkeypatch.setattr("benchmarks.paper.deep.LEARNING_RATE", 1e-2)
