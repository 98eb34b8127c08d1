"""One training run of benchmarks.policies: a GPT over bytes, cut into stages, under one policy, in one process."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.grouped import Grouped
from benchmarks.policy_rows import PolicyRow, write_part
from benchmarks.recipe import optimizer_of, rate_of
from benchmarks.workload import token_loss
from dnipipe.data import ByteCorpus
from dnipipe.interface import Learner, TensorMeta, build_interface
from dnipipe.schedule.policy import Policy
from launch.gpt import byte_gpt

HEAD_WIDTH = 64
CURVE_POINTS = 12
WAIT = "wait"


@dataclass(frozen=True)
class Size:
    """What all runs have in common. eval_sequences: of the end; the curve is of a quarter of them."""

    blocks: int
    width: int
    seq_len: int
    batch_size: int
    steps: int
    eval_sequences: int
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Spec:
    """What one run is. before: the policy from the unlocking to `switch_step`, if there is another one first."""

    policy: str
    interface: str | None
    optimizer: str
    stages: int
    microbatches: int
    unlock_after_steps: int
    in_flight: int | None
    late_weights: str
    seed: int
    learning_rate: float
    before: str | None = None
    switch_step: int = 0

    @property
    def phases(self) -> Policy:
        if self.policy == "wait":
            return Policy("wait")
        phases = [(name, count) for name, count in ((WAIT, self.unlock_after_steps), self._first) if count > 0]
        name = ",".join([*(f"{name}:{count}" for name, count in phases), self.policy])
        return Policy(name, in_flight=self.in_flight, late_weights=self.late_weights)

    @property
    def _first(self) -> tuple[str, int]:
        return self.before or WAIT, (self.switch_step - self.unlock_after_steps) if self.before else 0


class Trained:
    """The model of a run, its optimizers and predictors."""

    def __init__(self, spec: Spec, size: Size) -> None:
        self.stages = cut_model(size, spec.stages, spec.seed)
        self.rate = rate_of(spec.learning_rate, size.steps)
        heads = [*[None] * (spec.stages - 1), self.stages[-1][-1]]
        self.optimizers = [
            optimizer_of(stage, spec.optimizer, self.rate, head)  # type: ignore[arg-type]  # main() has checked it
            for stage, head in zip(self.stages, heads, strict=True)
        ]
        self.learners: list[Learner | None] = [
            make_learner(spec.interface, size, spec.microbatches) if index < spec.stages - 1 else None
            for index in range(spec.stages)
        ]


def cut_model(size: Size, num_stages: int, seed: int) -> list[nn.Sequential]:
    """The model in stages of as many blocks, give or take one; the embedding is in the first, the head in the last."""
    torch.manual_seed(seed)
    heads = max(1, size.width // HEAD_WIDTH)
    embedding, *blocks, head = byte_gpt(seq_len=size.seq_len, width=size.width, depth=size.blocks, heads=heads)
    layers: list[list[nn.Module]] = [[] for _ in range(num_stages)]
    layers[0].append(embedding)
    for number, block in enumerate(blocks):
        layers[number * num_stages // len(blocks)].append(block)
    layers[-1].append(head)
    return [nn.Sequential(*each).to(size.device, size.dtype) for each in layers]


def make_learner(interface: str | None, size: Size, num_microbatches: int) -> Learner | None:
    """None without an interface. Text form: name, or name+option=number, as transformer+width=64."""
    if interface is None:
        return None
    name, *options = interface.split("+")
    rows, device = size.batch_size // num_microbatches, torch.device(size.device)
    built = build_interface(
        name,
        TensorMeta((rows, size.seq_len, size.width), size.dtype),
        num_classes=256,
        label=TensorMeta((rows, size.seq_len), torch.int64),
        **{key: int(value) for key, value in (option.split("=") for option in options)},
    )
    rate, fused = built.learning_rate, device.type == "cuda"
    return Learner([built.to(device)], lambda parameters: torch.optim.Adam(parameters, rate, (0.9, 0.95), fused=fused))


def load_corpus(folder: Path) -> ByteCorpus:
    """What policies.py has written, shared by all runs: mapped, not read."""
    streams = [np.memmap(folder / name, dtype=np.uint8, mode="c") for name in ("train.bin", "validation.bin")]
    return ByteCorpus(*(torch.from_numpy(each) for each in streams))


def run(spec: Spec, size: Size, base: PolicyRow, corpus_folder: Path, part: Path, threads: int) -> PolicyRow:
    """Trains, evaluates, and writes `part` at each evaluation, so that a run cut short leaves its curve."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    corpus, device = load_corpus(corpus_folder), torch.device(size.device)
    trained = Trained(spec, size)
    grouped = Grouped(
        trained.stages,
        trained.learners,
        token_loss,
        num_microbatches=spec.microbatches,
        policy=spec.phases,
        masters={each: copy for optimizer in trained.optimizers for each, copy in optimizer.masters.items()},
    )
    curve: list[tuple[int, float]] = []
    start_s = time.perf_counter()
    marks = {round(size.steps * (point + 1) / CURVE_POINTS) for point in range(CURVE_POINTS)}
    for step in range(size.steps):
        x, y = corpus.batch("train", step=step, batch_size=size.batch_size, seq_len=size.seq_len, seed=spec.seed)
        grouped.step(x.to(device), y.to(device))
        for optimizer in trained.optimizers:
            optimizer.step(step, divide_by=spec.microbatches)
        for learner in trained.learners:
            if learner is not None and learner.optimizer is not None:
                for group in learner.optimizer.param_groups:
                    group["lr"] = trained.rate(step + 1)
        if step + 1 in marks:
            bpb = evaluate(trained.stages, corpus, size, size.eval_sequences // 4)
            if math.isfinite(bpb):
                curve.append((step + 1, bpb))
            if step + 1 == size.steps:
                bpb = evaluate(trained.stages, corpus, size, size.eval_sequences)
            cosines = [learner.metrics()["cosine"] for learner in trained.learners if learner is not None]
            base = replace(
                base,
                curve=list(curve),
                val_bpb=bpb if math.isfinite(bpb) else None,
                steps=step + 1,
                cosines=[round(each, 3) for each in cosines if math.isfinite(each)],
                run_s=round(time.perf_counter() - start_s, 1),
            )
            write_part(base, part)
            if not math.isfinite(bpb):
                break
    return base


@torch.no_grad()
def evaluate(stages: list[nn.Sequential], corpus: ByteCorpus, size: Size, sequences: int) -> float:
    """Bits per byte of the first `sequences` validation windows; nan once the model has none."""
    batch, nats, count = 64, torch.zeros((), dtype=torch.float64, device=size.device), 0
    for number in range(max(1, sequences // batch)):
        x, y = corpus.batch("validation", step=number, batch_size=batch, seq_len=size.seq_len, seed=0)
        h = x.to(size.device)
        for stage in stages:
            h = stage(h)
        nats += token_loss(h, y.to(size.device)).double()
        count += 1
    return nats.item() / count / math.log(2)
