"""Stages that need not wait for their input, in the trainer: refusals, runs on real ranks, and runs that go on."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnipipe.checkpoint import load_checkpoint
from dnipipe.config import (
    Config,
    DataConfig,
    ForwardUnlockedConfig,
    ModelConfig,
    OptimConfig,
    PipelineConfig,
    RunConfig,
)
from dnipipe.trainer import Trainer
from dnipipe.trainer.unlocked import check_unlocked_config, unlocked_of
from tests.ranks import run_ranks

WIDTH = 16
MODEL = {"vocab_size": 256, "seq_len": 16, "width": WIDTH, "depth": 2, "heads": 2}
WAITED = 2
"""Optimizer steps under wait, in the runs below."""


class InputModel(nn.Module):
    """Of a user's own."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_tokens, width)

    def forward(self, tokens_BT: Tensor, label: None) -> Tensor:
        assert label is None
        out_BTD: Tensor = self.table(tokens_BT)
        return out_BTD


def input_model(**options: int) -> nn.Module:
    return InputModel(256, **options)


def no_module() -> int:
    return 3


def _config(folder: Path | str = "nowhere", *, unlocked: Any = None, run: Any = None, **pipeline: Any) -> Config:
    return Config(
        model=ModelConfig(factory="launch.gpt:byte_gpt", options=MODEL),
        data=DataConfig(seq_len=16, max_mb=1),
        pipeline=PipelineConfig(
            **{
                "policy": "synthetic", "unlock_after_steps": WAITED, "num_microbatches": 2, "split": "parameters",
                "forward_unlocked": ForwardUnlockedConfig(**unlocked or {}), **pipeline,
            },
        ),
        optim=OptimConfig(warmup_steps=0, learning_rate=1e-2),
        run=RunConfig(
            **{
                "batch_size": 8, "train_seconds": 0, "steps": 10, "eval_every_s": 0, "eval_batches": 1,
                "log_every_steps": 1, "sample_tokens": 0, "report": False, "output_dir": str(folder), **(run or {}),
            },
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    "pipeline, unlocked, said",
    [
        (
            {"policy": "auto"},
            {},
            "pipeline.forward_unlocked with pipeline.policy = 'auto': forward_unlocked goes with synthetic gradients, "
            "after true ones if you like, and not with policy 'auto': choose policy='synthetic' or",
        ),
        ({"policy": "stale"}, {}, "pipeline.forward_unlocked with pipeline.policy = 'stale': forward_unlocked goes wi"),
        ({"policy": "wait"}, {}, "and not with policy 'wait': choose policy='synthetic' or 'wait:200,synthetic'"),
        ({}, {"late": [[2, 2, 0]]}, "late names (2, 2, 0): it takes (stage, step, microbatch) with a stage from 1 to"),
        ({}, {"late": [[1, 1, 0]]}, "late names (1, 1, 0), but step 1 is under policy 'wait'"),
        ({"accumulate": 2}, {"late": [[1, 3, 0]]}, "late names (1, 3, 0), but step 3 is under policy 'wait'"),
        (
            {"schedule": "1F1B"},
            {},
            "pipeline.forward_unlocked with pipeline.schedule = '1F1B': only DNI starts before its input is there; "
            "take pipeline.schedule=DNI, or pipeline.forward_unlocked=null",
        ),
        ({}, {"num_tokens": 255}, "pipeline.forward_unlocked.num_tokens = 255: the data has 256 tokens"),
        ({}, {"model": ":x"}, "pipeline.forward_unlocked.model = ':x': Empty module name; give module:function"),
        ({}, {"model": "nowhere:f"}, "pipeline.forward_unlocked.model = 'nowhere:f': No module named 'nowhere'; give"),
        (
            {},
            {"model": f"{__name__}:input_model", "options": {"size": 3}},
            f"pipeline.forward_unlocked.options = {{'size': 3}}: {__name__}:input_model does not take them",
        ),
        ({}, {"model": f"{__name__}:no_module"}, "no_module': it made a int; let it return a module"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_there_is_a_process_group(
    pipeline: dict[str, Any], unlocked: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as refused:
        Trainer(_config(unlocked=unlocked, **pipeline), 2)
    assert said in str(refused.value)


def test_what_goes_with_it_is_taken_also_beside_another_schedule() -> None:
    for pipeline in ({}, {"accumulate": 2}, {"policy": "wait:2,synthetic:3,wait", "unlock_after_steps": None}):
        Trainer(_config(unlocked={"late": [[1, 4, 1]], "num_tokens": 300}, **pipeline), 2)
    Trainer(_config(schedule="1F1B", run={"compare_with": ["DNI"]}), 2)
    assert unlocked_of(_config(forward_unlocked=None), 256, 1) is None


def test_nobody_knows_the_tokens_of_token_files_without_a_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"num_tokens = None: data.vocab_size is null too.*give either"):
        check_unlocked_config(_config(), ["DNI"], None, 2)
    own = {"model": f"{__name__}:input_model", "options": {"width": 4}}
    for given, num_tokens in (({"num_tokens": 7}, 7), (own, 0)):
        unlocked = unlocked_of(_config(unlocked=given), None, 1)
        assert unlocked is not None and unlocked.num_tokens == num_tokens
        assert (unlocked.model is not None) == ("model" in given)


def _train(rank: int, world: int, configs: list[Config]) -> str:
    """What was said on stderr."""
    said = io.StringIO()
    with redirect_stderr(said):
        for config in configs:
            Trainer(config, world).run(torch.device("cpu"))
    return said.getvalue()


def _records(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["schedule"] == "DNI"]


def _state(config: Config, rank: int) -> dict[str, Any]:
    folder = Path(config.run.output_dir) / "checkpoint" / "DNI" / f"step-{config.run.steps:08d}"
    return load_checkpoint(folder, rank)


def _starts(config: Config, rank: int) -> list[list[int]]:
    starts: list[list[int]] = _state(config, rank)["schedule"]["flow"]["early_starts"].tolist()
    return starts


LATE = [[1, step, number] for step in range(WAITED, 60) for number in (0, 1) if (step + number) % 3 != 0]


def test_a_small_gpt_trains_with_synthetic_inputs_and_writes_beside_a_schedule_that_has_none(tmp_path: Path) -> None:
    run = {"steps": 60, "sample_tokens": 3, "compare_with": ["1F1B"]}
    config = _config(tmp_path, unlocked={"window": 3, "late": LATE, "learning_rate": 1e-2}, run=run)
    first, _ = run_ranks(2, _train, [config])
    assert f"window 3, late {len(LATE)}" in first
    records = _records(config)
    losses = [record["loss"] for record in records]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.5
    assert records[-1]["early_starts_by_rank"] == [0, len(LATE)]
    assert records[-1]["early_starts_by_rank"][1] > records[9]["early_starts_by_rank"][1] > 0
    (r2,) = records[-1]["input_r2_by_boundary"]
    assert r2 > 0.5, "the model of the inputs has not learned"
    assert _starts(config, 1) == LATE and _starts(config, 0) == []


PATIENT = {"patience_s": 20.0}
LATER = [start for start in LATE if start[1] >= 2 * WAITED]
"""For two passes to an optimizer step."""


@pytest.mark.parametrize(
    "unlocked",
    [
        {"window": 3, "late": LATER},
        {"window": 5, "late": LATER, "model": f"{__name__}:input_model", "options": {"width": WIDTH}},
        PATIENT,
    ],
)
def test_a_run_that_goes_on_ends_bit_equal_where_the_timing_has_no_say(tmp_path: Path, unlocked: Any) -> None:
    whole, halves = (
        _config(tmp_path / name, unlocked=unlocked, accumulate=2, run={"checkpoint_every_steps": 4})
        for name in ("whole", "halves")
    )
    run_ranks(2, _train, [whole, *(replace(halves, run=replace(halves.run, steps=steps)) for steps in (4, 8, 10))])
    due = [] if unlocked is PATIENT else [start for start in LATER if start[1] < 20]
    for stage in (0, 1):
        one, other = (_state(config, stage) for config in (whole, halves))
        assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
        assert _starts(whole, stage) == _starts(halves, stage) == (due if stage else [])
    learned = [_state(config, 1)["schedule"]["flow"]["input_learner"] for config in (whole, halves)]
    assert _equal(*learned)


def _equal(one: Any, other: Any) -> bool:
    """Bit for bit, through mappings and lists."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def test_what_was_late_in_a_run_is_repeated_bit_for_bit_by_another(tmp_path: Path) -> None:
    """No patience: a stage that is ahead of the one before starts from synthetic inputs, as the machine has it."""
    run = _config(tmp_path / "run", unlocked={"window": 4, "patience_s": 0.0})
    run_ranks(2, _train, [run])
    starts = _starts(run, 1)
    assert starts, "no microbatch was ever late"
    again = _config(tmp_path / "again", unlocked={"window": 4, "late": starts})
    run_ranks(2, _train, [again])
    for stage in (0, 1):
        assert _equal(_state(run, stage)["model"], _state(again, stage)["model"])


def test_it_goes_on_in_other_stages_and_replicas_where_the_models_of_the_inputs_may_begin_anew(tmp_path: Path) -> None:
    config = _config(tmp_path, unlocked={"window": 3, "late": LATE}, run={"steps": 4})
    run_ranks(2, _train, [config])
    config = replace(config, pipeline=replace(config.pipeline, num_replicas=2), run=replace(config.run, steps=7))
    run_ranks(4, _train, [config])
    assert _records(config)[-1]["early_starts_by_rank"] == [0, 6] * 2
    config = replace(config, pipeline=replace(config.pipeline, num_replicas=1), run=replace(config.run, steps=9))
    run_ranks(3, _train, [config])
    last = _records(config)[-1]
    assert math.isfinite(last["loss"]) and last["early_starts_by_rank"] == [0, 3, 0]
