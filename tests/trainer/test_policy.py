"""The policy of a config: what the schedule gets, what is planned for, and a run that changes it on its way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dnipipe.checkpoint import load_checkpoint
from dnipipe.config import Config, DataConfig, ModelConfig, OptimConfig, PipelineConfig, RunConfig
from dnipipe.plan import dni
from dnipipe.schedule.choose import choose_policy
from dnipipe.schedule.policy import Policy
from dnipipe.trainer import Trainer
from dnipipe.trainer.cut import held, plan_of
from dnipipe.trainer.measure import measure
from dnipipe.trainer.model import make_model
from dnipipe.trainer.policy import policy_of
from tests.ranks import run_ranks

MODEL = {"vocab_size": 256, "seq_len": 16, "width": 16, "depth": 2, "heads": 2}


def _config(**pipeline: Any) -> Config:
    return Config(pipeline=PipelineConfig(**{"num_microbatches": 2, **pipeline}))


@pytest.mark.parametrize(
    "settings, policy",
    [
        ({"policy": "wait:200,stale", "accumulate": 2}, Policy("wait:400,stale", steps_per_update=2)),
        (
            {"policy": "stale", "accumulate": 2, "unlock_after_steps": 7},
            Policy("stale", unlock_after_steps=14, steps_per_update=2),
        ),
        ({"policy": "synthetic", "unlock_after_steps": 0, "lag": 3}, Policy("synthetic", 3, 0)),
        ({"policy": "wait", "unlock_after_steps": 7}, Policy("wait")),
        ({"policy": "auto", "accumulate": 2}, Policy("auto", steps_per_update=2)),
        ({"policy": "corrected", "in_flight": 5}, Policy("corrected", in_flight=5)),
    ],
)
def test_steps_of_the_optimizer_become_calls_of_the_schedule(settings: dict[str, Any], policy: Policy) -> None:
    assert policy_of(_config(**settings, late_weights="predicted")) == policy


@pytest.mark.parametrize("name, late_weights", [("AdamW", "predicted@3"), ("Muon", "predicted")])
def test_late_weights_go_by_the_optimizer_unless_they_are_named(name: Any, late_weights: str) -> None:
    config = replace(_config(policy="stale"), optim=OptimConfig(name=name))
    assert policy_of(config) == Policy("stale", late_weights=late_weights)
    named = replace(config, pipeline=replace(config.pipeline, late_weights="old"))
    assert policy_of(named).late_weights == "old"


def test_what_is_planned_is_the_last_phase_and_what_has_room_is_the_fullest() -> None:
    config = _config(policy="wait:5,stale:5,synthetic", in_flight=5)
    assert plan_of(config, 3) == dni.synthetic(3, 2) and held(config, 3) == [5, 3, 1]
    chosen = choose_policy(3, 2, "AdamW")[0]
    assert plan_of(_config(), 3) == plan_of(_config(policy=chosen), 3) and held(_config(), 3) == held(
        _config(policy=chosen), 3
    )


def test_a_run_that_ends_under_stale_has_no_predictor_to_balance_for() -> None:
    predicted = {}
    for policy in ("wait:5,stale", "stale:5,synthetic", "synthetic:5,stale"):
        config = replace(_phases(Path("nowhere")), pipeline=PipelineConfig(policy=policy, num_microbatches=2))
        torch.manual_seed(0)
        measured = measure(config, make_model(config.model), 2, torch.device("cpu"), Console(quiet=True))
        predicted[policy] = (measured.interface, measured.interface_ms > 0)
    of_none, of_head = (None, False), ("local_head", True)
    assert predicted == {"wait:5,stale": of_none, "stale:5,synthetic": of_head, "synthetic:5,stale": of_none}


def test_what_the_stages_cannot_hold_is_refused_before_they_start() -> None:
    with pytest.raises(ValueError, match="in_flight must be from 2 to 3 microbatches for 2 stages, got 4"):
        Trainer(_config(policy="stale", in_flight=4), 2)


def _phases(folder: Path, **run: Any) -> Config:
    return Config(
        model=ModelConfig(factory="launch.gpt:byte_gpt", options=MODEL),
        data=DataConfig(seq_len=16, max_mb=1),
        pipeline=PipelineConfig(
            policy="wait:2,corrected:2,synthetic:2,stale", in_flight="auto", num_microbatches=2, accumulate=2,
            split="parameters",
        ),
        optim=OptimConfig(name="Muon", warmup_steps=0),
        run=RunConfig(
            batch_size=8, train_seconds=0, steps=10, eval_every_s=0, eval_batches=1, log_every_steps=1,
            sample_tokens=0, report=False, output_dir=str(folder), **run,
        ),
    )  # fmt: skip


def _train(rank: int, world: int, configs: list[Config]) -> None:
    for config in configs:
        Trainer(config, world).run(torch.device("cpu"))


def test_a_run_of_several_phases_saved_within_each_goes_on_bit_equal(tmp_path: Path) -> None:
    whole = _phases(tmp_path / "whole", checkpoint_every_steps=3)
    parts = _phases(tmp_path / "parts", checkpoint_every_steps=3)
    run_ranks(2, _train, [whole, *(replace(parts, run=replace(parts.run, steps=steps)) for steps in (3, 6, 9, 10))])
    for stage in (0, 1):
        one, other = (
            load_checkpoint(Path(config.run.output_dir) / "checkpoint" / "DNI" / "step-00000010", stage)
            for config in (whole, parts)
        )
        assert one["schedule"]["flow"]["phase"] == "stale"
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
