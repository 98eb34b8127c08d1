"""An interface predicts and learns without its host ever waiting for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dnipipe.interface import Learner
from tests.interface.cases import Case, data, every_case, fresh


@contextmanager
def no_look_at_values() -> Iterator[None]:
    """Fails on every operation that would make a GPU's host wait for a value."""
    waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in waits, f"{func} waits for the device"
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


@every_case
def test_nothing_waits_for_the_device(case: Case) -> None:
    h, label, true_grad = data(case)
    # SGD: Adam on a CPU reads its own step counter, which lives on the CPU on every device
    learner = Learner([fresh(case)], lambda parameters: torch.optim.SGD(parameters, lr=0.1), average=lambda flat: None)
    with no_look_at_values():
        for _ in range(2):
            learner.predict([h], label)
            learner.learn([h], label, [true_grad])
            learner.end_step()
        with pytest.raises(AssertionError, match="waits for the device"):
            h.sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_case
def test_nothing_waits_for_a_gpu(case: Case) -> None:
    h, label, true_grad = (None if t is None else t.cuda() for t in data(case, dtype=torch.bfloat16))
    learner = Learner([fresh(case).cuda()], average=lambda flat: None)
    learner.learn([h], label, [true_grad])  # the first call may load kernels and libraries
    learner.predict([h], label)
    learner.end_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            learner.predict([h], label)
            learner.learn([h], label, [true_grad])
            learner.end_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert learner.predict([h], label)[0].isfinite().all()
