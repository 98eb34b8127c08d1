"""What is known of a run as a whole is written whole, and read whatever is there."""

import json
import math

import pytest
import torch

from dnipipe.report import FACTS, read_facts, write_facts


def test_facts_come_back_as_they_were_written_in_their_order(tmp_path):
    facts = {"command": "torchrun «x»", "startup_s": {"imports": 2.0, "data": 1.0}, "devices": ["cpu", "cpu"]}
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == facts
    assert list(read_facts(tmp_path)["startup_s"]) == ["imports", "data"]
    assert [path.name for path in tmp_path.iterdir()] == [FACTS]


def test_nan_and_infinity_become_null_at_any_depth(tmp_path):
    write_facts(tmp_path, {"peak_flops": math.inf, "results": [{"mfu": math.nan, "bubble": [-math.inf, 0.5]}]})
    assert read_facts(tmp_path) == {"peak_flops": None, "results": [{"mfu": None, "bubble": [None, 0.5]}]}


def test_a_run_without_facts_has_none(tmp_path):
    assert read_facts(tmp_path) == {}


def test_a_tensor_is_refused_and_what_was_there_stays(tmp_path):
    write_facts(tmp_path, {"parameters": 3})
    with pytest.raises(TypeError):
        write_facts(tmp_path, {"parameters": torch.zeros(())})
    assert read_facts(tmp_path) == {"parameters": 3}


@pytest.mark.parametrize("text", ["{", json.dumps([1])])
def test_what_is_no_object_is_refused_by_its_path(tmp_path, text):
    (tmp_path / FACTS).write_text(text)
    with pytest.raises(ValueError, match=FACTS):
        read_facts(tmp_path)
