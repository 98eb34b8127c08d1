"""Which interface is chosen for what, and that the chosen one fits."""

import pytest
import torch

from dnipipe.interface import Conv, Linear, LocalHead, TensorMeta, build_interface, choose_interface

FLOAT, LONG = torch.float32, torch.int64


@pytest.mark.parametrize(
    "shape, dtype, label, num_classes, name",
    [
        ((8, 16), FLOAT, None, 0, "mlp"),
        ((8, 16), torch.bfloat16, TensorMeta((8,), LONG), 10, "local_head"),
        ((8, 16), FLOAT, TensorMeta((8,), FLOAT), 10, "mlp"),
        ((8, 16), FLOAT, TensorMeta((8,), LONG), 0, "mlp"),
        ((8, 3, 6, 6), FLOAT, None, 0, "conv"),
        ((8, 3, 6, 6), FLOAT, TensorMeta((8,), LONG), 10, "conv"),
        ((8, 5, 16), FLOAT, TensorMeta((8, 5), LONG), 10, "local_head"),
        ((8, 5, 16), FLOAT, TensorMeta((8,), torch.int32), 10, "local_head"),
        ((8, 5, 16), FLOAT, None, 10, None),
        ((8, 5, 16), FLOAT, TensorMeta((8, 5), LONG), 0, None),
        ((8, 5, 16), FLOAT, TensorMeta((8, 5), FLOAT), 10, None),
        ((8, 5, 16), FLOAT, TensorMeta((8, 4), LONG), 10, None),
        ((8,), FLOAT, None, 0, None),
        ((8, 3, 2, 6, 6), FLOAT, None, 0, None),
        ((8, 16), LONG, None, 0, None),
    ],
)
def test_the_layout_chooses_the_interface(
    shape: tuple[int, ...], dtype: torch.dtype, label: TensorMeta | None, num_classes: int, name: str | None
) -> None:
    assert choose_interface(TensorMeta(shape, dtype), label, num_classes) == name


@pytest.mark.parametrize(
    "name, shape",
    [
        ("linear", (4, 6)),
        ("linear", (4, 3, 6)),
        ("mlp", (4, 6)),
        ("mlp", (4, 3, 6)),
        ("conv", (4, 6, 5, 3)),
        ("local_head", (4, 6)),
        ("local_head", (4, 3, 6)),
        ("scaled_head", (4, 6)),
        ("sampled_head", (4, 6)),
        ("sampled_head", (4, 3, 6)),
        ("scaled_head", (4, 3, 6)),
        ("transformer", (4, 3, 6)),
        ("potential", (4, 6)),
        ("potential", (4, 3, 6)),
    ],
)
def test_every_name_builds_an_interface_that_runs_and_needs_its_label(name: str, shape: tuple[int, ...]) -> None:
    h, label = torch.randn(shape, dtype=torch.bfloat16), torch.randint(9, shape[:1])
    for activation, kind in ((h, label), (TensorMeta(shape, h.dtype), TensorMeta(tuple(label.shape), label.dtype))):
        interface = build_interface(name, activation, num_classes=9, label=kind)
        assert {p.dtype for p in interface.parameters()} == {torch.float32}
        assert interface.synthetic_grad(h, label).shape == h.shape
        with pytest.raises(ValueError, match="num_classes = 9"):
            interface.synthetic_grad(h, None)


def test_without_a_label_that_fits_an_interface_is_not_conditional() -> None:
    h = torch.randn(4, 6)
    for label in (None, torch.zeros(3, dtype=LONG), torch.zeros(4)):
        interface = build_interface("linear", h, num_classes=9, label=label)
        assert isinstance(interface, Linear) and interface.num_classes == 0
        assert interface.synthetic_grad(h, label).shape == h.shape


def test_a_local_head_is_built_without_looking_at_a_label() -> None:
    interface = build_interface("local_head", torch.randn(4, 6), num_classes=9)
    assert isinstance(interface, LocalHead) and interface.num_classes == 9


def test_parameters_are_float32_on_the_activations_device() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        interface = build_interface("mlp", torch.empty(4, 6, device="meta"))
    finally:
        torch.set_default_dtype(default)
    tensors = [*interface.parameters(), *interface.buffers()]
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.float32, "meta")}


def test_options_reach_the_class() -> None:
    interface = build_interface("conv", torch.randn(4, 6, 5, 5), width=3, num_hidden=2, kernel_size=3, normalise=False)
    assert isinstance(interface, Conv) and not interface.normalise
    shapes = [tuple(p.shape) for p in interface.parameters() if p.ndim == 4]
    assert shapes == [(3, 6, 3, 3), (3, 3, 3, 3), (6, 3, 3, 3)]


@pytest.mark.parametrize(
    "name, shape, message",
    [
        (
            "lstm",
            (4, 6),
            "unknown interface 'lstm': choose one of linear, mlp, conv, local_head, scaled_head, sampled_head, "
            "transformer, potential, or pass an Interface of your own",
        ),
        (
            "conv",
            (4, 6),
            "interface 'conv' takes an activation of shape (B, C, H, W), got (4, 6): "
            "choose linear or mlp or local_head or scaled_head or sampled_head or potential",
        ),
        (
            "mlp",
            (4, 6, 5, 5),
            "interface 'mlp' takes an activation of shape (B, D) or (B, T, D), got (4, 6, 5, 5): choose conv",
        ),
        (
            "linear",
            (4,),
            "interface 'linear' takes an activation of shape (B, D) or (B, T, D), got (4,): "
            "wrap your own module in Custom",
        ),
        ("local_head", (4, 6), "num_classes = 0: a local head classifies; give the number of classes, at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        build_interface(name, torch.randn(shape))
    assert str(refused.value) == message
