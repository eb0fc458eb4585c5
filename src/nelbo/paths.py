r"""Paths: gamma -> (alpha, sigma), the corruption  z = alpha x + sigma eps  with  alpha^2/sigma^2 = exp(-gamma).

    (1)  VariancePreserving   alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma)              (VDM eq. 1-3)
    (2)  Straight             alpha = sigmoid(-gamma/2),   sigma = sigmoid(gamma/2)            (i-DODE section 4, "SP")

On every path, with  k = -expm1(gamma_s - gamma_t)  the part of the noise at t that is new since s < t,

    (3)  q(z_s|z_t, x) = N( (alpha_s/alpha_t) (z_t - k sigma_t eps),  k sigma_s^2 )              (VDM eq. 25-33)

where eps = (z_t - alpha_t x)/sigma_t. Shapes: everything broadcasts; gamma may be a number per image or per pixel.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["PATHS", "Path", "Straight", "VariancePreserving"]


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


class Straight(Path):
    """alpha + sigma = 1, equation (2): flow matching's line; velocity eps - x."""

    def coefficients(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-gamma / 2), torch.sigmoid(gamma / 2)

    def derivatives(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(gamma)
        return -alpha * sigma / 2, alpha * sigma / 2

    def velocity(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(alpha)


PATHS: dict[str, type[Path]] = {"vp": VariancePreserving, "straight": Straight}
