"""model.compile: the same training, in kernels that torch makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from dnipipe.config import Config
from dnipipe.trainer import Trainer
from tests.ranks import run_ranks
from tests.trainer.test_replicas import _assert_close, _config, _weights


def _train(rank: int, world: int, configs: list[Config]) -> list[int]:
    compiled = []
    for config in configs:
        counters.clear()
        Trainer(config, world).run(torch.device("cpu"))
        compiled.append(counters["stats"]["unique_graphs"])
    return compiled


@pytest.mark.timeout(300)
def test_compiled_layers_learn_the_same(tmp_path: Path) -> None:
    plain = _config(tmp_path / "plain")
    other = _config(tmp_path / "compiled")
    compiled = replace(other, model=replace(other.model, compile=True, recompute=True))
    for graphs in run_ranks(2, _train, [plain, compiled], timeout_s=280.0):
        assert graphs[0] == 0 and graphs[1] > 0
    _assert_close(_weights(compiled), _weights(plain))
