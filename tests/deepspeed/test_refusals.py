"""What is said to a block or a job that cannot be: which key, which value, what to do."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from torch import nn

import dnipipe.deepspeed as ours
from dnipipe.deepspeed import norms, refuse, start, ties
from dnipipe.deepspeed.block import Block, read_block


@pytest.mark.parametrize(
    "values, said",
    [
        ({"polcy": "wait"}, '"dnipipe.polcy" is not known: did you mean "policy"?'),
        ({"max_lag": 2}, '"dnipipe.max_lag" is not known: did you mean "lag"?'),
        ({"xyzzy": 1}, '"dnipipe.xyzzy" is not known: remove it'),
        ({"policy": "eager"}, "\"dnipipe.policy\" is 'eager': it must be one of wait, synthetic, auto"),
        ({"policy": "stale"}, "would silently mix old activations with new weights. Choose one of wait, synthetic"),
        ({"lag": 0}, '"dnipipe.lag" is 0: it must be a whole number of microbatches, at least 1'),
        ({"lag": True}, '"dnipipe.lag" is True'),
        ({"lag": 2.0}, '"dnipipe.lag" is 2.0'),
        ({"unlock_after_steps": -1}, '"dnipipe.unlock_after_steps" is -1: it must be a whole number of batches'),
        ({"policy": "wait", "unlock_after_steps": 3}, 'policy "wait" never unlocks'),
        ({"interface": 3}, '"dnipipe.interface" is 3'),
        ({"interface": []}, '"dnipipe.interface" is ()'),
        (
            {"interface_learning_rate": 0},
            '"dnipipe.interface_learning_rate" is 0: it must be a number above 0, or null',
        ),
        ({"transport": "rdma"}, "one of auto, group, direct"),
        ({"clip": "local"}, "one of stage, travelling, global; leave it out for 'stage'"),
        ({"loss": "async"}, "one of newest, sync"),
        ({"labels": "ship"}, "one of auto, relay, none"),
        ({"num_classes": 0}, "a whole number of classes, at least 1, or null; leave it out for null"),
        ({"tied": "none"}, "one of async, sync"),
        ({"check_every_steps": -1}, "a whole number of batches, at least 0"),
        ({"fall_back": 1}, '"dnipipe.fall_back" is 1: it must be true or false; leave it out for true'),
        ({"enabled": "yes"}, "\"dnipipe.enabled\" is 'yes'"),
        ({"timeout_s": 0}, '"dnipipe.timeout_s" is 0: it must be a number of seconds above 0'),
        (True, 'must be an object, as "dnipipe": {"policy": "auto"}'),
    ],
)
def test_a_bad_block_is_refused_with_key_value_and_cure(values: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        read_block(values)
    assert said in str(error.value)


def test_every_key_is_documented_and_checked() -> None:
    source = Path(str(ours.__path__[0]), "block.py").read_text()
    for field in fields(Block):
        line = source.index(f"    {field.name}: ")
        assert source[line:].split("\n", 2)[1].startswith('    """'), f"{field.name} has no docstring"
        with pytest.raises(ValueError, match=f"dnipipe.{field.name}"):
            read_block({field.name: {}})


def _args(path: Path) -> argparse.Namespace:
    return argparse.Namespace(deepspeed_config=str(path))


def test_the_block_is_taken_out_wherever_the_config_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed never sees it, and neither the caller's dict nor the caller's arguments are changed."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(start, "_plain_initialize", lambda **given: seen.append(given))
    config = {"train_batch_size": 8, "dnipipe": {"enabled": False}}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    args = _args(path)
    ours.initialize(model="m", config=config)
    ours.initialize(model="m", config=str(path))
    ours.initialize(None, "m", config_params=config)
    ours.initialize(args, "m")
    assert [given["config"] for given in seen] == [{"train_batch_size": 8}] * 4
    assert all(given["model"] == "m" for given in seen) and seen[3]["args"].deepspeed_config is None
    assert config["dnipipe"] == {"enabled": False} and args.deepspeed_config == str(path)


def test_without_a_block_the_call_goes_to_deepspeed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(start, "_plain_initialize", lambda *args, **kwargs: seen.append((args, kwargs)))
    config = {"train_batch_size": 8}
    ours.initialize(None, "m", config=config)
    assert seen == [((None, "m"), {"config": config})] and seen[0][1]["config"] is config


def test_everything_else_is_deepspeeds() -> None:
    assert ours.zero is deepspeed.zero and ours.add_config_arguments is deepspeed.add_config_arguments
    assert ours.__version__ == deepspeed.__version__
    with pytest.raises(AttributeError):
        _ = ours.no_such_name


