"""A training job of DeepSpeed's on one rank: the same model, ds_config and data for the plain engine and for ours.

DeepSpeed chooses its accelerator when it is imported, so the environment must be set before this module is imported.
"""

from __future__ import annotations

import io
import itertools
import logging
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

import dnipipe.deepspeed as ours
from benchmarks.deepspeed_compete import Job
from benchmarks.deepspeed_rows import OURS
from benchmarks.machine import synchronize
from benchmarks.workload import token_loss
from dnipipe.boundary import DirectBoundary


def join(backend: str) -> None:
    """DeepSpeed takes over the process group, which is open already. Every rank must call it."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # dozens of lines for each engine
    with redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(backend, dist_init_required=False)


class Contestant:
    """One engine on this rank, as benchmarks.rounds times it. Every rank must do all of it alike.

    Args: engine: "plain" or "dnipipe".
    """

    def __init__(self, engine: str, job: Job, device: torch.device) -> None:
        self.device = device
        workload = job.workload
        stages = workload.chunks(list(range(workload.stages)), workload.stages, torch.device("cpu"))
        # one layer for each stage, so that every stage has as many blocks
        self.engine: Any
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints how it cut the model
            model = PipelineModule(stages, workload.stages, loss_fn=token_loss, partition_method="uniform")
            initialize = ours.initialize if engine == OURS else deepspeed.initialize
            self.engine, *_ = initialize(model=model, config=job.config(engine))
        tokens = workload.batch(1, device)
        self._data = itertools.repeat((tokens, tokens))
        self._has_data = self.engine.is_first_stage() or self.engine.is_last_stage()

    def step(self) -> None:
        self.engine.train_batch(self._data if self._has_data else None)

    def settle(self) -> None:
        """Nothing of this engine is left on the device or on the wire."""
        if isinstance(self.engine, ours.DNIPipelineEngine):
            self.engine.flush()
        synchronize(self.device)

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""
        self.engine.destroy()
        self.engine = None

    @property
    def policy(self) -> str | None:
        """At present; None: the plain engine."""
        return str(self.engine.metrics["policy"]) if isinstance(self.engine, ours.DNIPipelineEngine) else None

    @property
    def transport(self) -> str:
        """What carries activations and gradients."""
        if isinstance(self.engine, ours.DNIPipelineEngine):
            sides = (self.engine.flow.up, self.engine.flow.down)
            if any(side is not None and isinstance(side.boundary, DirectBoundary) for side in sides):
                return "direct"
        return "nccl" if self.device.type == "cuda" else "gloo"


VERSION: str = deepspeed.__version__
