r"""Parameterizations: what the network's output means, as a coefficient pair.

    (1)  output = a x + b eps        Noise (0, 1)   Data (1, 0)   Velocity (-sigma, alpha) on VP, (-1, 1) on Straight
    (2)  det = alpha b - sigma a,    x = (b z - sigma out)/det,   eps = (alpha out - a z)/det
    (3)  |eps - eps_hat|^2 = (alpha/det)^2 |out - target|^2

Losses are evaluated in output space by (3): at high noise an eps solved from an estimate of x would lose digits.
MuLAN's velocity loss (supplement 11.1.2) is (3) on VP, where det = 1.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nelbo.paths import Path

__all__ = ["PARAMETERIZATIONS", "Data", "Noise", "Parameterization", "Velocity", "velocity_from_epsilon"]


class Parameterization(ABC):
    """A coefficient pair (a, b) for each gamma on a path; one solve serves all. Stateless."""

    @abstractmethod
    def pair(self, path: Path, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of equation (1), shaped as alpha."""

    def target(self, path: Path, gamma: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """What a perfect network would put out for this x and eps."""
        a, b = self.pair(path, *path.coefficients(gamma))
        return a * x + b * eps

    def solve(self, path: Path, gamma: Tensor, z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (2): the estimates (x_hat, eps_hat) that an output implies; z = alpha x_hat + sigma eps_hat."""
        alpha, sigma = path.coefficients(gamma)
        a, b = self.pair(path, alpha, sigma)
        det = alpha * b - sigma * a
        return (b * z - sigma * out) / det, (alpha * out - a * z) / det

    def weight(self, path: Path, gamma: Tensor) -> Tensor:
        """(alpha/det)^2 of equation (3), shaped as gamma."""
        alpha, sigma = path.coefficients(gamma)
        a, b = self.pair(path, alpha, sigma)
        return (alpha / (alpha * b - sigma * a)) ** 2

    def gain(self, path: Path, gamma: Tensor) -> Tensor:
        """alpha sigma/(2 det): the network's weight in the probability flow (flow.py, equation 2), shaped as gamma."""
        alpha, sigma = path.coefficients(gamma)
        a, b = self.pair(path, alpha, sigma)
        return alpha * sigma / (2 * (alpha * b - sigma * a))

    @abstractmethod
    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """m, for which z/m moves by the network's output alone (flow.py, equation 6), shaped as alpha."""


class Noise(Parameterization):
    """The network estimates eps."""

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha

    def pair(self, path: Path, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


class Data(Parameterization):
    """The network estimates x."""

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma

    def pair(self, path: Path, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(alpha)


class Velocity(Parameterization):
    """The network estimates the path's velocity."""

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)

    def pair(self, path: Path, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return path.velocity(alpha, sigma)


def velocity_from_epsilon(z: Tensor, gamma: Tensor, eps_hat: Tensor) -> Tensor:
    """A noise estimate read as a velocity on the variance-preserving path, v_hat = sqrt(1 + e^gamma) eps_hat -
    e^(gamma/2) z. Public MuLAN evaluates a noise network this way; the loss is identically the noise loss."""
    return torch.sqrt(1 + torch.exp(gamma)) * eps_hat - torch.exp(gamma / 2) * z


PARAMETERIZATIONS: dict[str, type[Parameterization]] = {"noise": Noise, "data": Data, "velocity": Velocity}
