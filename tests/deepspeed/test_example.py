"""launch/deepspeed/train.py, as its docstring says to start it, on made pictures: by both launchers, and without the
block."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN, CONFIG = ROOT / "launch/deepspeed/train.py", ROOT / "launch/deepspeed/ds_config.json"
STEPS = 80


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "launcher, with_block",
    [(TORCHRUN, True), (TORCHRUN, False), (DEEPSPEED, True)],
    ids=["torchrun", "torchrun-plain", "deepspeed"],
)
def test_the_example_trains(launcher: list[str], with_block: bool, tmp_path: Path) -> None:
    config = json.loads(CONFIG.read_text())
    block = config.pop("dnipipe")
    if with_block:
        config["dnipipe"] = {**block, "unlock_after_steps": 30}  # so that most batches are unlocked
    config["train_micro_batch_size_per_gpu"] = 16
    config["scheduler"]["params"]["warmup_num_steps"] = 5
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = [*launcher, str(TRAIN), "--deepspeed_config", str(tmp_path / "ds.json"), "--steps", str(STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.search(r"loss (\S+), mean of the last \d+: (\S+), held out: (\S+)", done.stdout)
    assert said is not None, done.stdout[-3000:]
    first, last, held_out = map(float, said.groups())
    assert all(map(math.isfinite, (first, last, held_out))) and last < first, said.group()
    assert ("plain DeepSpeed" in done.stdout) != with_block