class _Grid:
    slices = 1

    def get_slice_parallel_world_size(self) -> int:
        return self.slices


def _model(
    num_stages: int = 2, slices: int = 1, kind: type = refuse.PipelineModule, dynamic_shape: bool = False
) -> Any:
    """A PipelineModule without the process group that a real one asks for."""
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    grid = _Grid()
    grid.slices = slices
    model._grid, model.num_stages, model.dynamic_shape = grid, num_stages, dynamic_shape
    return model


@pytest.mark.parametrize(
    "config, model, said",
    [
        ({"zero_optimization": {"stage": 2}}, _model(), '"zero_optimization.stage" is 2'),
        ({"zero_optimization": {"stage": 3}}, _model(), "set it to 1, or remove"),
        ({"tensor_parallel": {"autotp_size": 2}}, _model(), "tensor parallelism, which is 2 here"),
        ({}, _model(slices=4), "tensor parallelism, which is 4 here"),
        ({}, nn.Linear(2, 2), "the model is a Linear: wrap its layers in deepspeed.pipe.PipelineModule"),
        ({}, _model(kind=refuse.DualPipeVModule), "a DualPipeVModule holds two"),
        ({"dnipipe": {"transport": "direct"}}, _model(dynamic_shape=True), 'has dynamic_shape=True: choose "group"'),
        ({"fp16": {"enabled": True}}, _model(), '"fp16.enabled" is true'),
        ({"fp16": True}, _model(), 'set "bf16": {"enabled": true} instead'),
    ],
)
def test_a_job_that_would_train_wrongly_is_refused(
    config: dict[str, Any], model: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refuse.get_accelerator(), "is_fp16_supported", lambda: False)
    monkeypatch.setattr(start, "_plain_initialize", lambda **_: pytest.fail("DeepSpeed was called"))
    with pytest.raises(ValueError) as error:
        ours.initialize(model=model, config={"dnipipe": {}, **config})
    assert said in str(error.value)


def test_what_can_be_trained_is_not_refused() -> None:
    refuse.check_model(_model())
    refuse.check_job(
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "fp16": {"enabled": False}}, _model(), Block()
    )


def test_one_stage_is_plain_deepspeeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(start, "_plain_initialize", lambda **given: seen.append(given))
    model = _model(num_stages=1, slices=2)  # more than one of which is refused where the block does something
    ours.initialize(model=model, config={"train_batch_size": 8, "dnipipe": {}})
    assert seen[0]["config"] == {"train_batch_size": 8} and "one stage has no bubble" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, plain_fp32, is_tied, said",
    [
        ({"clip": "travelling"}, False, False, 'needs fp32 and "zero_optimization.stage" 0'),
        ({"clip": "stage"}, False, True, "the copies would part"),
    ],
)
def test_a_clip_that_would_do_wrong_is_refused(
    values: dict[str, Any], plain_fp32: bool, is_tied: bool, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        norms.check_clip(read_block(values), 1.0, plain_fp32=plain_fp32, is_tied=is_tied)
    norms.check_clip(read_block(values), 0.0, plain_fp32=plain_fp32, is_tied=is_tied)


def test_the_fault_of_plain_fp32_clipping_is_told_where_it_is_reproduced() -> None:
    with pytest.warns(RuntimeWarning, match="counts the weights of stage 0 only"):
        norms.check_clip(read_block({"clip": "global"}), 1.0, plain_fp32=True, is_tied=False)


class _Tied:
    """Layer 0 and the last are tied; stage by index."""

    def __init__(self, stages: list[int]) -> None:
        self._layer_specs = [ties.TiedLayerSpec("ends", nn.Linear, 2, 2) for _ in stages]
        self._stages = stages

    def stage_owner(self, index: int) -> int:
        return self._stages[index]


def test_ties_that_cannot_be_asynchronous_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is on stages \[0, 1, 2\]: set \"dnipipe.tied\": \"sync\""):
        ties.check_ties(Block(), _Tied([0, 1, 2]), bf16_without_zero=False)
    with pytest.raises(ValueError, match="bf16 optimizer without ZeRO"):
        ties.check_ties(Block(), _Tied([0, 2]), bf16_without_zero=True)
    for block, module in ((Block(tied="sync"), _Tied([0, 1, 2])), (Block(), _Tied([0, 2])), (Block(), _Tied([1, 1]))):
        ties.check_ties(block, module, bf16_without_zero=False)
