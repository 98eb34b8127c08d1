"""The embedded model never sees the future, and fits together at every size."""

import math

import pytest
import torch
import torch.nn.functional as F

from launch.gpt import byte_gpt


@pytest.mark.parametrize(("vocab_size", "seq_len", "width", "depth", "heads"), [(256, 16, 32, 2, 4), (7, 5, 6, 1, 3)])
def test_logits_have_one_row_per_byte(vocab_size, seq_len, width, depth, heads):
    model = byte_gpt(vocab_size=vocab_size, seq_len=seq_len, width=width, depth=depth, heads=heads)
    assert len(model) == depth + 2
    assert model(torch.randint(vocab_size, (3, seq_len))).shape == (3, seq_len, vocab_size)
    assert model(torch.randint(vocab_size, (3, seq_len - 2))).shape == (3, seq_len - 2, vocab_size)


def test_a_later_byte_never_changes_an_earlier_logit():
    torch.manual_seed(0)
    model = byte_gpt(seq_len=12, width=32, depth=2, heads=4)
    text = torch.randint(256, (1, 12))
    before = model(text)
    for changed in range(12):
        other = text.clone()
        other[0, changed] = (other[0, changed] + 1) % 256
        after = model(other)
        assert torch.allclose(after[:, :changed], before[:, :changed], atol=1e-6)
        assert not torch.allclose(after[:, changed:], before[:, changed:], atol=1e-6, rtol=0)
        assert (after[0, changed:] != before[0, changed:]).any(dim=-1).all()  # and every later one


def test_an_untrained_model_knows_nothing_and_soon_learns_something():
    torch.manual_seed(0)
    model = byte_gpt(seq_len=16, width=32, depth=2, heads=4)
    text = torch.arange(17).repeat(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(256), abs=0.3)
    assert losses[-1] < 0.5 * losses[0]


def test_weights_start_small_and_those_into_the_residual_stream_smaller():
    model = byte_gpt(width=64, depth=8, heads=4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            smaller = "attend_out" in name or "mlp_out" in name
            assert parameter.std().item() == pytest.approx(0.005 if smaller else 0.02, rel=0.1), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


def test_the_residual_stream_does_not_grow_with_depth():
    scales = []
    for depth in (2, 24):
        torch.manual_seed(0)
        model = byte_gpt(seq_len=16, width=64, depth=depth, heads=4)
        scales.append(model[:-1](torch.randint(256, (4, 16))).std().item())
    assert scales[1] == pytest.approx(scales[0], rel=0.1)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width = 10 must be a multiple of heads = 4"):
        byte_gpt(width=10, heads=4)
