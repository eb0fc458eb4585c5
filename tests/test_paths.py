"""Paths: (alpha, sigma) of gamma, their derivatives, and the reverse step against Gaussian conditioning."""

import math

import pytest
import torch

from nelbo.paths import PATHS, Straight, VariancePreserving
from toys import FLOAT, tensor

GAMMAS = torch.linspace(-15, 12, 55, dtype=FLOAT)


@pytest.mark.parametrize("name", PATHS)
def test_signal_to_noise_is_exp_minus_gamma(name):
    alpha, sigma = PATHS[name]().coefficients(GAMMAS)
    assert torch.allclose(2 * (alpha.log() - sigma.log()), -GAMMAS, rtol=1e-12, atol=1e-12)


def test_what_each_path_keeps():
    alpha, sigma = VariancePreserving().coefficients(GAMMAS)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(GAMMAS), rtol=1e-14)
    alpha, sigma = Straight().coefficients(GAMMAS)
    assert torch.allclose(alpha + sigma, torch.ones_like(GAMMAS), rtol=1e-14)


def test_constants():
    """alpha_0 = 0.9999992 and sigma_0 = 0.00129402 at -13.3 on VP; sigma_1^2 = 0.854 at 5 on the straight path; tau."""
    alpha, sigma = VariancePreserving().coefficients(tensor(-13.3))
    assert alpha.item() == pytest.approx(0.9999992, abs=5e-8)
    assert sigma.item() == pytest.approx(0.00129402, abs=5e-9)
    assert (alpha / (256 * sigma)).item() == pytest.approx(3.018689, abs=5e-7)
    tau = (alpha / (256 * sigma)).item()
    mass = math.erf(tau / math.sqrt(2))
    assert mass == pytest.approx(0.99746129, abs=5e-9)
    # The entropy of the noise cut at +-tau, in nats.
    offset = math.log(mass) + 0.5 * math.log(2 * math.pi * math.e)
    offset -= tau * math.exp(-(tau**2) / 2) / (math.sqrt(2 * math.pi) * mass)
    assert offset == pytest.approx(1.4037177, abs=5e-8)
    _, sigma_1 = Straight().coefficients(tensor(5.0))
    assert (sigma_1**2).item() == pytest.approx(0.854, abs=5e-4)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_equal_autodiff(name):
    path, gamma = PATHS[name](), GAMMAS.clone().requires_grad_()
    for value, derivative in zip(path.coefficients(gamma), path.derivatives(gamma), strict=True):
        (slope,) = torch.autograd.grad(value.sum(), gamma)
        assert torch.allclose(derivative, slope, rtol=1e-8, atol=1e-18)  # autodiff loses digits in 1 - sigmoid


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_path_s(name):
    """On the straight path dz/d sigma at fixed x, eps is eps - x; on VP dz/d angle is alpha eps - sigma x."""
    path, gamma = PATHS[name](), GAMMAS[::5]
    alpha, sigma = path.coefficients(gamma)
    d_alpha, d_sigma = path.derivatives(gamma)
    a, b = path.velocity(alpha, sigma)
    speed = d_sigma if name == "straight" else torch.sqrt(d_alpha**2 + d_sigma**2)
    assert torch.allclose(a * speed, d_alpha, rtol=1e-9, atol=1e-15)
    assert torch.allclose(b * speed, d_sigma, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", PATHS)
def test_diffuse(name):
    path, gamma = PATHS[name](), tensor([[[[-3.0, 2.0]]], [[[0.0, 5.0]]]])
    alpha, sigma = path.coefficients(gamma)
    x, eps = torch.randn(2, 2, 1, 1, 2, dtype=FLOAT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(path.diffuse(x, gamma, eps), alpha * x + sigma * eps)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("gamma_s", "gamma_t"), [(-13.3, -13.0), (-7.0, -2.5), (-2.0, 4.0), (-13.3, 5.0), (4.99, 5.0)])
def test_reverse_step_against_gaussian_conditioning(name, gamma_s, gamma_t):
    """q(z_s|z_t, x) from the joint of (z_s, z_t): z_t = (alpha_t/alpha_s) z_s + N(0, sigma_t^2 - (...)^2 sigma_s^2).

    Conditioned in exact rational arithmetic of 50 digits, for a step of any size.
    """
    from decimal import Decimal as D
    from decimal import getcontext

    getcontext().prec = 50

    def coefficients(gamma):
        g = D(repr(gamma))
        if name == "vp":
            return (1 / (1 + g.exp())).sqrt(), (1 / (1 + (-g).exp())).sqrt()
        return 1 / (1 + (g / 2).exp()), 1 / (1 + (-g / 2).exp())

    (alpha_s, sigma_s), (alpha_t, sigma_t) = coefficients(gamma_s), coefficients(gamma_t)
    x, eps = D("0.37"), D("-1.21")
    z_t = alpha_t * x + sigma_t * eps
    # Given x: mean alpha x, variances sigma^2, covariance (alpha_t/alpha_s) sigma_s^2.
    covariance = alpha_t / alpha_s * sigma_s**2
    gain = covariance / sigma_t**2
    mean = alpha_s * x + gain * (z_t - alpha_t * x)
    std = (sigma_s**2 - gain * covariance).sqrt()
    found_mean, found_std = PATHS[name]().reverse(
        tensor(float(z_t)), tensor(float(eps)), tensor(gamma_s), tensor(gamma_t)
    )
    assert found_mean.item() == pytest.approx(float(mean), rel=1e-12)
    assert found_std.item() == pytest.approx(float(std), rel=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_reverse_step_keeps_the_marginal(name):
    """q(z_s|z_t, x) q(z_t|x) has the marginal q(z_s|x): mean alpha_s x and variance sigma_s^2, per pixel."""
    path = PATHS[name]()
    gamma_s, gamma_t = tensor([[[[-6.0, -1.0]]]]), tensor([[[[-2.0, 3.0]]]])
    alpha_s, sigma_s = path.coefficients(gamma_s)
    alpha_t, sigma_t = path.coefficients(gamma_t)
    x = torch.full((1, 1, 1, 2), 0.4, dtype=FLOAT)
    ends = []
    for eps in (-1.0, 1.0):  # the mean is linear in eps: its two values give mean and spread
        noise = torch.full_like(x, eps)
        mean, std = path.reverse(alpha_t * x + sigma_t * noise, noise, gamma_s, gamma_t)
        ends.append(mean)
    assert torch.allclose((ends[0] + ends[1]) / 2, alpha_s * x, rtol=1e-12)
    assert torch.allclose(((ends[1] - ends[0]) / 2) ** 2 + std**2, sigma_s**2 * torch.ones_like(x), rtol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_a_flat_stretch_makes_no_nan(name):
    """Rounding makes gamma_s exceed gamma_t by an ulp: the step stands still instead of taking a negative root."""
    path = PATHS[name]()
    gamma_t = torch.tensor([[[[-3.0, 2.0]]]])
    gamma_s = torch.nextafter(gamma_t, torch.full_like(gamma_t, torch.inf))
    assert float(-torch.expm1(gamma_s - gamma_t).max()) < 0
    z = torch.tensor([[[[0.5, -0.2]]]])
    mean, std = path.reverse(z, torch.ones_like(z), gamma_s, gamma_t)
    assert torch.equal(std, torch.zeros_like(std))
    assert torch.allclose(mean, z, rtol=1e-6)
