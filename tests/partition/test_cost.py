"""Costs of layers: times against sleeps, bytes and operations against known ones, and a model left as it was."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dnipipe.partition import LayerCost, each_layer, measure_layers, split_sequential, stage_costs

SLEEP_MS = 20
BATCH = 6


class _SlowGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, h, backward_ms):
        context.backward_ms = backward_ms
        return h.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(context.backward_ms / 1e3)
        return gradient, None


class Sleep(nn.Module):
    def __init__(self, forward_ms=0, backward_ms=0):
        super().__init__()
        self.forward_ms, self.backward_ms = forward_ms, backward_ms

    def forward(self, h):
        time.sleep(self.forward_ms / 1e3)
        return _SlowGradient.apply(h, self.backward_ms)


class Square(nn.Module):
    """Keeps its input twice, in one storage."""

    def forward(self, h):
        return h * h


class Masked(nn.Module):
    """Keeps a buffer, which is there anyway."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(BATCH, 4))

    def forward(self, h):
        return h * self.mask


def _measured(*layers, microbatch=None, loss=torch.sum, repeats=1):
    microbatch = torch.randn(BATCH, 4) if microbatch is None else microbatch
    return measure_layers(nn.Sequential(*layers), microbatch, loss, repeats=repeats)


def test_each_layer_is_timed_by_itself_there_and_back():
    model = (nn.Linear(4, 4), Sleep(forward_ms=SLEEP_MS), nn.Linear(4, 4), Sleep(backward_ms=SLEEP_MS), nn.Linear(4, 4))
    costs = _measured(*model, repeats=5)
    assert [cost.forward_ms >= SLEEP_MS for cost in costs] == [False, True, False, False, False]
    assert [cost.backward_ms >= SLEEP_MS for cost in costs] == [False, False, False, True, False]
    assert all(cost.forward_ms > 0 and cost.backward_ms > 0 for cost in costs)
    assert costs[1].total_ms == costs[1].forward_ms + costs[1].backward_ms
    assert [cost.name for cost in costs] == ["0 Linear", "1 Sleep", "2 Linear", "3 Sleep", "4 Linear"]


def test_the_loss_counts_to_the_last_layer():
    slow = Sleep(SLEEP_MS, SLEEP_MS)
    first, last = _measured(nn.Linear(4, 4), nn.Linear(4, 2), loss=lambda h: slow(h).square().sum(), repeats=3)
    assert min(last.forward_ms, last.backward_ms) >= SLEEP_MS > max(first.forward_ms, first.backward_ms)
    assert last.saved_bytes == first.saved_bytes + BATCH * 2 * 4, "its own input, and what the square keeps"
    assert last.output_bytes == BATCH * 2 * 4, "of the layer, not of the loss"


def test_the_median_of_the_repeats_counts_without_the_warm_up(monkeypatch):
    sleeps = iter([50, 2])  # the warm-up comes first
    monkeypatch.setattr(Sleep, "forward", lambda self, h: time.sleep(next(sleeps) / 1e3) or h * 1)
    (cost,) = _measured(Sleep())
    assert 2 <= cost.forward_ms < 40
    sleeps = iter([2, 80, 30, 2])
    (cost,) = _measured(Sleep(), repeats=3)
    assert 30 <= cost.forward_ms < 80


@pytest.mark.parametrize(
    "layer, floats",
    [
        (nn.Linear(4, 7), 4),  # its input; the weight is a parameter
        (nn.ReLU(), 4),  # its output
        (nn.ReLU(inplace=True), 4),
        (nn.Tanh(), 4),
        (nn.Sequential(nn.Linear(4, 7), nn.ReLU()), 4 + 7),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 7)), 4),  # the ReLU's output is the linear layer's input
        (Square(), 4),
        (Masked(), 0),
        (nn.Identity(), 0),
        (nn.Flatten(), 0),
    ],
    ids=str,
)
def test_what_a_layer_keeps_is_counted_to_the_byte(layer, floats):
    costs = _measured(nn.Linear(4, 4), layer, nn.Identity())
    assert costs[1].saved_bytes == BATCH * floats * 4


