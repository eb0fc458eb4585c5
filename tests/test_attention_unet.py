"""The U-Net of denoising-diffusion-pytorch: its derivatives, by differences and by torch's. Parity: test_convert.py."""

import pytest
import torch

from nelbo.networks import AttentionUNet, attention_unet
from nelbo.networks.attention_unet import (
    FullAttention,
    LinearAttention,
    _Across,
    _convolve,
    _convolved,
    _Normalise,
    _normalised,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("swish", (False, True))
@pytest.mark.parametrize("film", (False, True))
def test_normalisation_has_the_derivatives_of_its_formula(swish, film):
    x, gain = random(2, 2, 2, 3).requires_grad_(), random(2 if film else 1, 1, 1, 3, seed=1).requires_grad_()
    rest = random(2, 2, 2, 3, seed=3).requires_grad_()
    shift = random(2, 1, 1, 3, seed=2).requires_grad_() if film else None
    inputs = (x, gain, rest) if shift is None else (x, gain, rest, shift)

    def call(x, gain, rest, shift=None):
        return _Normalise.apply(x, gain, shift, rest, swish)

    torch.testing.assert_close(call(*inputs), _normalised(x, gain, shift, rest, swish))
    torch.testing.assert_close(_Normalise.apply(x, gain, shift, None, swish), call(*inputs) - rest)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_the_product_across_pixels_has_the_derivatives_of_torchs_with_gradients_in_their_own_order():
    a, b = random(2, 5, 3).requires_grad_(), random(2, 5, 4, seed=1).requires_grad_()
    torch.testing.assert_close(_Across.apply(a, b), a.mT @ b)
    assert torch.autograd.gradcheck(_Across.apply, (a, b))
    assert torch.autograd.gradgradcheck(_Across.apply, (a, b))
    for gradient in torch.autograd.grad(_Across.apply(a, b).sum(), (a, b)):
        assert gradient.is_contiguous()


@pytest.mark.parametrize("transposed", (False, True))
def test_a_convolution_of_few_pixels_has_the_derivatives_of_torchs(transposed):
    x, bias = random(2, 4, 4, 3).requires_grad_(), random(5, seed=1).requires_grad_()
    kernel = random(*((3, 4, 4, 5) if transposed else (5, 3, 3, 3)), seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: _convolve(*v, transposed=transposed), (x, kernel, bias))
    assert torch.autograd.gradgradcheck(lambda *v: _convolve(*v, transposed=transposed), (x, kernel, bias))
    found, wanted = (f(x, kernel, bias, transposed=transposed) for f in (_convolve, _convolved))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", (FullAttention, LinearAttention))
def test_attention_is_its_formula(kind):
    """Equations (4) and (5) written out, with the learned keys and values beside those of the pixels."""
    layer, x = kind(6, 2, 4).double(), random(2, 2, 3, 6)
    n = torch.nn.functional.normalize(x, dim=-1) * 6**0.5 * layer.norm.scale
    q, k, v = layer.qkv(n).reshape(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    k, v = (torch.cat((m.expand(2, -1, -1, -1), p), 2) for m, p in zip(layer.memory, (k, v), strict=True))
    if kind is FullAttention:
        h = torch.softmax(q @ k.mT / 4**0.5, -1) @ v
    else:
        h = torch.softmax(q, -1) / 4**0.5 @ (torch.softmax(k, 2).mT @ v)
    y = layer.out(h.transpose(1, 2).reshape(2, 2, 3, 8))
    if kind is LinearAttention:
        y = torch.nn.functional.normalize(y, dim=-1) * 6**0.5 * layer.norm_out.scale
    torch.testing.assert_close(layer(x), x + y, rtol=1e-9, atol=1e-9)


def test_many_pixels_and_few_take_other_ways_to_the_same_gradient(monkeypatch):
    torch.manual_seed(0)
    net = AttentionUNet(1, 2, 8, (1, 2), heads=2, features=4).double()
    x, n = random(2, 1, 8, 4), torch.tensor([0.0, 999.0], dtype=torch.float64)
    found = []
    for few in (0, 10**9):
        monkeypatch.setattr(attention_unet, "FEW", few)
        net.zero_grad()
        net(x, n).square().sum().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bf16_is_close_to_float32():
    torch.manual_seed(0)
    net = AttentionUNet(3, 3, 16, (1, 2), heads=2, features=8).eval()
    x, n = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    with torch.no_grad():
        exact = net(x, n)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(x, n)
    assert rough.dtype == torch.float32
    assert float((rough - exact).norm() / exact.norm()) < 0.03
