"""Labels as features, against the textbook form: the one-hot label joined to the activation."""

import pytest
import torch
import torch.nn.functional as F

from dnipipe.interface import MLP, Conv, Linear, LocalHead, Transformer
from dnipipe.interface.conditional import ConditionedLinear, LabelEmbedding, one_hot, one_hot_channels


def test_one_hot_agrees_with_torch_and_gives_zeros_without_a_label() -> None:
    label = torch.tensor([2, 0, 4])
    assert torch.equal(one_hot(label, 5), F.one_hot(label, 5).float())
    assert torch.equal(one_hot(torch.tensor([-100, -1]), 5), torch.zeros(2, 5))


def test_one_hot_channels_are_constant_over_the_image() -> None:
    label = torch.tensor([2, -100])
    channels = one_hot_channels(label, 3, 4, 5)
    assert channels.shape == (2, 3, 4, 5)
    assert torch.equal(channels[0, 2], torch.ones(4, 5))
    assert channels[0, :2].abs().sum() == 0 and channels[1].abs().sum() == 0


def test_an_embedding_has_a_row_for_each_class_and_one_for_no_label() -> None:
    embedding = LabelEmbedding(3, 2)
    rows = embedding(torch.tensor([[0, 2], [-100, -1]]))
    assert torch.equal(rows, embedding.weight[torch.tensor([[1, 3], [0, 0]])])


@pytest.mark.parametrize("shape, label_shape", [((6, 4), (6,)), ((6, 3, 4), (6, 3)), ((6, 3, 4), (6,))], ids=str)
def test_a_conditioned_linear_layer_is_a_linear_layer_of_the_joined_one_hot(
    shape: tuple[int, ...], label_shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = ConditionedLinear(4, 7, 5, name="Linear")
    h, label = torch.randn(shape), torch.randint(5, label_shape)
    spread = label if label.ndim == h.ndim - 1 else label[:, None].expand(6, 3)
    joined = torch.cat([h, F.one_hot(spread, 5).float()], dim=-1)
    weight = torch.cat([layer.linear.weight, layer.rows.weight[1:].T], dim=1)
    torch.testing.assert_close(layer(h, label), F.linear(joined, weight, layer.linear.bias))


@pytest.mark.parametrize("label", [None, torch.zeros(3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)])
def test_a_label_that_is_missing_or_does_not_fit_is_refused(label: torch.Tensor | None) -> None:
    got = None if label is None else tuple(label.shape)
    image, row, tokens = torch.randn(2, 4, 3, 3), torch.randn(2, 4), torch.randn(2, 5, 4)
    for interface, h, shapes in (
        (Linear(4, 10), row, "(2,)"),
        (MLP(4, 10), row, "(2,)"),
        (Conv(4, 10), image, "(2,)"),
        (LocalHead(4, 10), tokens, "(2, 5) or (2,)"),
        (Transformer(4, 10), tokens, "(2, 5) or (2,)"),
    ):
        name = type(interface).__name__
        message = f"num_classes = 10, so {name} needs a label of shape {shapes}, got {got}"
        with pytest.raises(ValueError) as predicting:
            interface.synthetic_grad(h, label)
        with pytest.raises(ValueError) as learning:
            interface.learn(h, label, torch.randn_like(h))
        assert str(predicting.value) == str(learning.value) == message


def test_labels_that_are_not_integers_are_refused() -> None:
    with pytest.raises(TypeError) as refused:
        Linear(4, 10).synthetic_grad(torch.randn(2, 4), torch.zeros(2))
    assert str(refused.value) == (
        "Linear needs integer labels (class indices), got torch.float32: pass e.g. label.argmax(-1)"
    )


def test_small_integer_labels_are_taken() -> None:
    interface = LocalHead(4, 10)
    torch.nn.init.normal_(interface.classify.weight)
    h, label = torch.randn(2, 4), torch.tensor([9, 3])
    expected = interface.synthetic_grad(h, label)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(interface.synthetic_grad(h, label.to(dtype)), expected)


def test_a_label_beyond_the_classes_is_an_error_and_never_clamped() -> None:
    label = torch.tensor([0, 10])
    for interface, h in (
        (Linear(4, 10), torch.randn(2, 4)),
        (Conv(4, 10), torch.randn(2, 4, 3, 3)),
        (LocalHead(4, 10), torch.randn(2, 4)),
    ):
        with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
            interface.synthetic_grad(h, label)
