"""How often an interface reads or writes an activation: beside its matrix products, that is what it costs on a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnipipe.interface import Interface, Learner, Linear, LocalHead, Potential, Scaled, Transformer, precision

CLASSES, D = 7, 16
SHAPE = (6, 5, D)  # no parameter has as many elements

ATEN = torch.ops.aten
MATRIX_PRODUCTS = (ATEN.mm, ATEN.addmm)
NO_TRAFFIC = (ATEN.empty, ATEN.empty_like, ATEN.new_empty_strided)


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write in tensors as large as the activation.

    A tensor counts once for each operation; matrix products, views and what is merely allocated do not count.
    """

    def __init__(self, activation: Tensor) -> None:
        super().__init__()
        self.activation, self.num_bytes, self.log = activation, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket not in (*MATRIX_PRODUCTS, *NO_TRAFFIC):
            only_written = 1 if func.overloadpacket is ATEN.copy_ else 0
            inputs = [value for name, value in (kwargs or {}).items() if name != "out"]
            moved = sum(self._bytes(value) for value in tree_leaves((args[only_written:], inputs, result)))
            self.num_bytes += moved
            self.log += f"{func} {moved / self.activation.nbytes:g}\n" if moved else ""
        return result

    @property
    def passes(self) -> float:
        """In activations, of their dtype."""
        return self.num_bytes / self.activation.nbytes

    def _bytes(self, value: object) -> int:
        if not isinstance(value, Tensor):
            return 0
        # an expanded dimension lies in memory once
        sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
        num_elements = torch.Size(sizes).numel()
        return num_elements * value.element_size() if num_elements == self.activation.numel() else 0


def test_the_counter_counts_reads_and_writes_but_no_views() -> None:
    h = torch.randn(SHAPE, dtype=torch.bfloat16)
    for work, passes in (
        (lambda: h + h.float(), 1 + 2 + 2),  # beside the cast
        (lambda: h.mul_(2.0), 2),
        (lambda: h.sum(), 1),
        (lambda: torch.neg(h, out=torch.empty_like(h)), 2),
        (lambda: torch.empty_like(h).copy_(h), 2),
        (lambda: h.flatten() @ h.flatten().view(-1, 1), 0),
        (lambda: torch.zeros(()).expand(SHAPE).contiguous(), 2),
    ):
        with Traffic(h) as traffic:
            work()
        cast = 3 if "_to_copy" in traffic.log else 0
        assert traffic.passes == passes + cast, traffic.log


TOKENS, SEQUENCE = SHAPE[:2], SHAPE[:1]


@pytest.mark.parametrize(
    "build, label_shape, dtype, predicting, learning",
    [
        (lambda: Linear(D), None, torch.bfloat16, 2, 9),
        (lambda: Linear(D, CLASSES), TOKENS, torch.bfloat16, 10, 22),
        (lambda: Linear(D, CLASSES), SEQUENCE, torch.bfloat16, 4, 12),
        (lambda: Linear(D, CLASSES, normalise=False), TOKENS, torch.bfloat16, 10, 21),
        (lambda: Linear(D, CLASSES), TOKENS, torch.float32, 6, 14),
        (lambda: LocalHead(D, CLASSES), TOKENS, torch.bfloat16, 5, 5),
        (lambda: LocalHead(D, CLASSES), SEQUENCE, torch.bfloat16, 2, 2),
        (lambda: LocalHead(D, CLASSES), TOKENS, torch.float32, 5, 5),
        (lambda: LocalHead(D, CLASSES, rank=4, samples=3), TOKENS, torch.bfloat16, 5, 5),
        (lambda: Scaled(LocalHead(D, CLASSES)), TOKENS, torch.bfloat16, 7, 12),
        (lambda: Transformer(D, CLASSES), TOKENS, torch.bfloat16, 4, 13),
        (lambda: Potential(D, CLASSES), TOKENS, torch.bfloat16, 9, 18),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_predicting_and_learning_pass_over_the_activation_this_often_at_most(
    build: Callable[[], Interface],
    label_shape: tuple[int, ...] | None,
    dtype: torch.dtype,
    predicting: int,
    learning: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "NORMS_IN_FLOAT32", ())  # as on a GPU
    h, true_grad = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    label = None if label_shape is None else torch.randint(CLASSES, label_shape)
    interface = build()
    Learner([interface]).learn([h], label, [true_grad])  # later ones find a .grad, and add to it
    for work, passes in (
        (lambda: interface.synthetic_grad(h, label), predicting),
        (lambda: interface.learn(h, label, true_grad), learning),
    ):
        with Traffic(h) as traffic:
            work()
        assert 0 < traffic.passes <= passes, f"{traffic.passes:g} passes:\n{traffic.log}"


@pytest.mark.parametrize("dtype, passes", [(torch.bfloat16, 6), (torch.float32, 6)], ids=str)
def test_the_metrics_pass_over_the_activation_this_often_at_most(dtype: torch.dtype, passes: int) -> None:
    learner = Learner([Linear(D)])
    h, true_grad = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    with Traffic(h) as alone:
        learner.interfaces[0].learn(h, None, true_grad)
    with Traffic(h) as traffic:
        learner.learn([h], None, [true_grad])
    assert 0 < traffic.passes - alone.passes <= passes, traffic.log
