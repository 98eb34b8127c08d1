"""A span says when its work was done, on the clock that all ranks of a host share."""

import dataclasses
import json
import math
import time

import pytest
import torch

from dnipipe.observe.trace import Span, Trace, idle_share


def test_a_span_lies_where_the_wall_clock_saw_it():
    trace = Trace(3, 1, "cpu")
    before_s = time.time()
    with trace.span("forward", microbatch=7):
        time.sleep(0.02)
    after_s = time.time()
    (span,) = trace.export()
    assert (span.name, span.rank, span.stage, span.microbatch) == ("forward", 3, 1, 7)
    assert before_s - 1e-3 <= span.start_s and span.end_s <= after_s + 1e-3
    assert span.end_s - span.start_s >= 0.02


def test_two_traces_of_one_host_share_a_clock():
    first = Trace(0, 0, "cpu")
    time.sleep(0.05)
    second = Trace(1, 1, "cpu")
    with first.span("forward"), second.span("forward"):
        pass
    (a,), (b,) = first.export(), second.export()
    assert abs(a.start_s - b.start_s) < 5e-3


def test_spans_come_in_order_of_their_start_even_when_nested():
    trace = Trace(0, 0, "cpu")
    with trace.span("backward"):
        with trace.span("learn"):
            pass
    assert [span.name for span in trace.export()] == ["backward", "learn"]


def test_a_span_that_ends_by_an_exception_is_recorded_and_the_exception_goes_on():
    trace = Trace(0, 0, "cpu")
    with pytest.raises(RuntimeError, match="boom"):
        with trace.span("forward"):
            raise RuntimeError("boom")
    assert len(trace.export()) == 1


def test_only_the_spans_opened_while_enabled_are_recorded():
    trace = Trace(0, 0, "cpu", enabled=False)
    for step in range(5):
        trace.enabled = step in range(2, 4)
        with trace.span("forward", microbatch=step):
            pass
    assert [span.microbatch for span in trace.export()] == [2, 3]


def test_a_disabled_trace_makes_no_object():
    trace = Trace(0, 0, "cpu", enabled=False)
    assert trace.span("forward", microbatch=1) is trace.span("backward")


def test_export_forgets_what_it_returned():
    trace = Trace(0, 0, "cpu")
    with trace.span("forward"):
        pass
    assert len(trace.export()) == 1
    assert trace.export() == []


def test_a_span_survives_json():
    trace = Trace(0, 2, "cpu")
    with trace.span("eval"):
        pass
    (span,) = trace.export()
    assert type(span)(**json.loads(json.dumps(dataclasses.asdict(span)))) == span


def test_events_become_host_times_with_one_synchronize(monkeypatch):
    """Stands in for a device whose clock reads 500 s less than the host's."""
    device_clock, synchronizes = iter([10.0, 12.0, 13.5, 14.0, 103.0]), []

    class FakeEvent:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at_s = next(device_clock)

        def elapsed_time(self, later):
            return (later.at_s - self.at_s) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronizes.append)
    trace = Trace(0, 0, "cuda:1")
    with trace.span("forward"):
        pass
    with trace.span("backward"):
        pass
    assert synchronizes == []
    monkeypatch.setattr(trace, "_now_s", lambda: 603.0)
    forward, backward = trace.export()
    assert synchronizes == [torch.device("cuda:1")]
    assert (forward.start_s, forward.end_s, backward.start_s, backward.end_s) == (510.0, 512.0, 513.5, 514.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_span_measures_the_stream_and_not_the_host():
    trace = Trace(0, 0, "cuda")
    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    before_s = time.time()
    with trace.span("forward"):
        for _ in range(20):
            matrix @ matrix
    launched_s = time.time()
    torch.cuda.synchronize()
    after_s = time.time()
    with trace.span("backward"):
        matrix @ matrix
    forward, backward = trace.export()
    assert before_s - 2e-3 <= forward.start_s and forward.end_s <= after_s + 2e-3
    assert forward.end_s - forward.start_s > 0.5 * (after_s - before_s) > launched_s - before_s
    assert forward.end_s <= backward.start_s


def test_what_is_neither_work_nor_within_work_is_idle():
    spans = [
        Span("forward", 0, 0, 0, 1.0, 2.0),
        Span("wait", 0, 0, 0, 2.0, 3.5),
        Span("backward", 0, 0, 0, 3.0, 4.0),
        Span("learn", 0, 0, 0, 3.5, 3.8),  # within the backward
        Span("optimizer", 0, 0, None, 4.5, 5.0),
    ]
    assert idle_share(spans) == pytest.approx((5 - 1 - 1 - 1 - 0.5) / 4)
    assert idle_share(spans[:1]) == 0 and idle_share(spans[1:2]) == 1 and math.isnan(idle_share([]))
