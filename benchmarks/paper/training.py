"""One stack under way: chunks of steps up to the next evaluation, its curves, its checkpoint, its rows."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import card, commit

from .batches import Batches, Images
from .captured import Steps, largest_divisor
from .job import Job
from .models import Model
from .order import Order
from .rows import PaperRow
from .unlocked_stack import stack_of

EVALUATED_AT_ONCE = {"fcn": 36_000, "cnn": 4_000}  # images times models, for memory's sake
STEPS_OF_A_CALL = 16  # captured together, at most
CALLS_UNDER_WAY = 2  # so that the device never waits for the next one


class Training:
    """A stack, on a stream of its own; goes on from its checkpoint, if there is one of the very same job.

    Usage:   advance(), time and again, which on a GPU waits for nothing; when is_ready, look(), which evaluates, and
             go_on(); until is_done.
    Fields:  step: steps made, or under way. seconds: kept by the caller.
    """

    def __init__(self, order: Order, job: Job, images: Images, stream: torch.cuda.Stream | None = None) -> None:
        assert job.recipe is not None
        self.order, self.job, self.images, self.recipe = order, job, images, job.recipe
        self.checkpoint = order.json.parent / f"{order.json.stem}_{job.dataset}_{job.network}_{job.name}.pt"
        self.step, self.seconds, self.saved_at = 0, 0.0, time.monotonic()
        self.rates_left = 1.0
        self.curves: list[list[list[float]]] = [[] for _ in job.models]
        self.chances = torch.tensor([[model.p_update] for model in job.models])
        self.stream = stream
        self.under_way: deque[torch.cuda.Event] = deque()
        with self._on_stream():
            self.stack = stack_of(job.shape(images.shape, images.num_classes), job.models, order.device)
            batches = Batches(images, [model.seed for model in job.models], self.recipe.batch)
            self._load()
            count = largest_divisor(self.recipe.evaluate_every, STEPS_OF_A_CALL)
            self.steps = Steps(self.stack, batches, self._draw, count, capture=stream is not None)
            self.single = Steps(self.stack, batches, self._draw, 1, capture=False)
        self.go_on()

    @property
    def is_done(self) -> bool:
        return self.step == self.recipe.steps

    @property
    def is_ready(self) -> bool:
        """Whether all steps up to the next evaluation have been made."""
        return self.step == self.until and self._count_under_way() == 0

    def go_on(self) -> None:
        """The steps up to the next evaluation are to be made."""
        self.until = min(self.recipe.steps, self.step + self.recipe.evaluate_every)

    def advance(self) -> bool:
        """Starts some steps, unless there are none to make or enough under way; says whether it has.

        So several trainings take turns, and none fills the device's queue with its own.
        """
        if self.step == self.until or self._count_under_way() >= CALLS_UNDER_WAY:
            return False
        with self._on_stream():
            steps = self.steps if self.until - self.step >= self.steps.count else self.single
            self._anneal()
            steps(self.step)
            self.step += steps.count
            if self.stream is not None:
                self.under_way.append(self.stream.record_event())
        return True

    def _count_under_way(self) -> int:
        while self.under_way and self.under_way[0].query():
            self.under_way.popleft()
        return len(self.under_way)

    def _anneal(self) -> None:
        left = self.recipe.rates_left(self.step)
        if left != self.rates_left:
            self.stack.scale_rates(left)
            self.rates_left = left

    def look(self) -> None:
        """Evaluates all models on the test set, unless that has been done at this step."""
        if self.curves[0] and self.curves[0][-1][0] == self.step:
            return
        with self._on_stream():
            errors = self._errors(*self.images.test)
            agreements = self._agreements()
        for curve, error, found in zip(self.curves, errors, agreements, strict=True):
            curve.append([self.step, error, *found])
        of_each = " ".join(f"{model.method} {e:.2f}" for model, e in zip(self.job.models, errors, strict=True))
        what = f"{self.job.dataset} {self.job.network} {self.job.name}: step {self.step}, {self.seconds:.0f} s"
        print(f"{what}, test error % {of_each}"[:200], flush=True)

    def rows(self) -> list[PaperRow]:
        """Of each model, after the last step."""
        with self._on_stream():
            held_out = self._errors(*self.images.held_out)
        return [self._row(*each) for each in zip(self.job.models, held_out, self.curves, strict=True)]

    def save_if_due(self) -> None:
        if time.monotonic() - self.saved_at >= self.order.save_every_s:
            self.save()

    def save(self) -> None:
        """All at once: who is cut off leaves the old checkpoint or the new one."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with self._on_stream():
            state = [each.detach() for each in self.stack.state()]
            facts = {"step": self.step, "seconds": self.seconds, "curves": self.curves, "of": repr(self.job)}
            torch.save({"state": state, **facts}, f"{self.checkpoint}.part")
        Path(f"{self.checkpoint}.part").replace(self.checkpoint)
        self.saved_at = time.monotonic()

    def _load(self) -> None:
        if not self.checkpoint.exists():
            return
        saved = torch.load(self.checkpoint, map_location=self.order.device, weights_only=True)
        if saved["of"] == repr(self.job):  # another number of steps or another recipe is another training
            self.stack.load(saved["state"])
            self.step, self.seconds, self.curves = saved["step"], saved["seconds"], saved["curves"]

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _draw(self, step: int) -> tuple[Tensor, ...]:
        """Which layers are updated and in which order, drawn anew at each step; nothing if all always are."""
        if not self.stack.is_sparse:
            return ()
        random = torch.Generator().manual_seed(step)
        size = len(self.job.models), self.job.layers
        fires = torch.rand(size, generator=random) < self.chances
        return fires.float(), torch.rand(size, generator=random)

    def _errors(self, images: Tensor, labels: Tensor) -> list[float]:
        """Percent of wrong answers of each model; waits for it."""
        wrong = torch.zeros(len(self.job.models), device=labels.device)
        at_once = max(1, EVALUATED_AT_ONCE[self.job.network] // len(self.job.models))
        for start in range(0, len(labels), at_once):
            part = slice(start, start + at_once)
            logits = self.stack.evaluate(self.images.prepared(images[part]))
            wrong += (logits.argmax(1) != labels[part]).sum(1)
        return (100 * wrong / len(labels)).tolist()

    def _agreements(self) -> list[list[float]]:
        """Of models with an interface at one place only: how near its prediction was at the last step."""
        found: list[list[float]] = [[] for _ in self.job.models]
        for cut, (synthetic, true) in zip(reversed(range(1, self.job.layers)), self.stack.seen, strict=False):
            if synthetic is None or all(model.position != cut for model in self.job.models):
                continue
            figures = agreement(synthetic, true).tolist()
            for number, model in enumerate(self.job.models):
                if model.position == cut:
                    found[number] = figures[number]
        return found

    def _row(self, model: Model, held_out: float, curve: list[list[float]]) -> PaperRow:
        return PaperRow(
            experiment=self.order.experiment,
            dataset=self.job.dataset,
            model=self.job.network,
            layers=self.job.layers,
            method=model.method,
            position=model.position,
            p_update=model.p_update,
            decay=model.decay,
            predictor=self.job.predictor_of(model),
            recipe=self.recipe.name,
            seed=model.seed,
            steps=self.recipe.steps,
            batch=self.recipe.batch,
            learning_rate=model.learning_rate,
            test_error_percent=curve[-1][1],
            held_out_error_percent=held_out,
            device=card(torch.device(self.order.device)),
            commit=_commit(),
            seconds_of_stack=self.seconds,
            models_of_stack=len(self.job.models),
            synthetic_inputs=model.synthetic_inputs,
            predictor_rate=None if self.job.predictor_of(model) is None else model.predictor_rate,
            last_rate=model.last_rate,
            curve=curve,
        )


@contextmanager
def fast_products() -> Iterator[None]:
    """On a GPU products of float32 matrices by tensor cores, in TF32; convolutions by the fastest way, tried out."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


def agreement(synthetic: Tensor, true: Tensor) -> Tensor:
    """L2 distance, mean over the batch; cosine of the whole batch; share of wrong signs: (E, D, B) -> (E, 3).

    The cosine is one over all examples, because most of them are right soon and have next to no gradient: theirs would
    drown the few that the layers below learn from.
    """
    distance = (synthetic - true).norm(dim=1).mean(-1)
    cosine = torch.cosine_similarity(synthetic.flatten(1), true.flatten(1), dim=1, eps=1e-30)
    wrong = (synthetic.sign() != true.sign()).float().mean((1, 2))
    return torch.stack([distance, cosine, wrong], 1)


@functools.cache
def _commit() -> str:
    """That of the start: the code that runs."""
    return commit()
