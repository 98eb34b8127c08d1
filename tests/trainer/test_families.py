"""The trainer on every family of decoders, in two and in three stages, against one process that has the whole model."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnipipe.checkpoint import load_checkpoint
from dnipipe.config import Config, DataConfig, ModelConfig, OptimConfig, PipelineConfig, RunConfig
from dnipipe.data import byte_corpus, stdlib_sources
from dnipipe.partition import decoder_as_sequential
from dnipipe.trainer import Trainer
from dnipipe.trainer.model import token_loss
from tests.partition.test_decoder import FAMILIES, options_of
from tests.ranks import run_ranks

STEPS, M, ROWS, T = 10, 4, 8, 12
RATE = 1e-3
CLIP = 0.5


def _config(folder: Path, family: str, *, untie: bool, policy: str, steps: int = STEPS, **pipeline: Any) -> Config:
    options = {"source": options_of(family, vocab_size=256, tie_word_embeddings=True), "untie": untie}
    waits = policy == "wait"
    return Config(
        model=ModelConfig(factory="dnipipe.partition:decoder_as_sequential", options=options),
        data=DataConfig(seq_len=T, max_mb=1),
        pipeline=PipelineConfig(num_microbatches=M, policy=policy, unlock_after_steps=None if waits else 5, **pipeline),
        optim=OptimConfig(learning_rate=RATE if waits else 5 * RATE, warmup_steps=0, clip=0.0 if untie else CLIP),
        run=RunConfig(
            batch_size=ROWS,
            train_seconds=0,
            steps=steps,
            eval_every_s=0,
            eval_batches=1,
            log_every_steps=5,
            sample_tokens=0,
            report=False,
            output_dir=str(folder / f"{family}-{untie}-{policy}"),
        ),
    )


def _train(rank: int, world: int, configs: list[Config]) -> None:
    for config in configs:
        Trainer(config, world).run(torch.device("cpu"))


def _weights(config: Config, num_stages: int) -> dict[str, Tensor]:
    """Of all stages, by name, after the last step."""
    folder = Path(config.run.output_dir) / "checkpoint" / "DNI" / f"step-{config.run.steps:08d}"
    return {
        name: value for stage in range(num_stages) for name, value in load_checkpoint(folder, stage)["model"].items()
    }


def _reference(config: Config, parts: list[nn.Sequential]) -> dict[str, Tensor]:
    """One process that trains the whole row by torch's AdamW; a tied weight gets its gradient one step late.

    parts: the stages, for a norm of each without the tied weight, which is clipped by its own.
    """
    torch.manual_seed(config.run.seed)
    row = decoder_as_sequential(**config.model.options)
    tied = row[-1].project.weight if row[-1].project.weight is row[0].tokens.weight else None
    optim = config.optim
    groups = [
        {"params": [p for p in row.parameters() if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in row.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RATE, (optim.betas[0], optim.betas[1]))
    corpus = byte_corpus(stdlib_sources(), max_bytes=10**6)
    late: Tensor | None = None
    for step in range(STEPS):
        batch = corpus.batch("train", step=step, batch_size=ROWS, seq_len=T, seed=config.run.seed)
        for input_BT, target_BT in zip(*(each.chunk(M) for each in batch), strict=True):
            (token_loss(row(input_BT), target_BT) / M).backward()
        if tied is not None:
            tied.grad, late = late, tied.grad
        if optim.clip:
            for part in parts:
                own = [row.get_parameter(name) for name, _ in part.named_parameters()]
                nn.utils.clip_grad_norm_([p for p in own if p is not tied], optim.clip)
            if tied is not None and tied.grad is not None:
                nn.utils.clip_grad_norm_([tied], optim.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in row.state_dict().items()}


@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_that_wait_train_as_one_process_does_with_tied_weights_and_without(
    tmp_path: Path, num_stages: int
) -> None:
    configs = [_config(tmp_path, family, untie=untie, policy="wait") for family in FAMILIES for untie in (False, True)]
    run_ranks(num_stages, _train, configs)
    for config in configs:
        found = _weights(config, num_stages)
        split = json.loads((Path(config.run.output_dir) / "split.json").read_text())["lengths"]
        layers = list(decoder_as_sequential(**config.model.options).named_children())
        ends = [sum(split[:stage]) for stage in range(num_stages + 1)]
        parts = [nn.Sequential(OrderedDict(layers[a:b])) for a, b in zip(ends, ends[1:], strict=False)]
        expected = _reference(config, parts)
        assert sorted(found) == sorted(expected)
        for name, value in expected.items():
            assert float((found[name] - value).abs().max()) < 1e-5, f"{config.run.output_dir}: {name}"


@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_that_never_wait_learn(tmp_path: Path, num_stages: int) -> None:
    configs = [_config(tmp_path, family, untie=False, policy="synthetic", steps=60) for family in FAMILIES]
    run_ranks(num_stages, _train, configs)
    for config in configs:
        lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert losses[-1] < 4.4 < 5.2 < losses[0], f"{config.run.output_dir}: {losses}"
