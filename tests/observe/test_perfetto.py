"""What the viewer is told, read back from the file."""

import json

import pytest

from dnipipe.observe.perfetto import write_perfetto
from dnipipe.observe.trace import Span

SPANS = [
    Span("backward", 1, 1, 0, 1000.003, 1000.0055),
    Span("forward", 0, 0, 0, 1000.001, 1000.003),
    Span("optimizer", 0, 0, None, 1000.004, 1000.005),
]


def _events(tmp_path, spans):
    path = tmp_path / "new" / "trace.json"
    write_perfetto(spans, path)
    return json.loads(path.read_text())["traceEvents"]


def test_every_span_becomes_one_complete_slice_in_microseconds(tmp_path):
    slices = [event for event in _events(tmp_path, SPANS) if event["ph"] == "X"]
    assert [(s["name"], s["pid"]) for s in slices] == [("forward", 0), ("backward", 1), ("optimizer", 0)]
    assert [s["ts"] for s in slices] == pytest.approx([0, 2000, 3000], abs=1)
    assert [s["dur"] for s in slices] == pytest.approx([2000, 2500, 1000], abs=1)
    assert [s["args"] for s in slices] == [{"microbatch": 0}, {"microbatch": 0}, {}]


def test_every_rank_is_a_process_with_a_readable_name(tmp_path):
    names = {e["pid"]: e["args"]["name"] for e in _events(tmp_path, SPANS) if e["name"] == "process_name"}
    assert names == {0: "rank 0 (stage 0)", 1: "rank 1 (stage 1)"}


def test_no_spans_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enabled"):
        write_perfetto([], tmp_path / "trace.json")
