"""Every line is whole JSON, whatever was written and however the run ended."""

import json

import pytest
import torch

from dnipipe.observe.metrics import MetricsFile


def _lines(path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_can_be_read_before_the_file_is_closed(tmp_path):
    metrics = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    metrics.write({"step": 1, "loss": 2.5})
    assert _lines(metrics.path) == [{"step": 1, "loss": 2.5}]
    metrics.close()


def test_nan_and_infinity_become_null_at_any_depth(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write({"loss": float("nan"), "norms": [1.0, float("inf")], "stage": {"0": -float("inf")}})
    assert _lines(metrics.path) == [{"loss": None, "norms": [1.0, None], "stage": {"0": None}}]


def test_a_run_that_starts_again_goes_on_in_the_same_file(tmp_path):
    for step in range(2):
        with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
            metrics.write({"step": step})
    assert _lines(metrics.path) == [{"step": 0}, {"step": 1}]


def test_a_line_cut_short_by_a_crash_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"st')
    with MetricsFile(path) as metrics:
        metrics.write({"step": 1})
    assert path.read_text().splitlines() == ['{"step": 0}', '{"st', '{"step": 1}']


def test_a_tensor_is_refused_before_anything_is_written(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        with pytest.raises(TypeError, match="item"):
            metrics.write({"step": 1, "loss": torch.zeros(())})
    assert metrics.path.read_text() == ""
