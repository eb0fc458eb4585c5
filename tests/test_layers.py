"""The layers that differ from torch's own for speed do the same thing."""

import pytest
import torch
from scipy import stats
from torch import nn

from nelbo.draws import Draws
from nelbo.networks import DiffusersUNet
from nelbo.networks.layers import Dropout, Shortcut, attend, key_dropout
from nelbo.networks.unet import Level


def keyed(p: float, keys: torch.Tensor) -> Dropout:
    layer = Dropout(p)
    layer.keys = keys
    return layer


def dropped(keys: torch.Tensor, entries: int, p: float) -> torch.Tensor:
    """Of examples with these keys: 1 where an entry is dropped, float64."""
    return 1 - keyed(p, keys).mask(torch.ones(len(keys), entries)).double()


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


def test_masks_of_examples_layers_and_positions_are_independent():
    """Fixed keys. Each bound is passed by chance with probability 1e-4, for all of its figures together."""
    p, entries = 0.25, 20_001
    keys = Draws(1, range(100)).keys("dropout", 2).flatten()
    away = (dropped(keys, entries, p) - p) / (p * (1 - p)) ** 0.5  # (examples, entries)

    def bound(figures):
        return stats.norm.isf(0.5e-4 / figures)

    means = away.mean(1) * entries**0.5
    assert means.abs().max() < bound(len(keys))
    assert stats.kstest(means.numpy(), "norm").pvalue > 1e-4  # neither too far from p nor too close
    across = (away @ away.T / entries**0.5)[tuple(torch.triu_indices(len(keys), len(keys), 1))]
    assert across.abs().max() < bound(len(across))
    assert stats.kstest(across.numpy(), "norm").pvalue > 1e-4
    for lag in (1, 2, 3, 4, 8, 32, 64, 1024):
        along = (away[:, lag:] * away[:, :-lag]).mean(1) * (entries - lag) ** 0.5
        assert along.abs().max() < bound(8 * len(keys))
        assert abs(along.mean()) * len(keys) ** 0.5 < bound(8)
    # Four neighbours, two of them of one word: all 16 patterns as often as they should be.
    patterns = ((away > 0)[:, :20_000].reshape(-1, 4).long() * torch.tensor([8, 4, 2, 1])).sum(1)
    ones = torch.tensor([i.bit_count() for i in range(16)]).double()
    expected = p**ones * (1 - p) ** (4 - ones) * len(patterns)
    assert stats.chisquare(patterns.bincount(minlength=16).numpy(), expected.numpy()).pvalue > 1e-4


def test_a_mask_belongs_to_the_example_and_the_layer():
    x = torch.ones(6, 3, 5, 7)
    model = nn.Sequential(Dropout(0.5), nn.Sequential(nn.Identity(), Dropout(0.0), Dropout(0.5)))
    layers = model[0], model[1][2]
    key_dropout(model, Draws(3, [5, 1, 9, 2**63, 7, 0]))
    masks = [layer(x) for layer in layers]
    assert not torch.equal(*masks) and torch.equal(masks[0], layers[0](x))
    assert len({mask.numpy().tobytes() for mask in torch.cat(masks)}) == 12
    for rows, index in (([0, 1, 2, 3], [5, 1, 9, 2**63]), ([4, 5], [7, 0]), ([2], [9]), ([5, 0], [0, 5])):
        key_dropout(model, Draws(3, index))
        for layer, mask in zip(layers, masks, strict=True):
            assert torch.equal(layer(x[rows]), mask[rows])
            bf16 = layer(x[rows].bfloat16())
            assert torch.equal(bf16, mask[rows].bfloat16())
    with pytest.raises(ValueError, match="keys of 2 examples, got 6"):
        model(x)
    key_dropout(model, Draws(4, [5, 1, 9, 2**63, 7, 0]))
    assert not torch.equal(layers[0](x), masks[0])
    key_dropout(model, None)
    assert not torch.equal(layers[0](x), layers[0](x))
    assert set(model.state_dict()) == set()


def test_activations_computed_again_have_the_same_mask():
    """Other random numbers are drawn between the forward and the backward pass, as another step's would be."""
    torch.manual_seed(0)
    condition, x = torch.randn(2, 3), torch.randn(2, 8, 4, 4)
    level = Level(8, 8, 3, 2, 0.5, False, False, None, 1e-6)
    nn.init.normal_(level.block.conv_2.weight)
    key_dropout(level, Draws(0, [4, 2]))
    gradients = []
    for recompute in (False, True):
        level.recompute = recompute
        level.zero_grad()
        y = level(x.requires_grad_(), condition)
        torch.randn(7)
        y.square().sum().backward()
        gradients.append([y, *(p.grad for p in level.parameters())])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_dropout_of_diffusers_belongs_to_the_example():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, dropout=0.3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    names, layers = list(unet.state_dict()), sum(isinstance(m, nn.Dropout) for m in unet.modules())
    net = DiffusersUNet(unet)
    assert list(unet.state_dict()) == names
    assert sum(isinstance(m, Dropout) for m in net.modules()) == layers == sum(
        isinstance(m, nn.Dropout) for m in net.modules()
    )  # fmt: skip
    x, n = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 5.0, 9.0])
    key_dropout(net, Draws(0, [8, 6, 7]))
    together = net(x, n)
    assert not torch.allclose(together, net.eval()(x, n))
    key_dropout(net.train(), Draws(0, [7]))
    torch.testing.assert_close(net(x[2:], n[2:]), together[2:])


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


def test_a_shortcut_is_a_convolution_beside_another():
    torch.manual_seed(0)
    layer, beside = Shortcut(6, 4).double(), nn.Conv2d(4, 4, 3, padding=1).double()
    x, h = (torch.randn(2, c, 3, 5, dtype=torch.float64, requires_grad=True) for c in (6, 4))
    given = (x, layer.weight, layer.bias, h, beside.weight, beside.bias)
    results = []
    for y in (layer.beside(x, beside, h), torch.conv2d(*given[:3]) + torch.conv2d(*given[3:], padding=1)):
        first = torch.autograd.grad((y**2).sum(), given, retain_graph=True)
        again = torch.autograd.grad((y**2).sum(), given, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in again), given)
        results.append([y, *first, *again, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    layer.requires_grad_(False)  # as in a likelihood by ODE
    (alone,) = torch.autograd.grad((layer.beside(x, beside, h) ** 2).sum(), x)
    torch.testing.assert_close(alone, results[0][1], rtol=1e-12, atol=1e-12)
