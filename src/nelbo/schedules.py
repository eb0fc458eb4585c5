r"""Noise schedules: t -> gamma(t, c) and its rate d gamma/dt, where gamma = -log SNR grows with t.

Every schedule is its two ends and an interior u that climbs from 0 to 1 between them:

    (1)  gamma(t, c)  = gamma_0 + (gamma_1 - gamma_0) u(t, c),     u(0) = 0, u(1) = 1
    (2)  gamma'(t, c) =           (gamma_1 - gamma_0) u'(t, c)

Ends      fixed (constants), learned (VDM's b and b + |w|), or free: gamma is the raw network itself,
          without renormalisation, as in the public monotone networks, whose ends move.
Interior  linear            u = t                                                    (VDM eq. 18 with learned ends)
          monotone network  u = (r(t) - r(0)) / (r(1) - r(0)),  positive weights     (VDM appendix H)
          polynomial        u = f(t)/f(1),  f' = (a t^2 + b t + d)^2                  (MuLAN section 3.2.2):
    (3)      f(t) = a^2 t^5/5 + a b t^4/2 + (b^2 + 2 a d) t^3/3 + b d t^2 + d^2 t

a, b and d are functions of the auxiliary latent c, one triple per pixel and channel (MuLAN), one for the whole image
(the adaptive-but-not-multivariate ablation), or free parameters of time alone. Beside ``z_t`` the auxiliary latent is
written c throughout this library; the papers write both as z.

gamma_0 is by default chosen so that noise and bin width keep the ratio that they have at 256 grey levels:

    (4)  gamma_0 = -13.3 + 2 log(256/L)

The discrete process of DDPM is a table: T noise levels from betas, abar_n = prod_{m <= n} (1 - beta_m), n = 0 .. T - 1,

    (5)  gamma_n = log((1 - abar_n)/abar_n) = log(-expm1(S_n)) - S_n,      S_n = sum_{m <= n} log1p(-beta_m)

at the times t = n/(T - 1), with a monotone cubic between them (PCHIP: gamma and gamma' continuous, every gamma_n
exact), so that what is said in continuous time holds too. gamma is never taken beyond gamma_0 and gamma_{T-1}. A
table's gamma is float64: gamma_n - gamma_{n-1} is a hundredth of it, and the timestep n is read off it (networks/).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.cubics import MonotoneCubic
from nelbo.networks.layers import initialise, zero

__all__ = [
    "BETAS",
    "INTERIORS",
    "Interior",
    "Linear",
    "Monotone",
    "PixelMonotone",
    "Polynomial",
    "Schedule",
    "Table",
    "betas",
    "default_gamma_0",
    "gammas_of_betas",
]

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]


def default_gamma_0(levels: int) -> float:
    """Equation (4): -13.3 for 256 grey levels, the same ratio of noise to bin width for any other number."""
    return -13.3 + 2 * math.log(256 / levels)


def _from_alpha_bar(alpha_bar: Callable[[np.ndarray], np.ndarray], timesteps: int) -> np.ndarray:
    """betas whose products follow abar(u)/abar(0), u = 0 .. 1, each at most 0.999."""
    along = alpha_bar(np.arange(timesteps + 1) / timesteps)
    return np.clip(1 - along[1:] / along[:-1], 0, 0.999)


def _sigmoid(u: Any) -> Any:
    return 1 / (1 + np.exp(-u))


# DDPM's straight line and its root's, 1000/T times as steep so that about as much noise comes with any T above 20;
# Nichol and Dhariwal's cosine (2021, eq. 17), s = 0.008; Jabri et al.'s sigmoid from -3 to 3 (2022, figure 8).
BETAS: dict[str, Callable[[int], np.ndarray]] = {
    "linear": lambda n: 1000 / n * np.linspace(1e-4, 0.02, n),
    "quadratic": lambda n: 1000 / n * np.linspace(math.sqrt(1e-4), math.sqrt(0.02), n) ** 2,
    "cosine": lambda n: _from_alpha_bar(lambda u: np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, n),
    "sigmoid": lambda n: _from_alpha_bar(lambda u: _sigmoid(3.0) - _sigmoid(6 * u - 3), n),
}


def betas(kind: str, timesteps: int) -> np.ndarray:
    """The betas of a named form, (T,) float64."""
    if kind not in BETAS:
        raise ValueError(f"betas must be one of {', '.join(BETAS)}, got {kind!r}")
    return BETAS[kind](timesteps)


def gammas_of_betas(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Equation (5): betas (T,) strictly between 0 and 1 -> gamma_n (T,) float64, rising."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.all((values > 0) & (values < 1)):
        raise ValueError(
            "betas must be at least 2 numbers strictly between 0 and 1 (a beta of 1 leaves no signal: gamma would be "
            f"infinite), got {values.size} from {values.min(initial=math.inf):g} to {values.max(initial=-math.inf):g}"
        )
    log_alpha_bar = np.cumsum(np.log1p(-values))
    return np.log(-np.expm1(log_alpha_bar)) - log_alpha_bar


def _positive(weight: Tensor) -> Tensor:
    """|weight| with slope +1 at exactly 0, the convention of the public (JAX) monotone networks."""
    return torch.where(weight < 0, -weight, weight)


def _dense(inputs: int, outputs: int, rank: int | None) -> Any:
    """A dense layer; with a ``rank`` one whose kernel is a product of two."""
    if rank is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


def _column(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), so that times broadcast against images."""
    return t.reshape(-1, 1, 1, 1)


