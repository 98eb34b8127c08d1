"""What every boundary promises, whatever carries it: each test runs the same body on the two sides of each kind."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dnipipe.boundary import Boundary, BoundaryError, local_pair
from tests.boundary.sides import FIRST_STAGE, KINDS, Run, number, unconnected


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(kind: str) -> Run:
    return KINDS[kind]


def _many(boundary: Boundary, side: int) -> list[list[float]]:
    """Down every time, up at every second; all posted before the first wait. Returns what each exchange received."""
    exchanges = []
    for n in range(6):
        sends, receives = side == 0 or n % 2 == 1, side == 1 or n % 2 == 1
        got = [number(-1)] if receives else []
        sent = [number(10 * n + side)] if sends else []
        exchanges.append((boundary.exchange(sent, got, microbatch=n), got))
    for exchange, _ in exchanges:
        exchange.wait()
    return [[float(tensor) for tensor in got] for _, got in exchanges]


def test_the_nth_exchange_meets_the_nth_in_both_directions(run: Run) -> None:
    upper, lower = run(_many)
    assert upper == [[], [11], [], [31], [], [51]]
    assert lower == [[0], [10], [20], [30], [40], [50]]


def _parcel(side: int) -> list[Tensor]:
    """What `side` sends: side 1 other numbers, in the opposite order."""
    generator = torch.Generator().manual_seed(side)
    shapes: list[tuple[int, ...]] = [(2, 3), (), (0,), (4, 1, 2), (3, 0, 2), (1000,)]
    dtypes = [torch.float32, torch.bfloat16, torch.int64]
    parcel = [(1000 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes for dtype in dtypes]
    return parcel[::-1] if side else parcel


def _swap_parcels(boundary: Boundary, side: int) -> list[bool]:
    due, sent = _parcel(1 - side), _parcel(side)
    got = [torch.full_like(tensor, 77) for tensor in due]
    boundary.exchange(sent, got, microbatch=0).wait()
    return [torch.equal(a, b) for a, b in zip(got + sent, due + _parcel(side), strict=True)]


def test_tensors_of_any_dtype_and_shape_arrive_as_they_were_sent(run: Run) -> None:
    assert run(_swap_parcels) == [[True] * 36] * 2


AHEAD, ROWS = 8, 50_000


def _post_ahead(boundary: Boundary, side: int) -> tuple[float, float, list[float]]:
    """Side 1 posts late. Returns when the first and the last exchange were posted, and what was received."""
    if side == 1:
        time.sleep(0.5)
    first, exchanges = time.perf_counter(), []
    for n in range(AHEAD):
        got = torch.empty(ROWS)
        exchanges.append((boundary.exchange([torch.full((ROWS,), n + 0.5)], [got], microbatch=n), got))
    last = time.perf_counter()
    for exchange, _ in exchanges:
        exchange.wait()
    return first, last, [float(got.unique()) for _, got in exchanges]


def test_posting_does_not_wait_for_the_peer(run: Run) -> None:
    (_, last_of_upper, got), (first_of_lower, _, other) = run(_post_ahead)
    assert last_of_upper < first_of_lower
    assert got == other == [n + 0.5 for n in range(AHEAD)]


def _dawdle(boundary: Boundary, side: int) -> list[float]:
    """Sixty exchanges, up to three under way, with a pause now and then before a post or a wait."""
    draw, got, under_way = random.Random(side), [], []
    for n in range(60):
        time.sleep(draw.random() * 0.01 * draw.randint(0, 1))
        buffer = torch.empty(3)
        under_way.append((boundary.exchange([torch.full((3,), n + side / 2)], [buffer], microbatch=n), buffer))
        if len(under_way) == 3 or n == 59:
            time.sleep(draw.random() * 0.01 * draw.randint(0, 1))
            for exchange, buffer in under_way[: 1 if n < 59 else 3]:
                exchange.wait()
                got.append(float(buffer.unique()))
            del under_way[0]
    return got


def test_pauses_on_both_sides_change_no_value(run: Run) -> None:
    assert run(_dawdle) == [[n + 0.5 for n in range(60)], [float(n) for n in range(60)]]


def _wait_twice(boundary: Boundary, side: int) -> tuple[float, float, float, float]:
    """Side 1 is late. Returns the buffer after the second wait, seconds of both waits, and `wait_s` after both."""
    if side == 1:
        time.sleep(0.4)
    got = number(-1)
    exchange = boundary.exchange([number(side)], [got], microbatch=0)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        exchange.wait()
        seconds.append(time.perf_counter() - start)
        got += 100
    second = boundary.exchange([number(7 + side)], [got], microbatch=1)
    second.wait()
    return float(got), *seconds, boundary.wait_s


def test_waiting_twice_waits_once_and_wait_s_counts_the_seconds(run: Run) -> None:
    upper, lower = run(_wait_twice)
    assert (upper[0], lower[0]) == (8, 7)
    for _, first, again, wait_s in (upper, lower):
        assert again < 0.2
        assert first - 0.05 < wait_s < first + again + 0.2
    assert upper[1] > 0.3 > lower[1]


def _keep_what_was_written(boundary: Boundary, side: int) -> float:
    got = number(-1)
    exchange = boundary.exchange([number(side)], [got], microbatch=0)
    exchange.wait()
    got.fill_(100)
    exchange.wait()
    return float(got)


def test_a_second_wait_does_not_touch_the_received_tensors(run: Run) -> None:
    assert run(_keep_what_was_written) == [100, 100]


def _say_nothing(boundary: Boundary, side: int) -> list[tuple[str, float]]:
    """Side 1 never answers microbatch 7. Returns what two waits of side 0 said, each with `wait_s` afterwards."""
    if side == 1:
        time.sleep(3 * boundary.timeout_s)
        return []
    exchange = boundary.exchange([], [number(0)], microbatch=7)
    said = []
    for _ in range(2):
        with pytest.raises(BoundaryError) as caught:
            exchange.wait()
        said.append((str(caught.value), boundary.wait_s))
    return said


def test_silence_is_an_error_within_the_timeout_that_names_who_waited_for_whom_and_how_long(
    run: Run, kind: str
) -> None:
    stage = FIRST_STAGE[kind]
    said, _ = run(_say_nothing, timeout_s=0.5)
    pattern = (
        rf"rank 0 \(stage {stage}\) waited 0\.[5-9] s, at most 0\.5 s, for rank 1 \(stage {stage + 1}\) at microbatch 7"
        r": that rank is stopped, dead or far behind\. Look at its log first\. \(\S.*\)"
    )
    for message, wait_s in said:
        assert re.fullmatch(pattern, message), message
        assert 0.45 < wait_s < 0.95, "a failed wait counts, and is not waited for again"


@pytest.mark.parametrize("timeout_s", [0, -1.5])
def test_a_timeout_of_no_seconds_is_refused(timeout_s: float) -> None:
    message = re.escape(f"timeout_s must be more than 0 seconds, got {timeout_s}")
    with pytest.raises(ValueError, match=message):
        local_pair(timeout_s=timeout_s)
    with pytest.raises(ValueError, match=message):
        unconnected(timeout_s)


def _look(boundary: Boundary, side: int) -> tuple[list[bool], float, list[float]]:
    """Side 1 posts late. What side 0 sees of three exchanges before, soon and after that, and the seconds it looked."""
    boundary.watch()
    if side == 1:
        time.sleep(0.6)
    got = [number(-1) for _ in range(3)]
    exchanges = [boundary.exchange([number(10 * n + side)], [got[n]], microbatch=n) for n in range(3)]
    seen = [exchanges[0].arrived(), exchanges[2].arrived(within_s=0.2)]
    looked_s = boundary.wait_s
    seen += [exchanges[2].arrived(within_s=5.0), exchanges[0].arrived()]
    for exchange in exchanges:
        exchange.wait()
    seen += [exchange.arrived() for exchange in exchanges]
    return seen, looked_s, [float(tensor) for tensor in got]


def test_an_exchange_can_be_asked_whether_it_has_arrived(run: Run) -> None:
    (seen, looked_s, got), (_, _, other) = run(_look)
    assert seen == [False, False, True, True, True, True, True]
    assert 0.15 < looked_s < 0.5, "the seconds of looking count as waited"
    assert got == [1, 11, 21] and other == [0, 10, 20], "looking takes nothing away"


def _look_for_nothing(boundary: Boundary, side: int) -> list[Any]:
    """Side 1 never answers. Whether it was seen, and what the wait said after looking."""
    boundary.watch()
    if side == 1:
        time.sleep(3 * boundary.timeout_s)
        return []
    exchange = boundary.exchange([], [number(0)], microbatch=7)
    seen = exchange.arrived(within_s=0.1)
    with pytest.raises(BoundaryError, match="waited 0.[5-9] s, at most 0.5 s, .* at microbatch 7"):
        exchange.wait()
    return [seen, exchange.arrived()]


def test_silence_is_an_error_within_the_timeout_where_it_was_looked_for_too(run: Run) -> None:
    assert run(_look_for_nothing, timeout_s=0.5)[0] == [False, True]
