"""in_flight="auto": what a microbatch and the transfers take here, measured once, before the first training step.

Numbers may depend on what is chosen, and on nothing else of it: weights, gradients, buffers and random numbers are left
as they are, and the choice is the same on every stage and replica.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from ..partition.cost import timed
from ..plan.dial import Dial, choose_in_flight
from . import torch_names
from .flow import Flow
from .ledger import NEWS_SIZE, Downward, Upward, empty

REPEATS = 5
WARM_UPS = 2


def measure_in_flight(
    stage: Any,
    flow: Flow,
    needs_grad: Sequence[bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    replicas: Sequence[dist.ProcessGroup],
) -> tuple[tuple[int, ...], str]:
    """(microbatches in flight on each stage but the last, why). Every rank must call it at the same time.

    Args:   needs_grad: of each output. args, kwargs: of one microbatch. replicas: groups of the stage's copies.
    Raises: ValueError, on every rank alike, where a stage cannot run a microbatch of zeros.
    """
    transfer_ms = _transfer_ms(stage, flow, needs_grad)
    microbatch_ms, failed = 0.0, ""
    try:
        microbatch_ms = _microbatch_ms(stage, args, kwargs)
    except Exception as error:  # others wait for what this stage has to tell
        failed = f"stage {stage.stage_index}: {type(error).__name__}: {error}"
    told: list[Any] = [None] * stage.num_stages
    dist.all_gather_object(told, (stage.stage_index, microbatch_ms, transfer_ms, failed), stage.group)
    _, microbatches, transfers, failures = zip(*sorted(told), strict=True)
    failure = next(filter(None, failures), "")
    dial = None if failure else choose_in_flight(max(microbatches), transfers[:-1])
    held = () if dial is None else dial.in_flight
    for group in replicas:  # where copies measure different times all hold what the slowest links need
        of_copies: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_copies, (failure, held), group)
        failure = next((each for each, _ in of_copies if each), "")
        held = () if failure else tuple(map(max, zip(*(each for _, each in of_copies), strict=True)))
    if dial is None or failure:  # only now, so that no copy of the pipeline waits for one that has raised
        raise ValueError(
            f"in_flight='auto' times a microbatch, with zeros where activations will be, and that failed on {failure}; "
            f"give numbers in its place"
        )
    return held, _why(dial, held, max(microbatches), transfers[:-1])


def _why(dial: Dial, held: Sequence[int], microbatch_ms: float, transfers_ms: Sequence[float]) -> str:
    num_stages = len(held) + 1
    listed = ", ".join(f"{each:.3g}" for each in transfers_ms) or "0"
    return (
        f"in flight by stage {', '.join(map(str, (*held, 1)))}: a microbatch takes {microbatch_ms:.3g} ms on the "
        f"slowest stage, a transfer both ways {listed} ms by boundary; utilisation by the planner "
        f"{dial.utilisation:.1%}, and {dial.most:.1%} with {2 * num_stages - 1} on the first stage, the most"
    )


def _microbatch_ms(stage: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Forward and backward, without the loss."""
    module = stage.submod.module if isinstance(stage.submod, DistributedDataParallel) else stage.submod
    device = torch.device(stage.device)

    def once() -> None:
        inputs = args if stage.is_first else _received(stage, device)
        outputs = [each for each in tree_leaves(module(*inputs, **kwargs)) if isinstance(each, Tensor)]
        outputs = [each for each in outputs if each.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])

    with _as_it_was(module, device):
        return _median_ms(once, device)


def _received(stage: Any, device: torch.device) -> list[Tensor]:
    """Zeros in place of what the previous stage sends: any layer takes them."""
    metas = zip(torch_names.input_metas(stage), torch_names.inputs_needing_grad(stage), strict=True)
    return [torch.zeros(shape, dtype=dtype, device=device, requires_grad=needs) for (shape, dtype), needs in metas]


@contextmanager
def _as_it_was(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, a module may be run and trained for a try: what that leaves in it is undone."""
    grads = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for parameter, _ in grads:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _transfer_ms(stage: Any, flow: Flow, needs_grad: Sequence[bool]) -> float:
    """Of an activation down and a gradient up, over the boundary below; 0 on the last stage."""
    sides = [(flow.up, torch_names.inputs_needing_grad(stage)), (flow.down, needs_grad)]
    # even stages meet the next one first, odd ones the one before
    measured = [
        _side_ms(side, needing, flow.device) if side is not None else 0.0
        for side, needing in (sides if stage.stage_index % 2 else reversed(sides))
    ]
    return measured[1] if stage.stage_index % 2 else measured[0]


def _side_ms(side: Upward | Downward, needs_grad: Sequence[bool], device: torch.device) -> float:
    down = empty(side.metas, device)
    needing = zip(down, needs_grad, strict=False)  # a relayed label comes after the activations
    up = [torch.zeros_like(each) for each, needs in needing if needs]
    up.append(torch.zeros(NEWS_SIZE, dtype=torch.float64, device=device))
    send, receive = (down, up) if isinstance(side, Downward) else (up, down)
    boundary, waited_s = side.boundary, side.boundary.wait_s

    def once() -> None:
        boundary.exchange(send, receive, microbatch=0).wait()
        boundary.confirm()

    found_ms = _median_ms(once, device)
    boundary.wait_s = waited_s
    return found_ms


def _median_ms(work: Callable[[], None], device: torch.device) -> float:
    for _ in range(WARM_UPS):
        work()
    return median(timed(work, device)[0] for _ in range(REPEATS))
