"""What a policy costs in time: the planner's step, with the predictor and the second backward that its run needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from fractions import Fraction

import torch

from benchmarks.grouped import groups
from benchmarks.policy_run import Size, Spec, cut_model, make_learner
from dnipipe.plan import Times
from dnipipe.plan.theory import flushing_bubble, stale_step_ms, synthetic_step_ms

FORWARD, BACKWARD = 1, 2  # of a microbatch, in thirds of a slot
ROUNDS = 7


def mean_utilisation(spec: Spec, steps: int, transfer: float, interface_share: float) -> float:
    """Of a run: work over time, the synchronous part at 1F1B's utilisation included.

    Args: transfer: one message between neighbours, in slots (forward and backward of a microbatch). interface_share:
          predict and learn, in slots.
    """
    sync = steps if spec.policy == "wait" else min(spec.unlock_after_steps, steps)
    bubble = float(flushing_bubble(spec.stages, spec.microbatches))
    spent = sync / (1 - bubble)
    for name, count in _phases(spec, steps - sync):
        spent += count / _unlocked(name, spec, transfer, interface_share)
    return steps / spent


def _phases(spec: Spec, steps: int) -> list[tuple[str, int]]:
    if spec.before is None:
        return [(spec.policy, steps)]
    first = min(steps, max(0, spec.switch_step - spec.unlock_after_steps))
    return [(spec.before, first), (spec.policy, steps - first)]


def _unlocked(name: str, spec: Spec, transfer: float, interface_share: float) -> float:
    """The utilisation of the steady state, of the dearest stage: the first, which has most late microbatches."""
    if name == "wait":
        return 1.0
    own, second = interface_share if name != "stale" else 0.0, 0.0
    if name == "corrected":
        last = max(spec.unlock_after_steps, spec.switch_step)
        of_step = groups(spec.phases, spec.stages, spec.microbatches, step=last)
        late = sum(group.count for group in of_step if group.late[0])
        second = late / spec.microbatches * BACKWARD / (FORWARD + BACKWARD)
    slot = 1 + own + second
    third = round(slot, 6)  # in thirds of a slot of the model alone
    times = Times.ms(third, third, third, round(3 * transfer, 6))
    if name == "synthetic":
        step_ms: Fraction = synthetic_step_ms(spec.stages, spec.microbatches, times, lag=2)
    else:
        step_ms = stale_step_ms(spec.stages, spec.microbatches, times, in_flight=spec.in_flight)
    return 3 * spec.microbatches / float(step_ms)


def measure_interface_share(spec: Spec, size: Size) -> float | None:
    """Predict and learn of one microbatch by forward and backward of a middle stage; nothing may run beside it."""
    learner = make_learner(spec.interface, size, spec.microbatches)
    if learner is None:
        return None
    stage = cut_model(size, spec.stages, spec.seed)[0][1:]  # its blocks, without the embedding
    rows = size.batch_size // spec.microbatches
    shape = (rows, size.seq_len, size.width)
    h = torch.randn(shape, device=size.device, dtype=size.dtype, requires_grad=True)
    label = torch.randint(0, 256, shape[:2], device=size.device)
    grad = torch.randn_like(h)

    def work() -> None:
        stage(h).backward(grad)

    def interface() -> None:
        learner.predict([h.detach()], label)
        learner.learn([h.detach()], label, [grad])

    seconds = {body: [_seconds(body, size.device) for _ in range(ROUNDS)] for body in (work, interface)}
    return statistics.median(seconds[interface]) / statistics.median(seconds[work])


def _seconds(body: Callable[[], None], device: str) -> float:
    body()
    if device != "cpu":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    for _ in range(5):
        body()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s