class Interior(nn.Module, ABC):
    """The shape u(t, c) of a schedule between its ends; ``raw(c)`` gives t (B, 1, 1, 1) -> (r, r') unnormalised."""

    timesteps = 0

    @abstractmethod
    def raw(self, c: Tensor | None) -> Curve:
        """The monotone function r and its rate, for one batch of latents; shapes broadcast to (B, C, H, W)."""

    def normalised(self, c: Tensor | None) -> Curve:
        """u = (r - r(0)) / (r(1) - r(0)) and u'."""
        raw = self.raw(c)

        def curve(t: Tensor) -> tuple[Tensor, Tensor]:
            r_0, _ = raw(torch.zeros_like(t))
            r_1, _ = raw(torch.ones_like(t))
            r, rate = raw(t)
            return (r - r_0) / (r_1 - r_0), rate / (r_1 - r_0)

        return curve


class Schedule(nn.Module):
    """gamma(t, c) by equations (1) and (2).

    Parameters: ``interior``, the shape; ``gamma_0`` and ``gamma_1``, the ends (for ``ends="learned"`` their initial
    values); ``ends``: "fixed", "learned" or "free" (gamma = r, the ends given here are then not used).
    """

    def __init__(self, interior: Interior, gamma_0: float, gamma_1: float, ends: str = "fixed") -> None:
        super().__init__()
        if ends not in ("fixed", "learned", "free"):
            raise ValueError(f"ends must be fixed, learned or free, not {ends!r}")
        if not gamma_0 < gamma_1:
            raise ValueError(f"gamma_0 must lie below gamma_1, got {gamma_0} and {gamma_1}")
        self.interior, self.kind = interior, ends
        if ends == "learned":
            self.start = nn.Parameter(torch.tensor([float(gamma_0)]))
            self.slope = nn.Parameter(torch.tensor([float(gamma_1 - gamma_0)]))
        else:
            self.gamma_0, self.gamma_1 = float(gamma_0), float(gamma_1)

    def given(self, c: Tensor | None = None, interior_gradient: Callable[[Tensor], Tensor] = lambda u: u) -> Curve:
        """The schedule of one batch: t (B,) or () -> (gamma, gamma'), each broadcastable to (B, C, H, W).

        The network that maps c to the curve runs once here, however many times are asked for.
        ``interior_gradient`` is applied to u and u' (identity in value): VDM's variance minimisation scales the
        interior's gradient there and leaves that of the ends alone.
        """
        if self.kind == "free":
            raw = self.interior.raw(c)
            return lambda t: raw(_column(t))
        normalised = self.interior.normalised(c)

        def curve(t: Tensor) -> tuple[Tensor, Tensor]:
            u, rate = (interior_gradient(v) for v in normalised(_column(t)))
            if self.kind == "learned":
                slope = _positive(self.slope)
                return self.start + slope * u, slope * rate
            span = self.gamma_1 - self.gamma_0
            return self.gamma_0 + span * u, span * rate

        return curve

    def ends(self, t: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
        """gamma of this schedule's ``curve`` at times 0 and 1, for as many images as t (B,) has entries.

        Fixed ends are constants, (B, 1, 1, 1), whatever the interior is: what depends on them alone needs no gradient.
        """
        if self.kind == "fixed":
            return torch.full_like(_column(t), self.gamma_0), torch.full_like(_column(t), self.gamma_1)
        return curve(torch.zeros_like(t))[0], curve(torch.ones_like(t))[0]

    @property
    def timesteps(self) -> int:
        """T where the schedule is a table of T noise levels, 0 otherwise."""
        return self.interior.timesteps

    def forward(self, t: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """gamma(t, c) and d gamma/dt: t (B,), c (B, size) or None; each broadcastable to (B, C, H, W)."""
        return self.given(c)(t)


class Linear(Interior):
    """u = t. With learned ends this is VDM's default, b + |w| t (VDM section 5 and equation 18)."""

    def raw(self, c: Tensor | None) -> Curve:
        return lambda t: (t, torch.ones_like(t))

    def normalised(self, c: Tensor | None) -> Curve:
        return self.raw(c)


class Monotone(Interior):
    """VDM's monotone network of time alone (appendix H): r = l1(t) + l3(s(l2(2 t - 1)))/width, s = 2 sigmoid - 1."""

    def __init__(self, gamma_0: float, gamma_1: float, width: int = 1024) -> None:
        super().__init__()
        self.width = width
        self.l1 = nn.Linear(1, 1)
        self.l2 = nn.Linear(1, width)
        self.l3 = nn.Linear(width, 1, bias=False)
        nn.init.constant_(self.l1.weight, gamma_1 - gamma_0)
        nn.init.constant_(self.l1.bias, gamma_0)
        for layer in (self.l2, self.l3):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.l2.bias)

    def raw(self, c: Tensor | None) -> Curve:
        w1, w2, w3 = (_positive(layer.weight) for layer in (self.l1, self.l2, self.l3))

        def curve(t: Tensor) -> tuple[Tensor, Tensor]:
            column = t.reshape(-1, 1)
            s = torch.sigmoid(F.linear(2 * (column - 0.5), w2, self.l2.bias))
            value = F.linear(column, w1, self.l1.bias) + F.linear(2 * (s - 0.5), w3) / self.width
            rate = w1 + F.linear(4 * s * (1 - s) * w2.T, w3) / self.width  # ds/dt = 2 * 2 s (1 - s) w2
            return value.reshape(t.shape), rate.expand_as(column).reshape(t.shape)

        return curve


class PixelMonotone(Interior):
    """MuLAN's per-pixel monotone network given c (or time alone when ``condition`` is 0), on u = [c, t]:

    r = l1(t) + l3(s(l_int(s(l2(2 u - 1)))))/width, all weights positive, s = 2 sigmoid - 1; l1 is one line for
    all pixels.
    """

    def __init__(
        self, shape: tuple[int, int, int], gamma_0: float, gamma_1: float, condition: int = 0, width: int = 3072
    ) -> None:
        super().__init__()
        self.shape, self.condition, self.width = tuple(shape), condition, width
        size = math.prod(shape)
        self.l1 = nn.Linear(1, 1)
        self.l2 = nn.Linear(condition + 1, width)
        self.l_int = nn.Linear(width, width)
        self.l3 = nn.Linear(width, size, bias=False)
        nn.init.constant_(self.l1.weight, gamma_1 - gamma_0)
        nn.init.constant_(self.l1.bias, gamma_0)
        for layer in (self.l2, self.l_int, self.l3):
            nn.init.normal_(layer.weight, std=0.01)
        for layer in (self.l2, self.l_int):
            nn.init.zeros_(layer.bias)

    def raw(self, c: Tensor | None) -> Curve:
        w1, w2, w_int, w3 = (_positive(layer.weight) for layer in (self.l1, self.l2, self.l_int, self.l3))

        def curve(t: Tensor) -> tuple[Tensor, Tensor]:
            u = column = t.reshape(-1, 1)
            if self.condition:
                assert c is not None, "a conditioned schedule needs its latent"
                batch = max(len(c), len(u))
                u = torch.cat([c.expand(batch, -1), u.expand(batch, -1)], 1)
            s = torch.sigmoid(F.linear(2 * (u - 0.5), w2, self.l2.bias))
            s_rate = 4 * s * (1 - s) * w2[:, -1]
            v = torch.sigmoid(F.linear(2 * (s - 0.5), w_int, self.l_int.bias))
            v_rate = 2 * v * (1 - v) * F.linear(s_rate, w_int)
            value = F.linear(column, w1, self.l1.bias) + F.linear(2 * (v - 0.5), w3) / self.width
            rate = w1 + F.linear(v_rate, w3) / self.width
            return value.reshape(-1, *self.shape), rate.reshape(-1, *self.shape)

        return curve


class Polynomial(Interior):
    """MuLAN's polynomial, equation (3), one per entry of ``shape``: (C, H, W) per pixel, (1, 1, 1) for a scalar one.

    With ``condition`` > 0, a, b, d come from c (B, condition) through dense -> swish -> dense -> swish -> three heads
    of the given ``width``; with 0 they are parameters (time alone). d = 1e-3 + softplus(.), a starts at 0. With a
    ``rank`` the second layer and the heads, publicly 37.7 of 37.9 M parameters, are each a product of two of that rank.
    """

    def __init__(
        self, shape: tuple[int, int, int], condition: int = 0, width: int = 3072, rank: int | None = None
    ) -> None:
        super().__init__()
        self.shape, self.condition = tuple(shape), condition
        size = math.prod(shape)
        if condition:
            self.dense_1 = nn.Linear(condition, width)
            self.dense_2 = _dense(width, width, rank)
            self.head_a, self.head_b, self.head_d = (_dense(width, size, rank) for _ in range(3))
            zero(self.head_a if rank is None else self.head_a[-1])
            initialise(self)
        else:
            self.a, self.b, self.d = (nn.Parameter(torch.zeros(size)) for _ in range(3))

    def coefficients(self, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, d, each (B, *shape) given c and (1, *shape) otherwise."""
        if self.condition:
            assert c is not None, "a conditioned schedule needs its latent"
            h = F.silu(self.dense_2(F.silu(self.dense_1(c))))
            a, b, d = self.head_a(h), self.head_b(h), self.head_d(h)
        else:
            a, b, d = self.a, self.b, self.d
        a, b, d = (v.reshape(-1, *self.shape) for v in (a, b, 1e-3 + F.softplus(d)))
        return a, b, d

    def raw(self, c: Tensor | None) -> Curve:
        a, b, d = self.coefficients(c)

        def curve(t: Tensor) -> tuple[Tensor, Tensor]:
            third = (b * b + 2 * a * d) / 3
            f = t * (d * d + t * (b * d + t * (third + t * (a * b / 2 + t * (a * a / 5)))))
            return f, (d + t * (b + t * a)) ** 2

        return curve

    def normalised(self, c: Tensor | None) -> Curve:
        raw = self.raw(c)

        def curve(t: Tensor) -> tuple[Tensor, Tensor]:
            total, _ = raw(torch.ones_like(t[:1]))  # f(0) is exactly 0
            f, rate = raw(t)
            return f / total, rate / total

        return curve


class Table(Interior):
    """Equation (5) between its points: gamma_n (T,), rising, at t = n/(T - 1). Buffers, no parameters; float64."""

    def __init__(self, gammas: Sequence[float] | np.ndarray) -> None:
        super().__init__()
        gammas = np.asarray(gammas, dtype=np.float64)
        if gammas.ndim != 1 or len(gammas) < 2 or not np.all(np.diff(gammas) > 0):
            raise ValueError(f"a table needs at least 2 values of gamma that rise, got {gammas.size}")
        self.timesteps = len(gammas)
        self.cubic = MonotoneCubic(np.arange(len(gammas)), gammas)

    def raw(self, c: Tensor | None) -> Curve:
        intervals = self.timesteps - 1

        def curve(t: Tensor) -> tuple[Tensor, Tensor]:
            value, rate = self.cubic(t.double() * intervals)
            return value, rate * intervals

        return curve


INTERIORS: dict[str, type[Interior]] = {
    "betas": Table,
    "linear": Linear,
    "monotone": Monotone,
    "pixel-monotone": PixelMonotone,
    "polynomial": Polynomial,
    "scalar-polynomial": Polynomial,
}
