"""The layers that differ from torch's own for speed do the same thing."""

import torch

from nelbo.networks.layers import Dropout, attend


def test_dropout_has_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    ones = torch.ones(3, 5, 333, 201)  # not a multiple of four entries
    for p in (0.05, 0.1, 0.5, 0.999):
        y = Dropout(p)(ones)
        error = (p * (1 - p) / ones.numel()) ** 0.5
        assert abs(float((y == 0).double().mean()) - p) < 5 * error + 2**-16
        kept = y[y > 0]
        assert torch.all(kept == kept[0])
        torch.testing.assert_close(float(kept[0]), 1 / (1 - p), rtol=2**-16 / (1 - p), atol=0)


def test_dropout_entries_are_independent():
    torch.manual_seed(0)
    dropped = (Dropout(0.3)(torch.ones(400_000)) == 0).double() - 0.3
    for lag in (1, 2, 3, 4, 5, 8, 64):  # four entries share a random word
        correlation = float((dropped[lag:] * dropped[:-lag]).mean()) / (0.3 * 0.7)
        assert abs(correlation) < 5 / 400_000**0.5


def test_dropout_gradient_follows_the_mask():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 8, 5, 7, dtype=dtype, requires_grad=True)
        y = Dropout(0.25)(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert torch.equal(x.grad == 0, y == 0) and 0 < int((y == 0).sum()) < y.numel()
        torch.testing.assert_close(y, x * x.grad)


def test_dropout_is_repeatable_and_off_in_evaluation():
    layer, x = Dropout(0.5), torch.randn(2, 3, 4, 4)
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(layer(x))
    assert torch.equal(*drawn)
    assert not torch.equal(layer(x), drawn[0])
    assert layer.eval()(x) is x or torch.equal(layer(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


def test_attention_in_bf16_follows_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, 16, requires_grad=True) for _ in range(3))
    exact = torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v
    torch.testing.assert_close(attend(q, k, v), exact, rtol=1e-5, atol=1e-6)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    rounded = attend(*half)
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).detach().norm() / exact.detach().norm()) < 0.02
    weights = torch.randn_like(exact)
    (exact * weights).sum().backward()
    (rounded.float() * weights).sum().backward()
    for a, b in zip((q, k, v), half, strict=True):
        assert float((b.grad.float() - a.grad).norm() / a.grad.norm()) < 0.03
