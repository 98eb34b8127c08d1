"""The local head against a cross-entropy written out by hand."""

import pytest
import torch
from torch import Tensor, nn

from dnipipe.interface import LocalHead

CLASSES, D = 7, 6


def head(seed: int = 0) -> LocalHead:
    """A head with arbitrary weights: one that starts at zero would hide most mistakes."""
    torch.manual_seed(seed)
    made = LocalHead(D, CLASSES)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def loss_by_hand(made: LocalHead, h: Tensor, label: Tensor) -> Tensor:
    """Mean over the labels that count of log(sum(exp(logits))) - logit of the label, LayerNorm written out."""
    centred = h - h.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * made.norm.weight + made.norm.bias
    logits = (normal @ made.classify.weight.T + made.classify.bias).reshape(-1, CLASSES)
    losses = [logits[n].exp().sum().log() - logits[n, c] for n, c in enumerate(label.flatten().tolist()) if c != -100]
    return torch.stack(losses).mean()


def check_against_hand(h: Tensor, label: Tensor, pooled: bool = False) -> None:
    made, reference = head(), head()
    own = h.clone().requires_grad_()
    loss_by_hand(reference, own.mean(1) if pooled else own, label).backward()
    torch.testing.assert_close(made.synthetic_grad(h, label), own.grad)
    assert all(p.grad is None for p in made.parameters()), "predicting is not learning"
    torch.testing.assert_close(made.learn(h, label, torch.randn_like(h)), own.grad)
    for parameter, expected in zip(made.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_rows_get_the_gradient_of_the_mean_cross_entropy() -> None:
    check_against_hand(torch.randn(5, D), torch.randint(CLASSES, (5,)))


def test_tokens_get_the_gradient_of_the_mean_over_the_tokens_that_count() -> None:
    label = torch.randint(CLASSES, (4, 3))
    check_against_hand(torch.randn(4, 3, D), label)
    label[0, 1:] = -100
    label[2] = -100
    check_against_hand(torch.randn(4, 3, D), label)


def test_one_label_a_sequence_classifies_the_mean_over_its_tokens() -> None:
    check_against_hand(torch.randn(4, 3, D), torch.tensor([1, 6, -100, 0]), pooled=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_microbatch_without_a_valid_token_gives_exactly_zero(dtype: torch.dtype) -> None:
    made = head()
    h = torch.randn(4, 3, D, dtype=dtype)
    label = torch.full((4, 3), -100)
    assert made.loss(h.float(), label).item() == 0.0
    assert torch.equal(made.synthetic_grad(h, label), torch.zeros_like(h))
    assert torch.equal(made.learn(h, label, torch.randn_like(h)), torch.zeros_like(h))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in made.parameters())


def test_logits_of_a_half_precision_activation_enter_the_loss_in_float32() -> None:
    made = head()
    with torch.no_grad():
        made.classify.bias[0] = 400.0  # in bfloat16 the loss of 400 would be rounded to a multiple of 2
    h, label = torch.zeros(1, D, dtype=torch.bfloat16), torch.tensor([1])
    with torch.autocast("cpu", torch.bfloat16):
        assert made.loss(h, label).dtype == torch.float32


def test_the_true_gradient_does_not_teach_a_local_head() -> None:
    h, label = torch.randn(5, D), torch.randint(CLASSES, (5,))
    first, second = head(), head()
    first.learn(h, label, torch.randn(5, D))
    second.learn(h, label, torch.full((5, D), float("nan")))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_an_untrained_head_learns_its_labels() -> None:
    torch.manual_seed(0)
    made = LocalHead(D, CLASSES)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.05)
    h, label = torch.randn(20, D), torch.randint(CLASSES, (20,))
    before = made.loss(h, label).item()
    assert before == pytest.approx(torch.tensor(float(CLASSES)).log().item())
    for _ in range(100):
        made.learn(h, label, h)
        optimizer.step()
        optimizer.zero_grad()
    assert made.loss(h, label).item() < 0.6 * before


def test_a_head_without_classes_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        LocalHead(D, 0)
    assert str(refused.value) == "num_classes = 0: a local head classifies; give the number of classes, at least 1"


def test_a_classifier_of_low_rank_is_one_whose_matrix_is_a_product() -> None:
    torch.manual_seed(0)
    made, full = LocalHead(D, CLASSES, rank=2), LocalHead(D, CLASSES)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    full.load_state_dict(
        {
            "norm.weight": made.norm.weight,
            "norm.bias": made.norm.bias,
            "classify.weight": made.classify.weight @ made.reduce.weight,
            "classify.bias": made.classify.bias,
        }
    )
    h, label = torch.randn(4, 3, D), torch.randint(CLASSES, (4, 3))
    torch.testing.assert_close(made.synthetic_grad(h, label), full.synthetic_grad(h, label))


def test_a_rank_below_1_is_refused() -> None:
    with pytest.raises(ValueError) as refused:
        LocalHead(D, CLASSES, rank=0)
    assert str(refused.value) == "rank = 0 must be at least 1: give more, or None for a full classifier"
