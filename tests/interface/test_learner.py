"""The learner against loops written by hand, alone and as two replicas."""

import copy
import io
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from dnipipe.interface import MLP, Custom, Interface, Learner, Linear, LocalHead

CLASSES = 5
SHAPES = ((6, 8), (6, 3, 4), (6, 3, 4))


def interfaces(seed: int = 0) -> list[Interface]:
    torch.manual_seed(seed)
    return [MLP(8, CLASSES), Linear(4), LocalHead(4, CLASSES)]


def microbatch(seed: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    hs = [torch.randn(shape, generator=generator) for shape in SHAPES]
    true_grads = [0.1 * torch.randn(shape, generator=generator) for shape in SHAPES]
    return hs, torch.randint(CLASSES, (6,), generator=generator), true_grads


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def adam(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)  # type: ignore[arg-type]


def test_a_learner_is_the_loop_one_would_write_by_hand() -> None:
    learner, by_hand = Learner(interfaces()), nn.ModuleList(interfaces())
    optimizer = torch.optim.Adam([{"params": each.parameters(), "lr": each.learning_rate} for each in by_hand])
    for step, num_microbatches in enumerate((2, 1, 3)):
        for m in range(num_microbatches):
            hs, label, true_grads = microbatch(10 * step + m)
            predicted = learner.predict(hs, label)
            for interface, h, true_grad, synthetic in zip(by_hand, hs, true_grads, predicted, strict=True):
                assert torch.equal(synthetic, interface.synthetic_grad(h, label))
                interface.learn(h, label, true_grad)
            learner.learn(hs, label, true_grads)
        learner.end_step()
        for parameter in by_hand.parameters():
            parameter.grad.div_(num_microbatches)
        optimizer.step()
        optimizer.zero_grad()
        for interface in by_hand:
            interface.end_step(num_microbatches)
        assert_same_bits(learner.interfaces, by_hand)
    assert all(p.grad is None for p in learner.interfaces.parameters())


def test_a_step_that_learned_nothing_does_nothing() -> None:
    def refuse(flat: Tensor) -> None:
        raise AssertionError("nothing to average")

    learner = Learner(interfaces(), average=refuse)
    before = copy.deepcopy(learner.interfaces)
    hs, label, _ = microbatch(0)
    learner.predict(hs, label)
    learner.end_step()
    assert_same_bits(learner.interfaces, before)


class Replicas:
    """Two learners that end their steps together: average() is the mean over both, as an all-reduce would give it."""

    def __init__(self) -> None:
        self.flats: list[Tensor | None] = [None, None]
        self.barrier = threading.Barrier(2, timeout=10)
        self.calls = [0, 0]

    def average(self, rank: int) -> Callable[[Tensor], None]:
        def averaged(flat: Tensor) -> None:
            assert flat.ndim == 1 and flat.dtype == torch.float32
            self.calls[rank] += 1
            self.flats[rank] = flat.clone()
            self.barrier.wait()
            first, second = self.flats
            assert first is not None and second is not None
            flat.copy_((first + second) / 2)
            self.barrier.wait()

        return averaged


@pytest.mark.parametrize("second_learns", [2, 1], ids=["as many", "fewer"])
def test_two_replicas_learn_like_one_learner_fed_with_both(second_learns: int) -> None:
    replicas = Replicas()
    learners = [Learner(interfaces(), adam, average=replicas.average(rank)) for rank in range(2)]
    whole = Learner(interfaces(), adam)
    with ThreadPoolExecutor(2) as pool:
        for step in range(3):
            for rank, learner in enumerate(learners):
                for m in range(2 if rank == 0 else second_learns):
                    learner.learn(*microbatch(10 * step + 2 * rank + m))
                    whole.learn(*microbatch(10 * step + 2 * rank + m))
            whole.end_step()
            list(pool.map(lambda learner: learner.end_step(), learners))
    assert replicas.calls == [3, 3]
    assert_same_bits(learners[0].interfaces, learners[1].interfaces)
    for value, expected in zip(
        learners[0].interfaces.state_dict().values(), whole.interfaces.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected)
    assert whole.interfaces[0].rms > 0


class Chosen(nn.Module):
    """Uses one of two layers, so the other has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
        return self.used(h)


def test_the_flat_tensor_has_zeros_for_parameters_without_a_gradient() -> None:
    flats: list[Tensor] = []
    learner = Learner([Custom(Chosen())], adam, average=lambda flat: flats.append(flat.clone()))
    for h, true_grad in ((torch.ones(2, 4), torch.ones(2, 4)), (torch.ones(2, 4), 2 * torch.ones(2, 4))):
        learner.learn([h], None, [true_grad])
    gradient = learner.interfaces[0].module.used.bias.grad.clone()
    learner.end_step()
    (flat,) = flats
    weights, bias, unused, square_sum, count, num_learned = flat.split([16, 4, 20, 1, 1, 1])
    assert torch.equal(bias, gradient) and torch.equal(unused, torch.zeros(20))
    assert (square_sum.item(), count.item(), num_learned.item()) == (8 + 32, 16, 2)


class Copy(Interface):
    """An interface without parameters."""

    def synthetic_grad(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        return self.checked(2 * h, h)

    def learn(self, h: Tensor, label: Tensor | None, true_grad: Tensor) -> Tensor:
        return self.synthetic_grad(h, label)


def test_interfaces_without_parameters_need_no_optimizer() -> None:
    flats: list[Tensor] = []
    learner = Learner([Copy()], adam, average=lambda flat: flats.append(flat.clone()))
    learner.learn([torch.ones(2, 3)], None, [torch.ones(2, 3)])
    learner.end_step()
    assert learner.optimizer is None and [flat.tolist() for flat in flats] == [[1.0]]
    restored = Learner([Copy()])
    restored.load_state_dict(learner.state_dict())
    assert restored.metrics() == learner.metrics() == pytest.approx({"cosine": 1.0, "r2": 0.0})


def test_metrics_are_decayed_sums_over_all_outputs() -> None:
    learner = Learner([Copy(), Copy()])
    assert all(math.isnan(value) for value in learner.metrics().values())
    torch.manual_seed(0)
    weighted: list[tuple[float, Tensor, Tensor]] = []
    for step in range(3):
        hs, true_grads = [torch.randn(2, 3), torch.randn(4)], [torch.randn(2, 3), torch.randn(4)]
        learner.learn(hs, None, true_grads)
        learner.end_step()
        weight = 0.9 ** (2 - step)
        weighted += [(weight, 2 * h, true_grad) for h, true_grad in zip(hs, true_grads, strict=True)]
    product = sum(w * (s * t).sum().item() for w, s, t in weighted)
    synthetic = sum(w * (s * s).sum().item() for w, s, _ in weighted)
    true = sum(w * (t * t).sum().item() for w, _, t in weighted)
    error = sum(w * (t - s).square().sum().item() for w, s, t in weighted)
    assert learner.metrics()["cosine"] == pytest.approx(product / math.sqrt(synthetic * true), rel=1e-5)
    assert learner.metrics()["r2"] == pytest.approx(1 - error / true, rel=1e-5)


def test_an_untrained_interface_has_metrics_of_zero() -> None:
    learner = Learner([Linear(3)])
    learner.learn([torch.randn(2, 3)], None, [torch.randn(2, 3)])
    assert learner.metrics() == {"cosine": 0.0, "r2": 0.0}


@pytest.mark.parametrize("through_a_file", [True, False], ids=["file", "memory"])
def test_a_restored_learner_goes_on_bit_for_bit(through_a_file: bool) -> None:
    first, second = Learner(interfaces(), adam), Learner(interfaces(seed=9), adam)
    for step in range(2):
        first.learn(*microbatch(step))
        first.end_step()
    state = first.state_dict()
    if through_a_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second.load_state_dict(state)
    metrics = []
    for learner in (first, second):  # one after the other: what both shared by mistake would be stepped twice
        for step in range(2, 4):
            learner.learn(*microbatch(step))
            learner.end_step()
        metrics.append(learner.metrics())
    assert_same_bits(first.interfaces, second.interfaces)
    assert metrics[0] == metrics[1]


def test_states_are_taken_between_steps_only() -> None:
    learner = Learner(interfaces())
    state = learner.state_dict()
    learner.learn(*microbatch(0))
    with pytest.raises(AssertionError, match="between steps only: 1 microbatches"):
        learner.state_dict()
    with pytest.raises(AssertionError, match="between steps only: 1 microbatches"):
        learner.load_state_dict(state)


def test_another_number_of_outputs_is_refused() -> None:
    learner = Learner(interfaces())
    hs, label, true_grads = microbatch(0)
    with pytest.raises(ValueError) as predicting:
        learner.predict(hs[:2], label)
    with pytest.raises(ValueError) as learning:
        learner.learn(hs[:2], label, true_grads[:2])
    assert str(predicting.value) == str(learning.value) == "2 outputs for 3 interfaces: each output needs exactly one"


def test_frozen_parameters_stay_as_they_are() -> None:
    interface = Linear(4)
    interface.out.linear.bias.requires_grad_(False)
    flats: list[Tensor] = []
    learner = Learner([interface], adam, average=lambda flat: flats.append(flat))
    learner.learn([torch.ones(2, 4)], None, [torch.ones(2, 4)])
    learner.end_step()
    assert flats[0].numel() == 16 + 3, "weights, two statistics and the count"
    assert interface.out.linear.bias.abs().max() == 0 and interface.out.linear.weight.abs().max() > 0
