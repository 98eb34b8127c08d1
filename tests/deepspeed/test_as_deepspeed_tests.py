"""What DeepSpeed's own tests of its pipeline ask of it on a CPU, asked of ours: the microbatches' mean, an
nn.Sequential's layers, shapes that change."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

import dnipipe.deepspeed as ours
from tests.deepspeed import jobs
from tests.deepspeed.jobs import CLASSES, FEATURES, RESTORING, WIDTH, Job
from tests.ranks import run_ranks

TOTAL_ROWS, RATE = 8, 0.5
SGD = {"optimizer": {"type": "SGD", "params": {"lr": RATE}}}


def _layers(num_hidden: int = 3) -> list[nn.Module]:
    """No dropout: what a stage computes must not depend on its own random numbers."""
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Linear(FEATURES, WIDTH), nn.ReLU()]
    for _ in range(num_hidden):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return [*layers, nn.Linear(WIDTH, CLASSES)]


def _engine(layers: list[nn.Module], job: Job, **of_the_module: Any) -> Any:
    loss_fn = nn.CrossEntropyLoss()
    model = PipelineModule(
        layers, num_stages=job.num_stages, loss_fn=loss_fn, partition_method="uniform", **of_the_module
    )
    initialize = deepspeed.initialize if job.block is None else ours.initialize
    engine, *_ = initialize(model=model, config=job.config())
    return engine


def _own(engine: Any) -> range:
    """The layers, by their number in the whole model, that this stage holds."""
    return range(engine.module._local_start, engine.module._local_stop)


def _stage_of(whole: nn.Sequential, engine: Any) -> list[Tensor]:
    return [weight.detach() for index in _own(engine) for weight in whole[index].parameters()]


def _one_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(TOTAL_ROWS, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (TOTAL_ROWS,), generator=generator)


# (a) the mean over microbatches


def _one_sgd_step(rank: int, world: int, counts: list[int]) -> list[tuple[int, float, list[Tensor], list[Tensor]]]:
    """For each number of microbatches the loss, and the weights after one batch: of the engine, and by hand."""
    jobs.start()
    x, label = _one_batch()
    outcomes = []
    for num_microbatches in counts:
        rows = TOTAL_ROWS // num_microbatches
        sizes = {"train_micro_batch_size_per_gpu": rows}
        layers = _layers()
        whole = nn.Sequential(*copy.deepcopy(layers))
        engine = _engine(layers, Job(2, 0, num_microbatches, RESTORING, {**SGD, **sizes}))
        parts = zip(x.split(rows), label.split(rows), strict=True)
        loss = float(engine.train_batch(parts))
        nn.CrossEntropyLoss()(whole(x), label).backward()
        with torch.no_grad():
            for weight in whole.parameters():
                assert weight.grad is not None
                weight -= RATE * weight.grad
        outcomes.append((num_microbatches, loss, jobs.weights(engine), _stage_of(whole, engine)))
    return outcomes


def test_the_update_of_any_number_of_microbatches_is_that_of_their_mean_loss() -> None:
    whole = nn.Sequential(*_layers())
    x, label = _one_batch()
    mean_loss = float(nn.CrossEntropyLoss()(whole(x), label).detach())
    begun = [weight.detach() for weight in whole.parameters()]
    for outcomes in run_ranks(2, _one_sgd_step, [1, 2, 4]):
        for num_microbatches, loss, found, wanted in outcomes:
            assert loss == pytest.approx(mean_loss, rel=1e-5), num_microbatches
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
            moved = [all(not torch.allclose(each, old) for old in begun if old.shape == each.shape) for each in found]
            assert all(moved), "weights that stay where they were would be equal too"


# (b) the layers of an nn.Sequential


def _sequential_and_pipeline(rank: int, world: int, interval: int) -> list[tuple[float, float, Tensor | None, Tensor]]:
    """Loss and output of an evaluation, piped and not: before training and after it, with the weights gathered."""
    jobs.start()
    layers = _layers()
    whole = nn.Sequential(*copy.deepcopy(layers))
    engine = _engine(layers, Job(2, 0, 2, RESTORING), activation_checkpoint_interval=interval)
    outcomes = []
    for seed in (20, 21):
        held_out = list(itertools.islice(jobs.batches(seed, torch.float32), 2))
        loss, outputs = engine.eval_batch(iter(held_out), return_logits=True)
        with torch.no_grad():
            by_hand = [whole(x) for x, _ in held_out]
            losses = [nn.CrossEntropyLoss()(y, label) for y, (_, label) in zip(by_hand, held_out, strict=True)]
        outcomes.append((float(loss), float(torch.stack(losses).mean()), outputs, by_hand[-1]))
        jobs.train(engine, 5)
        mine = {index: [w.detach() for w in engine.module.forward_funcs[place].parameters()]
                for place, index in enumerate(_own(engine)) if isinstance(whole[index], nn.Linear)}  # fmt: skip
        parts: list[dict[int, list[Tensor]]] = [{} for _ in range(world)]
        torch.distributed.all_gather_object(parts, mine)
        gathered = {index: weights for part in parts for index, weights in part.items()}
        assert len(gathered) == sum(isinstance(layer, nn.Linear) for layer in whole)
        with torch.no_grad():
            for index, weights in gathered.items():
                for weight, trained in zip(whole[index].parameters(), weights, strict=True):
                    assert not torch.equal(weight, trained), f"layer {index} was not trained"
                    weight.copy_(trained)
    return outcomes


@pytest.mark.parametrize("interval", [0, 1], ids=["activations kept", "activations computed again"])
def test_a_pipeline_computes_what_the_sequential_of_its_layers_does(interval: int) -> None:
    for rank, outcomes in enumerate(run_ranks(2, _sequential_and_pipeline, interval)):
        for loss, loss_by_hand, outputs, outputs_by_hand in outcomes:
            assert loss == pytest.approx(loss_by_hand, rel=1e-5)
            if rank == 1:  # the last stage has the outputs, of the last microbatch
                assert outputs is not None
                torch.testing.assert_close(outputs, outputs_by_hand, rtol=1e-5, atol=1e-6)


# (c) shapes that change


class _Tokens(nn.Module):
    """The same for each token, so that a sequence may be of any length; the last one returns (N, classes, tokens)."""

    def __init__(self, width_in: int, width: int, last: bool = False) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(width_in, width), last

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h).tanh()
        return h.transpose(1, 2) if self.last else h


def _of_many_shapes(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Another number of rows, or of tokens, or both, than in the microbatch before."""
    generator = torch.Generator().manual_seed(seed)
    for rows, length in itertools.cycle([(8, 5), (3, 5), (3, 9), (12, 2), (1, 7), (8, 1), (5, 6)]):
        x = torch.randn(rows, length, FEATURES, generator=generator)
        yield x, x[..., :CLASSES].argmax(-1)