class Attention(nn.Module):
    """Two linear layers around causal attention; keys and values may have fewer heads than queries."""

    def __init__(self, width, heads, key_heads):
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.enter = nn.Linear(width, width * (heads + 2 * key_heads) // heads)
        self.leave = nn.Linear(width, width)

    def forward(self, h):
        together = self.enter(h).unflatten(-1, (self.heads + 2 * self.key_heads, -1)).transpose(1, 2)
        query, key, value = together.split((self.heads, self.key_heads, self.key_heads), dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.leave(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_the_operations_of_attention_count_in_full(dtype, key_heads, needs_gradient):
    sequences, length, width, heads = 2, 16, 32, 4
    layer = Attention(width, heads, key_heads).to(dtype).requires_grad_(needs_gradient)
    (cost,) = _measured(layer, microbatch=torch.randn(sequences, length, width, dtype=dtype))
    enter = 2 * sequences * length * width * (width + 2 * key_heads * width // heads)
    leave = 2 * sequences * length * width * width
    attend = 2 * 2 * sequences * heads * length * length * (width // heads)  # with the keys, then with the values
    assert cost.forward_flops == enter + attend + leave


def test_the_operations_of_a_linear_layer_are_its_multiply_adds_twice_and_the_loss_has_none():
    more = nn.Linear(7, 50)
    first, second, last = _measured(
        nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 7, bias=False), loss=lambda h: more(h).sum()
    )
    assert (first.forward_flops, second.forward_flops, last.forward_flops) == (2 * BATCH * 4 * 7, 0, 2 * BATCH * 7 * 7)


def test_parameters_and_outputs_are_counted_in_their_own_types():
    layers = (nn.Embedding(5, 4), nn.Linear(4, 7), nn.Linear(7, 3, bias=False, dtype=torch.float64))
    model = nn.Sequential(*layers[:2], Double(), layers[2])
    tokens = torch.randint(5, (BATCH,))
    costs = measure_layers(model, tokens, torch.sum, repeats=1)
    assert [cost.parameter_bytes for cost in costs] == [5 * 4 * 4, (4 * 7 + 7) * 4, 0, 7 * 3 * 8]
    assert [cost.output_bytes for cost in costs] == [BATCH * 4 * 4, BATCH * 7 * 4, BATCH * 7 * 8, BATCH * 3 * 8]
    assert costs[0].saved_bytes == BATCH * 8, "the tokens"


class Double(nn.Module):
    def forward(self, h):
        return h.double()


def test_only_what_would_need_a_gradient_in_the_whole_model_has_one():
    frozen, first = nn.Linear(4, 4).requires_grad_(False), nn.ReLU()
    costs = _measured(first, frozen, nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    assert [cost.backward_ms == 0 for cost in costs] == [True, True, True, False, False]
    assert [cost.saved_bytes for cost in costs] == [0, 0, 0, BATCH * 16, BATCH * 16]
    assert _measured(first, microbatch=torch.randn(BATCH, 4, requires_grad=True))[0].saved_bytes == BATCH * 16


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_numbers_stay_as_they_were(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 2))
    model.train(training)
    model[0].weight.grad = torch.ones(4, 4)
    microbatch = torch.randn(BATCH, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given, random_numbers = microbatch.clone(), torch.get_rng_state()
    with torch.no_grad():
        costs = measure_layers(model, microbatch, torch.sum)
        assert not torch.is_grad_enabled() and costs[0].backward_ms > 0
    assert torch.equal(torch.get_rng_state(), random_numbers) and torch.equal(microbatch, given)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name != "0.weight")


def test_the_outputs_are_the_models():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    microbatch = torch.randn(BATCH, 4)
    costs, outputs = zip(*each_layer(model, microbatch, torch.sum, repeats=2), strict=True)
    assert [cost.name for cost in costs] == ["0 Linear", "1 Tanh", "2 Linear"]
    assert all(torch.equal(output, model[: k + 1](microbatch)) for k, output in enumerate(outputs))
    assert all(output.is_leaf for output in outputs)


def test_a_layer_that_stands_twice_in_the_row_is_measured_twice():
    relu = nn.ReLU()
    assert [cost.name for cost in _measured(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)][1::2] == ["1 ReLU", "3 ReLU"]


def _cost(name, unit):
    return LayerCost(f"{name}", 1.0 * unit, 2.0 * unit, 3 * unit, 4 * unit, 5 * unit, 6 * unit)


def test_a_stage_costs_what_its_layers_cost_and_hands_on_what_its_last_one_does():
    layers = [_cost("a", 1), _cost("b", 10), _cost("c", 100)]
    assert stage_costs(layers, [1, 2]) == [layers[0], LayerCost("b to c", 110.0, 220.0, 330, 440, 500, 660)]
    assert stage_costs(layers, [3]) == [LayerCost("a to c", 111.0, 222.0, 333, 444, 500, 666)]


def test_the_stages_are_those_of_the_split():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 90), nn.ReLU(), nn.Linear(90, 2))
    stages = split_sequential(model, 3)
    costs = stage_costs(
        measure_layers(model, torch.randn(BATCH, 4), torch.sum, repeats=1), [len(stage) for stage in stages]
    )
    bytes_of = [sum(parameter.nbytes for parameter in stage.parameters()) for stage in stages]
    assert [cost.parameter_bytes for cost in costs] == bytes_of


@pytest.mark.parametrize("lengths", [[2], [1, 1, 2], [3, 0], [], [4, -1]])
def test_lengths_that_are_no_cut_are_refused(lengths):
    with pytest.raises(ValueError, match="stages of at least 1 layer, 3 layers together"):
        stage_costs([_cost(name, 1) for name in "abc"], lengths)


def test_nothing_to_repeat_is_refused():
    with pytest.raises(ValueError, match="repeats = 0: each layer is timed at least once"):
        _measured(nn.ReLU(), repeats=0)


def test_a_model_that_is_no_row_is_refused():
    with pytest.raises(TypeError, match="got Linear: make it one"):
        measure_layers(nn.Linear(4, 4), torch.randn(BATCH, 4), torch.sum)


@pytest.mark.parametrize(
    "layer, microbatch, found",
    [
        (nn.Linear(3, 3), torch.ones(BATCH, 4), r"Linear cannot be measured on a torch.float32 of shape \(6, 4\): mat"),
        (nn.Embedding(3, 3), torch.full((BATCH,), 3), r"Embedding .* torch.int64 of shape \(6,\): index out of range"),
        (nn.LSTM(4, 4), torch.ones(BATCH, 4), "LSTM .*: it returned a tuple, and a layer must return one tensor"),
    ],
    ids=["shape", "index", "tuple"],
)
def test_a_layer_that_fails_is_named(layer, microbatch, found):
    with pytest.raises(ValueError, match="layer 1 " + found):
        _measured(nn.Identity(), layer, microbatch=microbatch)
