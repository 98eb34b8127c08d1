"""The learning rate of a step, at the ends of its warm-up and of its cosine."""

import math
from functools import partial

import pytest

from dnipipe.optim import learning_rate_at
from tests.optim.harness import make_optimizer, make_stage


def test_the_learning_rate_is_exact_at_the_ends():
    warm = partial(learning_rate_at, peak=0.3, warmup_steps=4)
    assert [warm(step) for step in (0, 1, 3, 4, 10**9)] == [0.3 / 4, 0.3 / 2, 0.3, 0.3, 0.3]
    cosine = partial(warm, schedule="cosine", total_steps=14, final_fraction=0.2)
    assert [cosine(step) for step in range(4)] == [warm(step) for step in range(4)]
    assert (cosine(4), cosine(14), cosine(99)) == (0.3, 0.3 * 0.2, 0.3 * 0.2)
    assert cosine(9) == pytest.approx(0.3 * 0.6)
    assert cosine(6) == pytest.approx(0.3 * (0.2 + 0.8 * (1 + math.cos(math.pi / 5)) / 2))
    falling = [cosine(step) for step in range(4, 15)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate_at(0, peak=0.3) == learning_rate_at(0, peak=0.3, schedule="cosine", total_steps=5) == 0.3


def test_a_cosine_that_ends_before_it_begins_is_refused_at_once():
    rate = partial(learning_rate_at, peak=0.3, warmup_steps=4, schedule="cosine")
    for total_steps in (0, 4):
        with pytest.raises(ValueError, match=f"total_steps = {total_steps}: .*warmup_steps = 4"):
            make_optimizer(make_stage(), learning_rate=partial(rate, total_steps=total_steps))
