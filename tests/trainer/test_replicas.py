"""Copies of the pipeline that share a batch, and passes that share an optimizer step, against one of each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dnipipe.checkpoint import load_checkpoint
from dnipipe.config import Config, DataConfig, ModelConfig, OptimConfig, PipelineConfig, RunConfig
from dnipipe.trainer import Trainer
from dnipipe.trainer.layout import Layout, stages_for
from tests.partition.test_decoder import options_of
from tests.ranks import run_ranks

STEPS = 8
# without biases: the gradient of a key's is rounding alone, which AdamW makes whole steps of
MODEL = {"source": options_of("llama", vocab_size=256, tie_word_embeddings=True, attention_bias=False)}


def _config(folder: Path, *, policy: str = "wait", schedule: Any = "DNI", **pipeline: Any) -> Config:
    name = "-".join(str(each) for each in (policy, schedule, *pipeline.values()))
    return Config(
        model=ModelConfig(factory="dnipipe.partition:decoder_as_sequential", options=MODEL),
        data=DataConfig(seq_len=12, max_mb=1),
        pipeline=PipelineConfig(
            schedule=schedule, policy=policy, unlock_after_steps=None if policy == "wait" else 3, split="parameters",
            **{"num_microbatches": 2, **pipeline},
        ),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=0, clip=0.5),
        run=RunConfig(
            batch_size=16, train_seconds=0, steps=STEPS, eval_every_s=0, eval_batches=2, log_every_steps=4,
            sample_tokens=0, report=False, checkpoint_every_steps=4, output_dir=str(folder / name),
        ),
    )  # fmt: skip


def _train(rank: int, world: int, configs: list[Config]) -> list[float]:
    return [Trainer(config, world).run(torch.device("cpu"))[0].val_bits for config in configs]


def _weights(config: Config) -> dict[str, Tensor]:
    newest = Path(config.run.output_dir) / "checkpoint" / config.pipeline.schedule / f"step-{config.run.steps:08d}"
    return {name: value for stage in (0, 1) for name, value in load_checkpoint(newest, stage)["model"].items()}


def _assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < 1e-5, name


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], float]:
    """The weights and validation bits of one pipeline and one pass a step."""
    config = _config(tmp_path_factory.mktemp("one"))
    bits = run_ranks(2, _train, [config])[0][0]
    return _weights(config), bits


def test_two_replicas_learn_what_one_learns_from_the_whole_batch(tmp_path: Path, one: Any) -> None:
    configs = [_config(tmp_path, num_replicas=2, schedule=schedule) for schedule in ("DNI", "1F1B", "GPipe")]
    bits = run_ranks(4, _train, configs)
    assert all(each == bits[0] for each in bits)
    for config, val_bits in zip(configs, bits[0], strict=True):
        _assert_close(_weights(config), one[0])
        assert val_bits == pytest.approx(one[1], rel=1e-5)
    record = json.loads((Path(configs[0].run.output_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(record["wait_s_by_rank"]) == 4 and len(record["cosine_by_boundary"]) == 1


def test_two_passes_are_one_of_twice_the_microbatches(tmp_path: Path, one: Any) -> None:
    configs = [_config(tmp_path, accumulate=2, schedule=schedule) for schedule in ("DNI", "1F1B")]
    bits = run_ranks(2, _train, configs)[0]
    for config, val_bits in zip(configs, bits, strict=True):
        _assert_close(_weights(config), one[0])
        assert val_bits == pytest.approx(one[1], rel=1e-5)


@pytest.mark.parametrize("policy", ["synthetic", "stale"])
def test_replicas_and_passes_go_together_without_a_bubble_and_go_on_after_a_stop(tmp_path: Path, policy: str) -> None:
    whole = _config(tmp_path / "whole", policy=policy, num_replicas=2, accumulate=2)
    halves = _config(tmp_path / "halves", policy=policy, num_replicas=2, accumulate=2)
    first = replace(halves, run=replace(halves.run, steps=4))
    run_ranks(4, _train, [whole, first])
    run_ranks(4, _train, [halves])
    found, expected = _weights(halves), _weights(whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_goes_on_with_another_number_of_replicas(tmp_path: Path, one: Any) -> None:
    config = _config(tmp_path)
    run_ranks(2, _train, [replace(config, run=replace(config.run, steps=4))])
    run_ranks(4, _train, [replace(config, pipeline=replace(config.pipeline, num_replicas=2))])
    _assert_close(_weights(config), one[0])


def test_neighbours_in_rank_are_neighbours_in_the_pipeline() -> None:
    layouts = [Layout(rank, num_stages=3, num_replicas=2) for rank in range(6)]
    assert [(each.replica, each.stage) for each in layouts] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [each.is_last for each in layouts] == [False, False, True] * 2


def test_processes_that_make_no_whole_pipelines_are_refused() -> None:
    assert stages_for(6, 2) == 3
    with pytest.raises(ValueError, match="pipeline.num_replicas = 4: 6 processes do not make as many whole pipelines"):
        stages_for(6, 4)


def test_a_travelling_clip_goes_on_bit_for_bit_and_is_not_that_of_each_stage(tmp_path: Path, one: Any) -> None:
    def travelling(folder: Path) -> Config:
        config = _config(folder)
        return replace(config, optim=replace(config.optim, clip_by="travelling"))

    whole, halves = travelling(tmp_path / "whole"), travelling(tmp_path / "halves")
    run_ranks(2, _train, [whole, replace(halves, run=replace(halves.run, steps=4))])
    run_ranks(2, _train, [halves])
    found, expected = _weights(halves), _weights(whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not all(torch.equal(found[name], value) for name, value in one[0].items())
