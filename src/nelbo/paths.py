r"""Paths: gamma -> (alpha, sigma), the corruption  z = alpha x + sigma eps  with  alpha^2/sigma^2 = exp(-gamma).

    (1)  VariancePreserving   alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma)              (VDM eq. 1-3)
    (2)  Straight             alpha = sigmoid(-gamma/2),   sigma = sigmoid(gamma/2)            (i-DODE section 4, "SP")

On every path, with  k = -expm1(gamma_s - gamma_t)  the part of the noise at t that is new since s < t,

    (3)  q(z_s|z_t, x) = N( (alpha_s/alpha_t) (z_t - k sigma_t eps),  k sigma_s^2 )              (VDM eq. 25-33)

where eps = (z_t - alpha_t x)/sigma_t. Shapes: everything broadcasts; gamma may be a number per image or per pixel.

The weight of a velocity's squared error is alpha^2 on both paths (parameterizations.py, equation 3: det = 1). Its
integral over gamma, by which times are drawn in proportion to it (times.py), has the antiderivative

    (4)  mass(gamma) = -int_gamma^inf alpha^2 = 2 log sigma  on VP,  2 (log sigma + alpha)  on Straight   (i-DODE)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PATHS", "Path", "Straight", "VariancePreserving", "bisect"]


def bisect(rising: Callable[[Tensor], Tensor], value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where a rising function takes a value, entry by entry between ``low`` and ``high``, to their last bits."""
    for _ in range(3 - round(math.log2(torch.finfo(low.dtype).eps))):
        middle = (low + high) / 2
        below = rising(middle) < value
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


class Path(ABC):
    """A choice of (alpha, sigma) for each gamma. Stateless."""

    @abstractmethod
    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, shaped as gamma."""

    @abstractmethod
    def derivatives(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha/d gamma and d sigma/d gamma, shaped as gamma."""

    @abstractmethod
    def velocity(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficient pair (a, b) of this path's velocity a x + b eps."""

    @abstractmethod
    def mass(self, gamma: Tensor) -> Tensor:
        """Equation (4), below 0 and rising with gamma; shaped as gamma. Its differences want float64."""

    @abstractmethod
    def inverse_mass(self, mass: Tensor) -> Tensor:
        """The gamma of a mass below 0, shaped as it."""

    def diffuse(self, x: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
        """z = alpha x + sigma eps, shaped as x."""
        alpha, sigma = self.coefficients(gamma)
        return alpha * x + sigma * eps

    def reverse(self, z_t: Tensor, eps: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z_s|z_t, x), equation (3), from eps (or its estimate) at t.

        k is kept at or above 0: where a schedule is flat, rounding makes gamma_s exceed gamma_t by an ulp.
        """
        alpha_s, sigma_s = self.coefficients(gamma_s)
        alpha_t, sigma_t = self.coefficients(gamma_t)
        k = (-torch.expm1(gamma_s - gamma_t)).clamp(min=0)
        return alpha_s / alpha_t * (z_t - k * sigma_t * eps), k.sqrt() * sigma_s


class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1, equation (1); velocity alpha eps - sigma x."""

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()

    def derivatives(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(gamma)
        return -alpha * sigma**2 / 2, sigma * alpha**2 / 2

    def velocity(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, alpha

    def mass(self, gamma: Tensor) -> Tensor:
        return F.logsigmoid(gamma)

    def inverse_mass(self, mass: Tensor) -> Tensor:
        return mass - torch.log(-torch.expm1(mass))  # -log(e^-mass - 1), i-DODE's closed form


class Straight(Path):
    """alpha + sigma = 1, equation (2): flow matching's line; velocity eps - x."""

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-gamma / 2), torch.sigmoid(gamma / 2)

    def derivatives(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(gamma)
        return -alpha * sigma / 2, alpha * sigma / 2

    def velocity(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(alpha)

    def mass(self, gamma: Tensor) -> Tensor:
        return 2 * (F.logsigmoid(gamma / 2) + torch.sigmoid(-gamma / 2))

    def inverse_mass(self, mass: Tensor) -> Tensor:
        # Its alpha is smaller than VP's at the same gamma, so its mass lies above VP's, by 2 at most (at gamma = -inf).
        vp = VariancePreserving()
        return bisect(self.mass, mass, vp.inverse_mass(mass - 2), vp.inverse_mass(mass))


PATHS: dict[str, type[Path]] = {"vp": VariancePreserving, "straight": Straight}
