"""How many steps of a model a second: one model at a time, many in a stack, captured, and stacks side by side.

python -m benchmarks.paper.throughput --quick
python -m benchmarks.paper.throughput --device cuda --network fcn --models 6
python -m benchmarks.paper.throughput --device cuda --network cnn --models 6

Images are made up: speed does not depend on what is in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.machine import card, commit
from dnipipe.data.images import ImageData

from .batches import Batches, Images
from .captured import Steps
from .convolutional_recipe import for_convolutions
from .job import Job
from .models import Model, Shape
from .plain import PlainModel
from .recipe import OURS, QUICK, Recipe
from .stack import Stack
from .training import STEPS_OF_A_CALL, fast_products

IMAGES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
NUM_IMAGES = 10_000
WAYS = ("plain", "alone", "alone, captured", "stacked", "side by side")


@dataclass(frozen=True)
class Speed:
    """A flat JSON object.

    Fields:
        way: plain: torch's modules and optimizer, one model at a time. alone: a stack of one. captured: in a CUDA
            graph. stacked: all in one stack, captured on a GPU. side by side: so many such stacks, each on its stream.
        hidden: of the interfaces, of half DNI and half cDNI; None: backprop alone. steps_per_second: of a model.
        speed_up: over plain.
    """

    way: str
    network: str
    dataset: str
    layers: int
    hidden: int | None
    models: int
    stacks: int
    steps_per_second: float
    speed_up: float
    device: str
    commit: str


@dataclass(frozen=True)
class Case:
    """What is trained."""

    shape: Shape
    recipe: Recipe
    images: Images
    seconds: float

    def models(self, count: int) -> list[Model]:
        """Of one seed: DNI and cDNI in turn, or backprop if there are no interfaces."""
        methods = ("bprop",) if self.shape.num_hidden is None else ("dni", "cdni")
        return [self.recipe.model(methods[number % len(methods)], 0) for number in range(count)]


def steps_per_second(case: Case, way: str, models: int, stacks: int) -> float:
    """Steps of a model, of all models together, warmed up."""
    calls, work = _caller(case, way, models, stacks)
    device = torch.device(case.images.device)
    calls()
    _wait(device)
    count, began = 0, time.monotonic()
    while count < 2 or time.monotonic() - began < case.seconds:
        calls()
        _wait(device)
        count += 1
    return count * work / (time.monotonic() - began)


def _caller(case: Case, way: str, models: int, stacks: int) -> tuple[Callable[[], None], int]:
    """What to call again and again, and how many steps of a model that is."""
    device = case.images.device
    made = case.models(models)
    if way == "plain":
        plain = PlainModel(case.shape, made[-1], device=device)
        batches = Batches(case.images, [0], case.recipe.batch)

        def one_step() -> None:
            x, label = batches.at(0)
            plain.step(x.T if x.ndim == 2 else x.squeeze(1), label)

        return one_step, 1
    is_captured = device.startswith("cuda") and way != "alone"
    count = STEPS_OF_A_CALL if is_captured else 1
    streams = [torch.cuda.Stream() if device.startswith("cuda") else None for _ in range(stacks)]
    runs = []
    for stream in streams:
        with torch.cuda.stream(stream):
            batches = Batches(case.images, [0] * len(made), case.recipe.batch)
            stack = Stack(case.shape, made, device)
            runs.append(Steps(stack, batches, lambda step: (), count, capture=is_captured))

    def one_call() -> None:
        for stream, run in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                run(0)

    return one_call, stacks * count * len(made)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cases(given: argparse.Namespace) -> list[tuple[Case, int | None]]:
    recipe = QUICK if given.quick else OURS
    if given.network == "cnn":
        recipe = for_convolutions(recipe, None, given.filters)
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (NUM_IMAGES, *IMAGES[given.dataset]), generator=random, dtype=torch.uint8)
    labels = torch.randint(10, (NUM_IMAGES,), generator=random)
    data = ImageData(pictures, labels, pictures[:10], labels[:10], num_classes=10)
    images = Images(data, given.device, as_pictures=given.network == "cnn")
    cases = []
    for hidden in (None, *recipe.num_hidden):
        job = Job("", given.layers, hidden, (), recipe, given.dataset, given.network)
        cases.append((Case(job.shape(images.shape, 10), recipe, images, given.seconds), hidden))
    return cases


def table(speeds: Sequence[Speed]) -> str:
    lines = [
        "| network | dataset | layers | interfaces | way | models | stacks | steps of a model / s | times plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in speeds:
        interfaces = "none" if each.hidden is None else f"{each.hidden} hidden"
        what = f"| {each.network} | {each.dataset} | {each.layers} | {interfaces} | {each.way} "
        lines.append(what + f"| {each.models} | {each.stacks} | {each.steps_per_second:.0f} | {each.speed_up:.1f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    given = _read(argv)
    speeds = []
    device, code = card(torch.device(given.device)), commit()
    with fast_products():
        for case, hidden in _cases(given):
            plain = 0.0
            for way in WAYS:
                if not given.device.startswith("cuda") and way in ("alone, captured", "side by side"):
                    continue  # a CPU has neither graphs nor streams
                models = 1 if way in ("plain", "alone", "alone, captured") else given.models
                stacks = given.workers if way == "side by side" else 1
                speed = steps_per_second(case, way, models, stacks)
                plain = plain or speed
                where = given.network, given.dataset, given.layers, hidden
                speeds.append(Speed(way, *where, models, stacks, speed, speed / plain, device, code))
                print(table(speeds[-1:]).splitlines()[-1], flush=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps([asdict(each) for each in speeds], indent=1) + "\n")
    given.json.with_suffix(".md").write_text(table(speeds))
    print(table(speeds))


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.throughput", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the narrow networks of --quick elsewhere")
    parser.add_argument("--network", choices=["fcn", "cnn"], default="fcn")
    parser.add_argument("--dataset", choices=list(IMAGES), default="mnist", help="shape of the images")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--filters", type=int, help="of each convolution; default 64, with --quick 6")
    parser.add_argument("--models", type=int, default=6, help="of a stack")
    parser.add_argument("--workers", type=int, default=3, help="stacks side by side")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("runs/paper/throughput.json"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
