"""Parameterizations: one solve for all, and the error identity by which losses are evaluated in output space."""

import pytest
import torch

from nelbo.parameterizations import PARAMETERIZATIONS, Noise, Velocity, velocity_from_epsilon
from nelbo.paths import PATHS, VariancePreserving
from toys import FLOAT, tensor

PAIRS = [(path, name) for path in PATHS for name in PARAMETERIZATIONS]


def numbers(seed=0, count=3):
    """x, eps, eps_hat and a gamma for each pixel, (4, 2, 3, 3), gamma over the whole range."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 4, 2, 3, 3, generator=random, dtype=FLOAT)
    return *drawn, torch.linspace(-13.3, 5, 72, dtype=FLOAT).reshape(4, 2, 3, 3)


@pytest.mark.parametrize(("path", "name"), PAIRS)
def test_round_trip(path, name):
    """From (x, eps) to z and the target, and back by the solve."""
    path, parameterization = PATHS[path](), PARAMETERIZATIONS[name]()
    x, eps, _, gamma = numbers()
    z, out = path.diffuse(x, gamma, eps), parameterization.target(path, gamma, x, eps)
    x_hat, eps_hat = parameterization.solve(path, gamma, z, out)
    # One of the two is divided by sigma (or alpha), down to 1e-3 (or 1e-1): digits are lost there, no more.
    assert torch.allclose(x_hat, x, atol=1e-13, rtol=0)
    assert torch.allclose(eps_hat, eps, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("path", "name"), PAIRS)
def test_solve_agrees_with_z(path, name):
    """Any output implies estimates with z = alpha x_hat + sigma eps_hat and output = a x_hat + b eps_hat."""
    path, parameterization = PATHS[path](), PARAMETERIZATIONS[name]()
    z, out, _, gamma = numbers(1)
    x_hat, eps_hat = parameterization.solve(path, gamma, z, out)
    assert torch.allclose(path.diffuse(x_hat, gamma, eps_hat), z, atol=1e-12, rtol=0)
    assert torch.allclose(parameterization.target(path, gamma, x_hat, eps_hat), out, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("path", "name"), PAIRS)
def test_error_identity(path, name):
    """|eps - eps_hat|^2 = (alpha/det)^2 |out - target|^2 for an output that implies eps_hat."""
    path, parameterization = PATHS[path](), PARAMETERIZATIONS[name]()
    x, eps, eps_hat, gamma = numbers(2)
    alpha, sigma = path.coefficients(gamma)
    z = path.diffuse(x, gamma, eps)
    out = parameterization.target(path, gamma, (z - sigma * eps_hat) / alpha, eps_hat)
    error = (out - parameterization.target(path, gamma, x, eps)) ** 2
    assert torch.allclose(parameterization.weight(path, gamma) * error, (eps - eps_hat) ** 2, rtol=1e-8)


def test_weights_by_formula():
    """Noise 1; data exp(-gamma); velocity alpha^2 on both paths (det = 1 and alpha + sigma = 1)."""
    gamma = numbers()[-1]
    for path in PATHS.values():
        alpha, _ = path().coefficients(gamma)
        expected = {"noise": torch.ones_like(gamma), "data": torch.exp(-gamma), "velocity": alpha**2}
        for name, weight in expected.items():
            assert torch.allclose(PARAMETERIZATIONS[name]().weight(path(), gamma), weight, rtol=1e-12)


def test_targets_by_formula():
    x, eps, _, gamma = numbers()
    for key, path in PATHS.items():
        alpha, sigma = path().coefficients(gamma)
        velocity = alpha * eps - sigma * x if key == "vp" else eps - x
        for name, target in {"noise": eps, "data": x, "velocity": velocity}.items():
            assert torch.equal(PARAMETERIZATIONS[name]().target(path(), gamma, x, eps), target)


def test_one_gamma_for_an_image_broadcasts():
    x, eps, _, _ = numbers()
    gamma = tensor([-13.3, -4.0, 0.0, 5.0]).reshape(4, 1, 1, 1)
    for path in (p() for p in PATHS.values()):
        for parameterization in (p() for p in PARAMETERIZATIONS.values()):
            assert parameterization.weight(path, gamma).shape == gamma.shape
            whole = parameterization.solve(path, gamma.expand_as(x), x, eps)
            for left, right in zip(parameterization.solve(path, gamma, x, eps), whole, strict=True):
                assert torch.equal(left, right)


def test_velocity_from_epsilon_is_the_noise_loss():
    """A noise network evaluated as a velocity: 1/2 (1 - sigma^2) gamma' |v - v_hat|^2 = 1/2 gamma' |eps - eps_hat|^2,
    and v_hat is the velocity that the solved pair implies."""
    path, (x, eps, eps_hat, gamma) = VariancePreserving(), numbers(3)
    z = path.diffuse(x, gamma, eps)
    v_hat = velocity_from_epsilon(z, gamma, eps_hat)
    _, sigma = path.coefficients(gamma)
    velocity_loss = (1 - sigma**2) * (Velocity().target(path, gamma, x, eps) - v_hat) ** 2
    assert torch.allclose(velocity_loss, (eps - eps_hat) ** 2, rtol=1e-9)
    implied = Velocity().target(path, gamma, *Noise().solve(path, gamma, z, eps_hat))
    assert torch.allclose(v_hat, implied, rtol=1e-9, atol=1e-12)
