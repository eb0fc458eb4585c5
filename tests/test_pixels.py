"""Grey levels and reals, the decoder p(v|z_0), and the dequantizations q(z_0|v)."""

import math
import re

import pytest
import torch

from nelbo.paths import PATHS, VariancePreserving
from nelbo.pixels import (
    DEQUANTIZATIONS,
    TruncatedNormal,
    Uniform,
    Variational,
    bits_per_dim,
    check_images,
    decode,
    encode,
    level_log_probs,
    log_likelihood,
)
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


@pytest.mark.parametrize("wider", [0.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_levels_that_are_left_out_weigh_nothing(levels, wider):
    """Values and gradients are those of the sum over all levels, where z_0 is near the image's and where it is not."""
    images, z, alpha, gamma = numbers(levels)
    for near in (z, 2 * torch.randn(z.shape, dtype=FLOAT, generator=torch.Generator().manual_seed(1))):
        found = []
        for part in (True, False):
            given = [v.clone().requires_grad_() for v in (near, alpha, gamma + wider)]
            if part:
                value = log_likelihood(images, *given, levels)
            else:
                value = level_log_probs(*given, levels).gather(-1, images[..., None]).flatten(1).sum(1)
            found.append([value, *torch.autograd.grad(value.sum(), given)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13 * float(b.detach().abs().max()))
    broken = log_likelihood(images, z * math.nan, alpha, gamma * math.nan, levels)
    assert broken.isnan().all()


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


# Dequantizations -----------------------------------------------------------------------------------------------------


def one_pixel(rule, level, gamma, levels, noise, path="vp"):
    """Draws for one pixel of one level, a row for each random number: (z, log_q, entropy_form, decoder), all (B,)."""
    gamma = tensor(gamma).reshape(1, 1, 1, 1)
    alpha, sigma = PATHS[path]().coefficients(gamma)
    noise = tensor(noise).reshape(-1, 1, 1, 1)
    images = torch.full(noise.shape, level)
    found = rule.draw(images, alpha, sigma, levels, noise)
    return found.z.flatten(), found.log_q, found.entropy_form, found.decoder


@pytest.mark.parametrize("levels", [256, 17, 4])
def test_constants_of_the_truncated_normal(levels):
    """At gamma_0 = -13.3 + 2 log(256/L): tau = 3.018689, Z = 0.99746129 and entropy 1.4037177 + log sigma_0, for any L;
    alpha_0 = 0.9999992 and sigma_0 = 0.00129402 for 256. At another gamma_0 they are others, from the formulas."""
    rule = TruncatedNormal()
    for gamma, path in ((default_gamma_0(levels), "vp"), (default_gamma_0(levels), "straight"), (-5.0, "vp")):
        alpha, sigma = (v.item() for v in PATHS[path]().coefficients(tensor(gamma)))
        z, log_q, entropy_form, decoder = one_pixel(rule, levels - 1, gamma, levels, [0.5, 1.0], path)
        tau = ((z[1] - z[0]) / sigma).item()  # from the middle of the distribution to its end
        mass = math.exp(-log_q[0].item() - 0.5 * math.log(2 * math.pi) - math.log(sigma))
        offset = -entropy_form[0].item() - math.log(sigma)
        assert z[0].item() == pytest.approx(alpha * (1 - 1 / levels), rel=1e-12) and decoder.tolist() == [0.0, 0.0]
        if gamma == default_gamma_0(levels):
            assert tau == pytest.approx(3.018689, abs=5e-7)
            assert mass == pytest.approx(0.99746129, abs=5e-9)
            assert offset == pytest.approx(1.4037177, abs=5e-8)
        else:
            assert tau == pytest.approx(math.exp(2.5) / levels, rel=1e-9) and abs(tau - 3.0) > 0.03
            assert mass == pytest.approx(math.erf(tau / math.sqrt(2)), rel=1e-12)
    alpha, sigma = (v.item() for v in VariancePreserving().coefficients(tensor(default_gamma_0(256))))
    assert alpha == pytest.approx(0.9999992, abs=5e-8) and sigma == pytest.approx(0.00129402, abs=5e-9)


CASES = [(name, levels, gamma) for name in DEQUANTIZATIONS for levels, gamma in ((256, -13.3), (17, -6.0), (4, -2.0))]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "levels", "gamma"), CASES)
def test_the_draws_are_those_of_the_density(name, levels, gamma, path):
    """The random number is the density's distribution function at z, all along: so it integrates to one, and z follows
    it; the entropy form is the mean of log q. By the trapezoidal rule, to 1e-5."""
    rule = DEQUANTIZATIONS[name]()
    if rule.noise == "normal":
        noise = torch.linspace(-7, 7, 4001, dtype=FLOAT)
        below = 0.5 * torch.special.erfc(-noise / math.sqrt(2))
    else:
        noise = below = torch.linspace(0, 1, 20_001, dtype=FLOAT)
    z, log_q, entropy_form, _ = one_pixel(rule, 1, gamma, levels, noise, path)
    assert bool((z[1:] > z[:-1]).all())
    found = torch.cumulative_trapezoid(log_q.exp(), z) + below[0]
    assert torch.allclose(found, below[1:], atol=1e-5)
    mean = torch.trapezoid(log_q, below).item()
    assert entropy_form.unique().numel() == 1 and entropy_form[0].item() == pytest.approx(mean, abs=1e-5)
    assert (log_q.std().item() < 1e-12) == (name == "uniform")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["truncated-normal", "uniform"])
