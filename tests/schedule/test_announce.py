"""What is announced is what comes: shapes that differ from one microbatch to the next cross a boundary."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dnipipe.boundary import local_pair
from dnipipe.schedule.announce import SIZE, Announcer, decode, encode
from dnipipe.schedule.ledger import Downward, Pending, Rules, StepEnd, Upward

CPU = torch.device("cpu")
SHAPES = [(2, 3), (5, 3), (5, 1), (1, 7), (4, 4)]


def test_what_was_encoded_is_decoded() -> None:
    tensors = [torch.zeros(3, 0, 5), torch.zeros((), dtype=torch.int64), torch.zeros(2, 1, dtype=torch.bfloat16)]
    assert decode(encode(tensors)) == tuple((each.shape, each.dtype) for each in tensors)
    assert decode(encode([])) == ()


def test_what_cannot_be_announced_is_told() -> None:
    with pytest.raises(ValueError, match="20 tensors of changing shape, and their dtypes and sizes are 101 numbers"):
        encode([torch.zeros(1, 2, 3)] * 20)
    with pytest.raises(ValueError, match="torch.complex64, which cannot cross"):
        encode([torch.zeros(1, dtype=torch.complex64)])
    assert encode([torch.zeros(2)]).shape == (SIZE,)


def test_a_message_can_be_full_to_the_last_number() -> None:
    fitting = [torch.zeros(2)] * ((SIZE - 1) // 3)
    assert 1 + 3 * len(fitting) == SIZE and decode(encode(fitting)) == ((torch.Size([2]), torch.float32),) * 21
    with pytest.raises(ValueError, match="22 tensors of changing shape, and their dtypes and sizes are 67 numbers"):
        encode([*fitting, torch.zeros(2)])


def _sides(lag: int) -> tuple[Downward, Upward]:
    carrying, telling = local_pair(timeout_s=0.5), local_pair(timeout_s=0.5)
    down = Downward(carrying[0], CPU, Announcer(telling[0]))
    up = Upward(carrying[1], CPU, Announcer(telling[1]))
    for side in (down, up):
        side.restart(0, Rules(lag, lag, StepEnd.HOLD))
    return down, up


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_each_activation_and_its_gradient_cross_in_the_shape_that_was_told(lag: int) -> None:
    down, up = _sides(lag)
    up.open(len(SHAPES))
    assert up.under_way == [], "nothing is posted whose shape is not known"
    for n, shape in enumerate(SHAPES):
        h = torch.full(shape, float(n))
        down.send([h], Pending(n, (h,), None))
        (received,) = up.receive(n)
        assert torch.equal(received, h) and up.metas == ((h.shape, h.dtype),)
        up.after_forward(n)
        up.give([-received], torch.tensor([n, 0, 0, 1], dtype=torch.float64))
        assert up.under_way == [], "nothing is posted whose shape is not known"
        if n >= lag:
            entry = down.arrive()
            assert entry.microbatch == n - lag and torch.equal(entry.true_grads[0], -entry.activations[0])
    with ThreadPoolExecutor(1) as pool:  # each side's drain waits for the other's
        drained = pool.submit(up.drain, len(SHAPES))
        down.drain()
        drained.result()
    assert [entry.microbatch for entry in down.pending] == list(range(len(SHAPES) - lag, len(SHAPES)))
    assert all(torch.equal(entry.true_grads[0], -entry.activations[0]) for entry in down.pending)


def test_the_upper_stage_waits_for_no_announcement_to_be_heard() -> None:
    down, _ = _sides(lag=3)
    for n, shape in enumerate(SHAPES[:3]):
        h = torch.full(shape, float(n))
        down.send([h], Pending(n, (h,), None))
    assert down.under_way == [0, 1, 2], "each once, though a message and an activation are under way"
