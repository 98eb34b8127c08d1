"""Settings of the pipeline: what the engine takes is taken, and what it refuses is refused by its full name."""

from typing import get_args, get_type_hints

import pytest
import torch

from dnipipe.config import ForwardUnlockedConfig, PipelineConfig
from dnipipe.interface.choose import build_interface
from dnipipe.schedule.policy import Policy
from tests.config_file import load


def test_a_policy_may_be_phases_and_is_refused_as_the_engine_refuses_it(tmp_path):
    text = "wait:200,synthetic:800,stale"
    assert load(tmp_path, f"pipeline: {{policy: '{text}'}}").pipeline.policy == text
    assert load(tmp_path, "", f"pipeline.policy={text}").pipeline.policy == text
    for wrong in ("x", "wait:0,stale", "wait,stale", "stale:5", "auto,wait"):
        with pytest.raises(ValueError) as refusal:
            load(tmp_path, "", f"pipeline.policy={wrong}")
        with pytest.raises(ValueError) as of_engine:
            Policy(wrong)
        assert str(refusal.value) == f"pipeline.policy = {wrong!r}: {of_engine.value}"
    with pytest.raises(ValueError, match="pipeline.unlock_after_steps = 5: it must be null beside several phases"):
        load(tmp_path, "", "pipeline.unlock_after_steps=5", f"pipeline.policy={text}")


def test_late_weights_may_be_foretold_further_and_are_refused_as_the_engine_refuses_them(tmp_path):
    assert load(tmp_path, "pipeline: {late_weights: predicted*2}").pipeline.late_weights == "predicted*2"
    assert load(tmp_path, "", "pipeline.late_weights=predicted@3").pipeline.late_weights == "predicted@3"
    assert load(tmp_path, "", "pipeline.late_weights=auto").pipeline.late_weights == "auto"
    for wrong in ("x", "old*2", "predicted*0"):
        with pytest.raises(ValueError) as refusal:
            load(tmp_path, "", f"pipeline.late_weights={wrong}")
        with pytest.raises(ValueError) as of_engine:
            Policy(late_weights=wrong)
        assert str(refusal.value) == f"pipeline.late_weights = {wrong!r}: {of_engine.value}"


@pytest.mark.parametrize("in_flight, kept", [("auto", "auto"), ("5", 5), ("[5, 3]", [5, 3]), ("null", None)])
def test_in_flight_is_a_number_several_auto_or_null(tmp_path, in_flight, kept):
    config = load(tmp_path, "", "pipeline.policy=stale", f"pipeline.in_flight={in_flight}")
    assert config.pipeline.in_flight == kept
    assert load(tmp_path, config.to_yaml()) == config


@pytest.mark.parametrize("in_flight", ["many", "1.5", "[5, x]", "true", "{a: 1}"])
def test_another_in_flight_is_refused(tmp_path, in_flight):
    with pytest.raises(ValueError, match="pipeline.in_flight = .*: it must be int, list of int, auto or null"):
        load(tmp_path, "", f"pipeline.in_flight={in_flight}")


UNLOCKED = "pipeline.forward_unlocked"


def test_a_section_within_a_section_is_read_set_entry_by_entry_and_written(tmp_path):
    assert load(tmp_path, "").pipeline.forward_unlocked is None
    assert load(tmp_path, "pipeline: {forward_unlocked: {}}").pipeline.forward_unlocked == ForwardUnlockedConfig()
    text = "pipeline: {forward_unlocked: {window: 45, late: [[1, 0, 2]]}}"
    entries = [f"{UNLOCKED}.patience_s=1e-1", f"{UNLOCKED}.model=a:b", f"{UNLOCKED}.options.width=3"]
    config = load(tmp_path, text, *entries)
    expected = ForwardUnlockedConfig(
        window=45, patience_s=0.1, late=[[1, 0, 2]], num_tokens=None, model="a:b", options={"width": 3}
    )
    assert config.pipeline.forward_unlocked == expected
    assert load(tmp_path, config.to_yaml()) == config
    assert load(tmp_path, text, f"{UNLOCKED}=null").pipeline.forward_unlocked is None


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ("=3", " = 3: it must hold `name: value` lines"),
        (".windw=3", "no setting pipeline.forward_unlocked.windw; did you mean pipeline.forward_unlocked.window?"),
        (".window=0", ".window = 0: it must be at least 1"),
        (".window=1.5", ".window = 1.5: it must be a int"),
        (".patience_s=-1", ".patience_s = -1.0: it must be at least 0"),
        (".patience_s=.inf", ".patience_s = inf: it must be a finite number"),
        (".late=[[1, 2]]", ".late = [[1, 2]]: it must be null, or lists of three numbers from 0"),
        (".late=[[1, -2, 0]]", ".late = [[1, -2, 0]]: it must be null, or lists of three"),
        (".late=[1]", ".late[0] = 1: it must be a list"),
        (".num_tokens=0", ".num_tokens = 0: it must be at least 1, or null"),
        (".options.width=3", ".options = {'width': 3}: it must be empty where there is no model"),
        (".learning_rate=0", ".learning_rate = 0.0: it must be above 0"),
    ],
)  # fmt: skip
def test_within_it_too_a_bad_value_is_refused_by_its_full_name(tmp_path, given, refusal):
    with pytest.raises(ValueError) as refused:
        load(tmp_path, "", f"{UNLOCKED}{given}")
    assert refusal in str(refused.value) and UNLOCKED in str(refused.value)


def test_the_interfaces_that_may_be_set_are_those_that_can_be_built():
    interfaces = set(get_args(get_type_hints(PipelineConfig)["interface"])) - {"auto"}
    shapes = {"conv": (2, 3, 4, 4), "transformer": (2, 3, 8)}
    for name in interfaces:
        build_interface(name, torch.zeros(shapes.get(name, (2, 8))), num_classes=4)
    with pytest.raises(ValueError) as refusal:
        build_interface("no such interface", torch.zeros(2, 8))
    assert all(name in str(refusal.value) for name in interfaces)