def test_samples_lie_in_the_bin(name, dtype):
    """alpha times the bin of v, whatever the noise, 0 and 1 - 2^-24 too, and where tau is 3e-4 or 40; so that the
    decoder says nothing."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 1, 3, 3), generator=random)
    noise = torch.rand(40, 1, 3, 3, generator=random).to(dtype)
    noise[:10], noise[10:20] = 0.0, 1 - 2.0**-24
    for gamma in (5.0, -13.3, -18.5):
        alpha, sigma = VariancePreserving().coefficients(torch.full((40, 1, 1, 1), gamma, dtype=dtype))
        found = DEQUANTIZATIONS[name]().draw(images, alpha, sigma, 256, noise)
        place = (found.z.double() / alpha.double() - encode(images, 256, FLOAT)) * 256
        slack = 256 * 2.0**-23 if dtype == torch.float32 else 1e-9
        assert place.abs().max().item() <= 1 + slack and found.z.dtype == dtype
        assert place.std().item() > 0.1 and found.log_q.dtype == FLOAT and not found.decoder.any()
        if gamma < 0:
            inside = noise.clamp(1e-3, 1 - 1e-3)
            z = DEQUANTIZATIONS[name]().draw(images, alpha, sigma, 256, inside).z
            assert torch.equal(decode(z, alpha, torch.full_like(z, gamma), 256).long(), images)


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_uniform_costs_the_width_of_a_bin(levels):
    """log2(L/2) bits per dimension in units of x, alpha apart; its gamma is -11.8 + 2 log(256/L), the others' t = 0."""
    images = torch.zeros(1, 2, 3, 1, dtype=torch.uint8)
    alpha, sigma = tensor(0.9).reshape(1, 1, 1, 1), tensor(0.3).reshape(1, 1, 1, 1)
    found = Uniform().draw(images, alpha, sigma, levels, torch.full((1, 2, 3, 1), 0.25, dtype=FLOAT))
    bits = bits_per_dim(found.log_q.item(), 6)
    assert bits == pytest.approx(math.log2(levels / 2) - math.log2(0.9), abs=1e-12)
    assert found.entropy_form.item() == found.log_q.item()
    assert Uniform().start(levels) == pytest.approx(-11.8 + 2 * math.log(256 / levels))
    assert Uniform().start(256) == -11.8
    assert TruncatedNormal().start(levels) is None and Variational().start(levels) is None


@pytest.mark.parametrize("path", PATHS)
def test_variational_goes_with_the_decoder(path):
    """Its decoder is ``log_likelihood`` of its z, per-pixel gammas and all; z = alpha x + sigma eps."""
    images, _, _, gamma = numbers(17)
    gamma = gamma + 2.5  # where the decoder has doubts
    alpha, sigma = PATHS[path]().coefficients(gamma)
    eps = torch.randn(gamma.shape, generator=torch.Generator().manual_seed(4), dtype=FLOAT)
    found = Variational().draw(images, alpha, sigma, 17, eps)
    assert torch.allclose(found.z, alpha * encode(images, 17, FLOAT) + sigma * eps, rtol=1e-12)
    assert torch.allclose(found.decoder, log_likelihood(images, found.z, alpha, gamma, 17), rtol=1e-10)
    assert found.decoder.max().item() < -0.1
    normal = torch.distributions.Normal(alpha * encode(images, 17, FLOAT), sigma)
    assert torch.allclose(found.log_q, normal.log_prob(found.z).flatten(1).sum(1), rtol=1e-10)
    assert torch.allclose(found.entropy_form, -normal.entropy().flatten(1).sum(1), rtol=1e-12)


@pytest.mark.parametrize("name", DEQUANTIZATIONS)
def test_every_pixel_has_its_own_alpha_and_sigma(name):
    """An image's density is the sum of its pixels' by themselves; one gamma for all pixels broadcasts."""
    images, _, alpha, gamma = numbers(17)
    sigma, rule = (gamma / 2).exp() * alpha, DEQUANTIZATIONS[name]()
    noise = torch.rand(gamma.shape, generator=torch.Generator().manual_seed(1), dtype=FLOAT)
    whole = rule.draw(images, alpha, sigma, 17, noise)
    pixels = rule.draw(*(v.reshape(-1, 1, 1, 1) for v in (images, alpha, sigma)), 17, noise.reshape(-1, 1, 1, 1))
    assert torch.allclose(whole.z.flatten(), pixels.z.flatten(), rtol=1e-13)
    for field in ("log_q", "entropy_form", "decoder"):
        assert torch.allclose(getattr(whole, field), getattr(pixels, field).reshape(3, -1).sum(1), rtol=1e-11)
    one, same = (v[:, :1, :1, :1] for v in (alpha, sigma)), (v[:, :1, :1, :1].expand_as(v) for v in (alpha, sigma))
    narrow, wide = rule.draw(images, *one, 17, noise), rule.draw(images, *same, 17, noise)
    for field in ("z", "log_q", "entropy_form", "decoder"):
        assert torch.allclose(getattr(narrow, field), getattr(wide, field), rtol=1e-13)