def _dynamic(rank: int, world: int, job: Job, num_batches: int) -> tuple[list[float], float, list[Tensor]]:
    jobs.start()
    torch.manual_seed(0)
    layers: list[nn.Module] = [_Tokens(FEATURES, WIDTH), *(_Tokens(WIDTH, WIDTH) for _ in range(3))]
    engine = _engine([*layers, _Tokens(WIDTH, CLASSES, last=True)], job, dynamic_shape=True)
    data = _of_many_shapes(1 + engine.grid.data_parallel_id)
    losses = jobs.train(engine, num_batches, data)
    ends = engine.is_first_stage() or engine.is_last_stage()
    held_out = float(engine.eval_batch(_of_many_shapes(99) if ends else None))
    losses += jobs.train(engine, 2, data)
    # so that a stage which came to its end says more than one that was killed
    torch.distributed.barrier()
    return losses, held_out, jobs.weights(engine)


SHAPES = pytest.mark.parametrize("num_stages, world", [(2, 2), (2, 4), (4, 4)])


@SHAPES
def test_shapes_that_change_in_each_microbatch_as_in_plain(num_stages: int, world: int) -> None:
    job = Job(num_stages, 0, 3, options=SGD)
    plain = run_ranks(world, _dynamic, job, 6)
    restoring = run_ranks(world, _dynamic, replace(job, block=RESTORING), 6)
    for one, other in zip(plain, restoring, strict=True):
        assert one[:2] == other[:2], "losses, evaluation"
        assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))
    assert len(set(plain[-1][0])) == 8, "no two losses of different data are equal"


@SHAPES
def test_shapes_that_change_train_under_synthetic(num_stages: int, world: int) -> None:
    job = Job(num_stages, 0, 3, {"policy": "synthetic"}, SGD)
    outcomes = run_ranks(world, _dynamic, job, 20)
    assert len(outcomes) == world
    for rank, (losses, held_out, weights) in enumerate(outcomes):
        # a stage before the last hears of a loss some batches later, and says nan until then
        is_last = rank // (world // num_stages) == num_stages - 1
        known = losses if is_last else losses[-5:]
        assert len(losses) == 22 and all(loss == loss and abs(loss) < 1e3 for loss in [*known, held_out]), losses
        assert all(bool(weight.isfinite().all()) for weight in weights)
