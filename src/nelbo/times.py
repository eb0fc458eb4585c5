r"""Times in [0, 1) at which the diffusion term is sampled.

    (1)  stratified   t_i = (u + i/n) mod 1,  i = 0 .. n - 1, one shift u             (VDM appendix I.1)
    (2)  uniform      t_i independent
    (3)  importance   t ~ p(t|c) = M'(t, c)/M(1, c),  M(t, c) = sum [mass(gamma(t, c)) - mass(gamma(0, c))]     (i-DODE)

With (1) over a batch the times of a step lie evenly; over the draws of one image they are a randomly shifted
trapezoidal rule: unbiased, of much smaller variance, and not independent, so that an error bar needs several shifts.

M' = sum gamma' alpha^2 is the weight of a velocity's squared error (paths.py, equation 4), so that the term divided by
p weighs all times alike: with one gamma an image it is M(1)/2 |v - v_hat|^2. t solves M(t) = u M(1) with u from (1), by
inverting mass where gamma is a straight line in t, otherwise by bisection of the schedule at hand, learned, per pixel
or given c. t and p take no part in gradients: an integral over t does not depend on the density of its draws.
"""

import torch
from torch import Tensor

from nelbo.paths import Path, bisect
from nelbo.schedules import Curve

__all__ = ["TIMES", "importance", "stratified", "uniform"]


def stratified(u: Tensor, positions: Tensor, n: int) -> Tensor:
    """Equation (1): shifts u and positions i (both broadcastable), n strata."""
    return torch.remainder(u + positions / n, 1.0)


def uniform(u: Tensor, positions: Tensor, n: int) -> Tensor:
    """Equation (2): u must be one number per position."""
    return u


@torch.no_grad()
def importance(u: Tensor, curve: Curve, path: Path, line: bool = False) -> tuple[Tensor, Tensor]:
    """Equation (3): u (B,) uniform in [0, 1) -> t and its density p(t|c), (B,) each.

    ``curve``, the schedule given c, one row for each u; ``line``: it is one straight line in t for all pixels.
    """

    def mass(t: Tensor) -> Tensor:
        return path.mass(curve(t)[0].double()).flatten(1).sum(1)

    zero, one = torch.zeros_like(u), torch.ones_like(u)
    mass_0, mass_1 = mass(zero), mass(one)
    target = mass_1 - (1 - u.double()) * (mass_1 - mass_0)
    if line:
        gamma_0, gamma_1 = (curve(end)[0].double().flatten() for end in (zero, one))
        t = ((path.inverse_mass(target) - gamma_0) / (gamma_1 - gamma_0)).to(u.dtype)
    else:
        t = bisect(mass, target, zero, one)
    gamma, rate = curve(t)
    alpha, _ = path.coefficients(gamma)
    density = (rate * alpha**2).flatten(1).sum(1) / (mass_1 - mass_0).to(u.dtype)
    # Where every pixel's gamma stands still, the term is 0 and so is p: a floor below any density keeps 0/0 away.
    return t, density.clamp(min=torch.finfo(u.dtype).tiny)


# For importance these are the u of equation (3): t follows where the schedule's c is known (objectives.elbo).
TIMES = {"stratified": stratified, "uniform": uniform, "importance": stratified}
