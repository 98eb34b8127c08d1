"""What jobs do beside training one batch after the other: other shapes, sizes, tuples, timers, a script as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

import dnipipe.deepspeed as ours
from dnipipe.deepspeed.__main__ import main
from tests.deepspeed import jobs
from tests.deepspeed.jobs import CLASSES, FEATURES, RESTORING, Job
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SYNTHETIC = {"policy": "synthetic"}


def _rows(rows: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(rows, FEATURES, generator=generator)
        yield x, x[:, :CLASSES].argmax(1)


def _other_shapes(rank: int, world: int, block: dict[str, Any] | None) -> tuple[list[float], list[Tensor]]:
    """Rows, then the number of microbatches, change in the middle; an evaluation stands between."""
    jobs.start()
    engine = jobs.build(Job(2, 0, 2, block))
    losses = jobs.train(engine, 3, _rows(8))
    engine.reset_activation_shape()
    losses += jobs.train(engine, 3, _rows(12))
    losses.append(float(engine.eval_batch(_rows(12, seed=2))))
    engine.set_train_batch_size(8 * 5)
    losses += jobs.train(engine, 3, _rows(12))
    return losses, jobs.weights(engine)


def test_other_shapes_and_batch_sizes_as_in_plain() -> None:
    plain, restoring = run_ranks(2, _other_shapes, None), run_ranks(2, _other_shapes, RESTORING)
    for one, other in zip(plain, restoring, strict=True):
        assert one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert all(loss == loss for loss in run_ranks(2, _other_shapes, SYNTHETIC)[1][0])


def _smaller_batch(rank: int, world: int) -> str:
    jobs.start()
    engine = jobs.build(Job(2, 0, 1, {**SYNTHETIC, "timeout_s": 3}))
    jobs.train(engine, 3, _rows(8))
    try:
        jobs.train(engine, 3, _rows(5))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_a_shape_that_changes_unannounced_is_told_with_the_cure() -> None:
    first, _ = run_ranks(2, _smaller_batch)
    assert "were (8, 64) torch.float32 and are (5, 64) torch.float32: call engine.reset_activation_shape()" in first


class _Pair(nn.Module):
    """Passes an integer tensor on beside the activation; the last one returns the activation alone."""

    def __init__(self, width: int, last: bool = False) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(FEATURES, width), last

    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        h, index = pair
        h = self.linear(h).tanh() + index.float().unsqueeze(1)
        return h if self.last else (h, index)


def _tuples(rank: int, world: int, block: dict[str, Any] | None) -> tuple[list[float], list[Tensor]]:
    """Tuples between stages and as labels, made from the loader's batches by a batch_fn."""
    jobs.start()
    torch.manual_seed(0)
    layers = [_Pair(FEATURES), _Pair(FEATURES), _Pair(CLASSES, last=True)]
    loss = nn.CrossEntropyLoss()
    model = PipelineModule(layers, num_stages=3, loss_fn=lambda y, told: (loss(y, told[0]) * told[1]).mean())
    initialize = deepspeed.initialize if block is None else ours.initialize
    engine, *_ = initialize(model=model, config=Job(3, 1, 3, block).config())
    engine.set_batch_fn(lambda batch: ((batch[0], batch[1] % 2), (batch[1], torch.ones(8))))
    return jobs.train(engine, 8, _rows(8)), jobs.weights(engine)


def test_tuples_and_a_batch_fn_as_in_plain() -> None:
    plain, restoring = run_ranks(3, _tuples, None), run_ranks(3, _tuples, RESTORING)
    for one, other in zip(plain, restoring, strict=True):
        assert one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert all(loss == loss for loss in run_ranks(3, _tuples, SYNTHETIC)[2][0])


def _timers(rank: int, world: int) -> int:
    jobs.start()
    engine = jobs.build(Job(2, 0, 2, SYNTHETIC, {"wall_clock_breakdown": True, "steps_per_print": 2}))
    jobs.train(engine, 4)
    return int(engine.global_steps)


def test_wall_clock_breakdown_works() -> None:
    """Plain DeepSpeed 0.19 stops at an assertion there: "timer has already been started"."""
    assert run_ranks(2, _timers) == [4, 4]


SCRIPT = """
import deepspeed, sys
from deepspeed.pipe import PipelineModule
from torch import nn
import torch
deepspeed.init_distributed()
layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
engine, *_ = deepspeed.initialize(model=PipelineModule(layers, num_stages=2, loss_fn=nn.MSELoss()), config=sys.argv[1])
engine.train_batch(iter([(torch.ones(2, 4), torch.ones(2, 4))] * 2))
sys.stdout.write(f"made {type(engine).__name__}\\n")  # at once, for print's two pieces mix with the other rank's
"""


@pytest.mark.parametrize("block, made", [(', "dnipipe": {}', "DNIPipelineEngine"), ("", "PipelineEngine")])
def test_a_script_runs_as_it_is(block: str, made: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    optimizer = '"optimizer": {"type": "Adam", "params": {"torch_adam": true}}'
    sizes = '"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2'
    (tmp_path / "ds.json").write_text(f"{{{sizes}, {optimizer}{block}}}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "dnipipe.deepspeed", str(tmp_path / "train.py"), str(tmp_path / "ds.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"made {made}") == 2


@pytest.mark.parametrize("of_launcher", [["--local_rank=3"], []])
def test_the_argument_of_deepspeeds_launcher_reaches_the_script(
    of_launcher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --module it stands before the script's name."""
    script, said = tmp_path / "train.py", tmp_path / "said.json"
    script.write_text(f"import json, sys\nopen({str(said)!r}, 'w').write(json.dumps(sys.argv))")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(deepspeed, "initialize", deepspeed.initialize)  # main() sets it for good
    monkeypatch.setattr(sys, "argv", ["__main__.py", *of_launcher, str(script), "--local_rank=7", "-x"])
    main()
    assert json.loads(said.read_text()) == [str(script), *of_launcher, "--local_rank=7", "-x"]
    assert deepspeed.initialize is ours.initialize
    monkeypatch.setattr(sys, "argv", ["__main__.py", *of_launcher])
    with pytest.raises(SystemExit, match="usage: python -m dnipipe.deepspeed SCRIPT.py"):
        main()
