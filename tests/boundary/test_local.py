"""The boundary between two threads: what it is told to do wrong is an error, and never a wrong value."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from dnipipe.boundary import Boundary, BoundaryError, local_pair
from tests.boundary.sides import number, on_threads


def _four(boundary: Boundary, side: int) -> list[float | str]:
    """Four exchanges; for each what arrived, or the reason why nothing did, and then the untouched buffer is -1."""
    said: list[float | str] = []
    posted = []
    for n in range(4):
        got = number(-1)
        posted.append((boundary.exchange([number(n)], [got], microbatch=n), got))
    for exchange, got in posted:
        try:
            exchange.wait()
            said.append(float(got))
        except BoundaryError as error:
            assert float(got) == -1
            said.append(str(error).split("Look at its log first. ")[1])
    return said


def test_a_dropped_message_is_an_error_and_never_a_wrong_value() -> None:
    wrong = "(message 2 arrived where message 1 was due)", "(message 3 arrived where message 2 was due)"
    assert on_threads(_four, timeout_s=0.5, drop={1}) == [[0, *wrong, "(nothing arrived)"]] * 2


def test_an_overtaken_message_is_an_error_and_never_a_wrong_value() -> None:
    wrong = "(message 2 arrived where message 1 was due)", "(message 1 arrived where message 2 was due)"
    assert on_threads(_four, timeout_s=5.0, swap={1}) == [[0, *wrong, 3]] * 2


def _time_four(boundary: Boundary, side: int) -> tuple[float, list[float]]:
    """When the first was posted and when each wait ended, by one clock for both threads."""
    start = time.perf_counter()
    exchanges = [boundary.exchange([number(n)], [number(-1)], microbatch=n) for n in range(4)]
    ends = []
    for exchange in exchanges:
        exchange.wait()
        ends.append(time.perf_counter())
    return start, ends


def test_a_delayed_message_takes_at_least_its_delay() -> None:
    (upper_start, upper_ends), (lower_start, lower_ends) = on_threads(_time_four, delay_s=lambda number: 0.2 * number)
    for sent, ends in ((lower_start, upper_ends), (upper_start, lower_ends)):
        assert all(end - sent >= 0.2 * n for n, end in enumerate(ends))


def test_a_message_delayed_beyond_the_timeout_is_an_error_within_the_timeout() -> None:
    start = time.perf_counter()
    for said in on_threads(_four, timeout_s=0.5, delay_s=lambda number: 4.0 * (number == 3)):
        assert said == [0, 1, 2, "(nothing arrived)"]
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("sent", [[torch.ones(2)], [torch.ones(1), torch.ones(1)], [torch.ones(1).double()], []])
def test_what_is_sent_must_be_what_is_received_in_number_shape_and_dtype(sent: list[Tensor]) -> None:
    first, second = local_pair(timeout_s=0.3)
    first.exchange(sent, [], microbatch=0)
    with pytest.raises(BoundaryError, match=r"the peer sent .* where .* were due"):
        second.exchange([], [torch.zeros(1)], microbatch=0).wait()


def test_the_sender_may_change_a_tensor_after_its_wait() -> None:
    first, second = local_pair()
    sent, got = number(1), number(-1)
    posted = first.exchange([sent], [], microbatch=0)
    receiving = second.exchange([], [got], microbatch=0)
    posted.wait()
    sent.fill_(2)
    receiving.wait()
    assert float(got) == 1
