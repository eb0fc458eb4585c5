"""Grey levels and reals, and the decoder p(v|z_0)."""

import math
import re

import pytest
import torch

from nelbo.pixels import bits_per_dim, check_images, decode, encode, level_log_probs, log_likelihood
from nelbo.schedules import default_gamma_0
from toys import FLOAT, tensor


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_levels_are_the_centres_of_bins(levels):
    """x(v) = 2 (v + 1/2)/L - 1: L bins of equal width fill [-1, 1], symmetrically."""
    x = encode(torch.arange(levels).reshape(1, 1, 1, -1), levels, FLOAT).flatten()
    edges = torch.linspace(-1, 1, levels + 1, dtype=FLOAT)
    assert torch.allclose(x, (edges[1:] + edges[:-1]) / 2, atol=1e-14)
    assert torch.allclose(x, -x.flip(0), atol=1e-15)
    whole = encode(torch.arange(levels, dtype=torch.uint8).reshape(1, 1, 1, -1), levels)
    assert whole.dtype == torch.float32 and torch.allclose(whole.flatten().double(), x, atol=1e-7)


def numbers(levels, seed=0):
    """Images, z_0, alpha_0 and gamma_0, one gamma per pixel."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(levels, (3, 2, 2, 2), generator=random)
    gamma = default_gamma_0(levels) + torch.rand(3, 2, 2, 2, generator=random, dtype=FLOAT)
    alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
    z = alpha * encode(images, levels, FLOAT) + 3 * sigma * torch.randn(3, 2, 2, 2, generator=random, dtype=FLOAT)
    return images, z, alpha, gamma


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decoder_by_the_formula(levels):
    """softmax_v(-1/2 (z_0/alpha_0 - x(v))^2 exp(-gamma_0)): a distribution over levels for every entry."""
    images, z, alpha, gamma = numbers(levels)
    found = level_log_probs(z, alpha, gamma, levels)
    assert torch.allclose(found.exp().sum(-1), torch.ones_like(z), rtol=1e-12)
    for at in ((0, 0, 0, 0), (2, 1, 0, 1)):
        scores = [
            -0.5 * (z[at] / alpha[at] - (2 * (v + 0.5) / levels - 1)).item() ** 2 / math.exp(gamma[at])
            for v in range(levels)
        ]
        largest = max(scores)
        normaliser = largest + math.log(sum(math.exp(s - largest) for s in scores))
        assert torch.allclose(found[at], tensor(scores) - normaliser, rtol=1e-10, atol=1e-10)
    total = log_likelihood(images, z, alpha, gamma, levels)
    for b in range(3):
        places = [(b, c, i, j) for c in range(2) for i in range(2) for j in range(2)]
        assert total[b].item() == pytest.approx(sum(found[p][images[p]].item() for p in places), rel=1e-12)


def test_one_gamma_for_all_pixels_broadcasts():
    images, z, _, _ = numbers(17)
    gamma = torch.full((3, 1, 1, 1), default_gamma_0(17), dtype=FLOAT)
    alpha = torch.sigmoid(-gamma).sqrt()
    whole = log_likelihood(images, z, alpha.expand_as(z), gamma.expand_as(z), 17)
    assert torch.allclose(log_likelihood(images, z, alpha, gamma, 17), whole, rtol=1e-13)


def test_decode_takes_the_nearest_level():
    images, _, alpha, gamma = numbers(256)
    near = alpha * (encode(images, 256, FLOAT) + 0.45 / 128)  # still in its bin
    found = decode(near, alpha, gamma, 256)
    assert found.dtype == torch.uint8 and torch.equal(found.long(), images)
    beyond = decode(torch.full_like(near, 3.0), alpha, gamma, 256)
    assert torch.equal(beyond, torch.full_like(beyond, 255))


def test_decode_draws_from_the_decoder():
    """A grid of uniforms: each level is drawn for a share of them equal to its probability, within a grid step."""
    gamma, count = tensor(-2.0).reshape(1, 1, 1, 1), 20_000
    alpha = torch.sigmoid(-gamma).sqrt()
    z = tensor(0.2).reshape(1, 1, 1, 1)
    uniform = ((torch.arange(count, dtype=FLOAT) + 0.5) / count).reshape(-1, 1, 1, 1)
    levels = decode(z.expand_as(uniform), alpha, gamma, 8, uniform).flatten().long()
    share = torch.bincount(levels, minlength=8) / count
    expected = level_log_probs(z, alpha, gamma, 8).exp().flatten()
    assert torch.allclose(share.to(FLOAT), expected, atol=2 / count)
    assert expected.min().item() > 1e-3
    for edge, level in ((0.0, 0), (1 - 2.0**-24, 7)):
        assert decode(z, alpha, gamma, 8, torch.full_like(z, edge)).item() == level


def test_bits_per_dim():
    assert bits_per_dim(3072 * math.log(2), 3072) == pytest.approx(1.0)
    assert torch.allclose(bits_per_dim(torch.tensor([math.log(256)]), 1), torch.tensor([8.0]))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 1, 2, 2), "whole numbers"),
        (torch.full((2, 1, 2, 2), 4, dtype=torch.uint8), "0 .. 3"),
        (torch.full((2, 1, 2, 2), -1), "0 .. 3"),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), "(n, 1, 2, 2)"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), "n >= 1"),
    ],
)
def test_images_must_be_whole_numbers_in_range(images, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_images(images, (1, 2, 2), 4)
