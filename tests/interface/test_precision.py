"""What half precision may cost: each answer against the same computation in float64."""

import pytest
import torch
from torch import Tensor, nn

from dnipipe.interface import Custom, Learner, Linear, LocalHead, Regressed
from dnipipe.interface.precision import LayerNorm, product_sum, square_sum

D = 48
EPS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance of two neighbours, relative; for float32 what some sums may lose too."""

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", EPS, ids=str)


def assert_near(got: Tensor, exact: Tensor, relative: float) -> None:
    """Each element within `relative` of the exact one, which is float64."""
    torch.testing.assert_close(got.double(), exact, rtol=relative, atol=0.0)


class Given(Regressed):
    """Predicts its parameter, whose `.grad` is then the gradient of the loss at the prediction."""

    def __init__(self, prediction: Tensor, *, normalise: bool) -> None:
        super().__init__(normalise=normalise)
        self.prediction = nn.Parameter(prediction)

    def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
        return self.prediction.to(h.dtype)


@every_device
@every_dtype
@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "paper"])
def test_the_gradient_of_the_loss_is_that_of_float64(dtype: torch.dtype, normalise: bool, device: str) -> None:
    torch.manual_seed(0)
    scale = 0.3 if normalise else 1.0
    prediction = torch.randn(4, 5, D, device=device).to(dtype)
    true_grad = (scale * (1 + 0.02 * torch.randn(4, 5, D, device=device)) * prediction).to(dtype)
    exact_prediction, exact_true = prediction.double().requires_grad_(), true_grad.double()
    interface = Given(prediction.float(), normalise=normalise).to(device)
    for running in [0.0, scale] if normalise else [1.0]:  # before the first end_step, and after
        interface.rms.fill_(running)
        interface.prediction.grad = exact_prediction.grad = None
        synthetic = interface.learn(torch.zeros_like(prediction), None, true_grad)
        unit = interface.rms if running > 0 else true_grad.float().square().mean().sqrt()
        # in bfloat16 the unit is the RMS rounded to it, when predicting as when learning
        unit = (unit.bfloat16() if dtype == torch.bfloat16 else unit).double()
        error = (exact_prediction - exact_true / unit).square()
        (error.mean() if normalise else error.sum() / 4).backward()
        # two roundings to `dtype`, of the small difference and of its product with 2 / n; float32 only before them
        size = 2 / (prediction.numel() if normalise else 4) * prediction.abs().max().item()
        torch.testing.assert_close(
            interface.prediction.grad.double(),
            exact_prediction.grad,
            rtol=2.1 * EPS[dtype],
            atol=2.0**-21 * size + (2.0**-24 if dtype == torch.float16 else 0.0),
        )
        assert_near(synthetic, exact_prediction.detach() * (unit if running > 0 else 0.0), EPS[dtype])


@every_device
def test_an_rms_that_is_nothing_in_float16_still_scales(device: str) -> None:
    interface = Given(torch.ones(2, D), normalise=True).to(device)
    interface.rms.fill_(2e-8)  # nearest float16: 0
    h = torch.zeros(2, D, dtype=torch.float16, device=device)
    interface.prediction.data.fill_(1000.0)
    assert_near(interface.synthetic_grad(h), torch.full((2, D), 2e-5, dtype=torch.float64, device=device), 2e-3)


@every_device
@pytest.mark.parametrize("label_shape", [(4, 5), (4,)], ids=["tokens", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_local_heads_gradient_is_that_of_float64(
    dtype: torch.dtype, label_shape: tuple[int, ...], device: str
) -> None:
    torch.manual_seed(0)
    head = LocalHead(D, 11).to(device)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    exact = LocalHead(D, 11).to(device)
    exact.load_state_dict(head.state_dict())
    h = (3 * torch.randn(4, 5, D, device=device)).to(dtype)
    label = torch.randint(11, label_shape, device=device)
    exact_h = h.double().requires_grad_()
    reference_loss(exact.double(), exact_h, label).backward()
    largest = exact_h.grad.abs().max().item()
    for answer in (head.synthetic_grad(h, label), head.learn(h, label, h)):
        assert answer.dtype == dtype
        torch.testing.assert_close(answer.double(), exact_h.grad, rtol=0.0, atol=3 * EPS[dtype] * largest)
    for parameter, expected in zip(head.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        atol = 3 * EPS[dtype] * expected.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=0.0, atol=atol)


def reference_loss(head: LocalHead, h: Tensor, label: Tensor) -> Tensor:
    """That of a head in float64, without any cast."""
    pooled = h if label.ndim == 2 else h.mean(1)
    logits = nn.functional.linear(
        nn.functional.layer_norm(pooled, (D,), head.norm.weight, head.norm.bias),
        head.classify.weight,
        head.classify.bias,
    )
    return nn.functional.cross_entropy(logits.flatten(0, -2), label.flatten())


@every_device
@every_dtype
def test_a_layer_norm_keeps_the_dtype_and_is_that_of_float64(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    norm, x = LayerNorm(D).to(device), torch.randn(7, D, device=device).to(dtype)
    with torch.autocast(device, torch.bfloat16):
        got = norm(x)
    assert got.dtype == dtype
    exact = nn.functional.layer_norm(x.double(), (D,))
    torch.testing.assert_close(got.double(), exact, rtol=EPS[dtype], atol=EPS[dtype])


@every_device
@every_dtype
def test_the_weights_of_a_layer_norm_get_the_gradient_of_float64_from_many_tokens(
    dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    norm, x = LayerNorm(8).to(device), torch.randn(20_000, 8, device=device).to(dtype)
    gradient = (0.3 * x + torch.rand_like(x)).to(dtype)
    norm(x).backward(gradient)
    normal = nn.functional.layer_norm(x.double(), (8,))
    tolerance = max(4 * EPS[dtype], 1e-5)
    assert_near(norm.weight.grad, (gradient.double() * normal).sum(0), tolerance)
    assert_near(norm.bias.grad, gradient.double().sum(0), tolerance)


@every_device
@pytest.mark.parametrize("dtype", [*EPS, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9,), (3, 7), (2, 5, 33), (2, 3, 4, 5), (0, 3)], ids=str)
def test_sums_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    one, other = (1e-4 * (1 + torch.rand(shape, device=device)).to(dtype) for _ in range(2))
    for got, exact in (
        (square_sum(one), one.double().square().sum()),
        (product_sum(one, other), (one.double() * other.double()).sum()),
    ):
        assert got.shape == () and got.dtype == torch.float32
        assert_near(got, exact, 2.0**-9 if dtype == torch.bfloat16 else 1e-6)


def test_sums_do_not_depend_on_where_the_tensors_lie() -> None:
    """Else a run would not end in the same bits after a restart."""
    torch.manual_seed(0)
    values = torch.randn(40, 103)
    sums = set()
    for offset in range(17):
        tensor = torch.empty(values.numel() + 17)[offset : offset + values.numel()].view(40, 103).copy_(values)
        sums.add((square_sum(tensor).item(), product_sum(tensor, values).item()))
    assert len(sums) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_metrics_of_small_half_precision_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    learner = Learner([Given(torch.randn(4, D), normalise=False)])
    learner.interfaces[0].prediction.data *= 1e-5
    h, true_grad = torch.zeros(4, D, dtype=dtype), (1e-5 * torch.randn(4, D)).to(dtype)
    synthetic = learner.predict([h], None)[0]
    learner.learn([h], None, [true_grad])
    exact = torch.cosine_similarity(synthetic.double().flatten(), true_grad.double().flatten(), dim=0)
    assert learner.metrics()["cosine"] == pytest.approx(exact.item(), abs=1e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_forward_sees_the_dtype_that_the_activation_is_computed_in(dtype: torch.dtype) -> None:
    class Look(Linear):
        def forward(self, h: Tensor, label: Tensor | None = None) -> Tensor:
            seen.append((h.dtype, torch.is_autocast_enabled("cpu")))
            return super().forward(h, label)

    seen: list[tuple[torch.dtype, bool]] = []
    interface, h = Look(D), torch.randn(2, D).to(dtype)
    interface.synthetic_grad(h)
    interface.learn(h, None, h)
    half = dtype.itemsize == 2
    assert seen == 2 * [(dtype if half else torch.float32, half)]


def test_a_custom_module_sees_float32_and_may_call_what_knows_no_half_precision() -> None:
    class Spectrum(nn.Module):
        def forward(self, h: Tensor, label: Tensor | None) -> Tensor:
            assert h.dtype == torch.float32
            return torch.fft.irfft(torch.fft.rfft(h), n=h.shape[-1])

    h = torch.randn(2, D, dtype=torch.bfloat16)
    synthetic = Custom(Spectrum(), normalise=False).synthetic_grad(h)
    torch.testing.assert_close(synthetic, h)
