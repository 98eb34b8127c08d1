"""Ties across stages become two copies, ties within a stage stay, and names are those of the whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dnipipe.partition import Tie, cut_sequential, decoder_as_sequential, part_ties, shared_names
from tests.partition.test_decoder import options_of


class Twice(nn.Module):
    """Has one weight in two places."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3, bias=False)
        self.inner.weight = weight
        self.scale = weight

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h) @ self.scale


def _model() -> nn.Sequential:
    """0.weight is also in 3 (twice); 1.weight also in 2."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3) for _ in range(3)]
    layers[2].weight = layers[1].weight
    return nn.Sequential(*layers, Twice(layers[0].weight))


def test_the_names_of_further_places_lead_to_the_first() -> None:
    model = _model()
    names = shared_names(model)
    assert names == {"2.weight": "1.weight", "3.scale": "0.weight", "3.inner.weight": "0.weight"}
    listed = {name for name, _ in model.named_parameters()}
    assert listed | names.keys() == set(model.state_dict()) and not listed & names.keys()
    assert set(names.values()) <= listed
    assert all(model.get_parameter(name) is model.get_parameter(first) for name, first in names.items())
    assert shared_names(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == {}


def test_the_later_stage_gets_one_copy_in_all_its_places_and_a_stage_keeps_its_own_ties() -> None:
    model, x = _model(), torch.randn(2, 3)
    expected = model(x)
    first, last = stages = cut_sequential(model, [1, 3])
    weight, inner = first[0].weight, model[1].weight
    assert part_ties(stages) == [Tie(0, "0.weight", 1, "3.scale")]
    assert [name for name, _ in last.named_parameters()] == ["1.weight", "1.bias", "2.bias", "3.scale"]
    assert first[0].weight is weight and last[-1].scale is last[-1].inner.weight
    assert last[-1].scale is not weight and torch.equal(last[-1].scale, weight)
    assert last[-1].scale.data_ptr() != weight.data_ptr()
    assert last[0].weight is last[1].weight is inner
    assert torch.equal(last(first(x)), expected)
    assert part_ties(stages) == [], "nothing is shared any more"


def test_every_tie_is_parted_between_the_two_stages_that_have_it() -> None:
    stages = cut_sequential(_model(), [1, 1, 2])
    assert part_ties(stages) == [Tie(0, "0.weight", 2, "3.scale"), Tie(1, "1.weight", 2, "2.weight")]
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    assert len(parameters) == len(set(parameters)) == 2 + 2 + 3
    assert [set(stage.state_dict()) for stage in stages] == [
        {"0.weight", "0.bias"},
        {"1.weight", "1.bias"},
        {"2.weight", "2.bias", "3.scale", "3.inner.weight"},
    ]


@pytest.mark.parametrize("trained", [True, False])
def test_a_copy_needs_a_gradient_where_the_weight_does(trained: bool) -> None:
    model = _model()
    model[0].weight.requires_grad_(trained)
    stages = cut_sequential(model, [1, 3])
    assert len(part_ties(stages)) == 1
    assert stages[1][-1].scale.requires_grad is trained
    assert isinstance(stages[1][-1].scale, nn.Parameter) and stages[1][-1].scale.is_leaf


def test_a_layer_that_stands_in_two_stages_is_copied_once_into_the_later() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3)
    model = nn.Sequential(layer, nn.Linear(3, 3), layer, nn.Sequential(layer[0], nn.ReLU()))
    expected, weight, middle = model(x), layer[0].weight, model[1]
    first, last = stages = cut_sequential(model, [1, 3])
    assert part_ties(stages) == [Tie(0, "0.0.weight", 1, "2.0.weight"), Tie(0, "0.0.bias", 1, "2.0.bias")]
    assert first[0] is layer and layer[0].weight is weight and last[0] is middle
    assert last[1] is not layer and last[2][0] is last[1][0] and last[1][0].weight is not weight
    assert not set(first.parameters()) & set(last.parameters())
    assert torch.equal(last(first(x)), expected)


def test_a_parameter_of_three_stages_is_refused_by_name_and_nothing_is_changed() -> None:
    model = _model()
    model[1].bias = model[0].weight
    stages = cut_sequential(model, [1, 1, 2])
    with pytest.raises(
        ValueError, match="stages 0, 1, 2 share one parameter, 0.weight, 1.bias, 3.scale: .*untie it, or cut the model"
    ):
        part_ties(stages)
    assert model[3].scale is model[0].weight and model[2].weight is model[1].weight
    stages = cut_sequential(model, [2, 2])
    assert part_ties(stages) == [Tie(0, "0.weight", 1, "3.scale"), Tie(0, "1.weight", 1, "2.weight")]


def test_the_ends_of_a_tied_decoder() -> None:
    row = decoder_as_sequential(options_of("gpt2"))
    assert shared_names(row) == {"5.project.weight": "0.tokens.weight"}
    assert part_ties(cut_sequential(row, [6])) == []
    assert part_ties(cut_sequential(row, [2, 3, 1])) == [Tie(0, "0.tokens.weight", 2, "5.project.weight")]
    assert part_ties(cut_sequential(decoder_as_sequential(options_of("llama")), [3, 3])) == []
