r"""The probability flow: the ODE whose solutions have the diffusion's marginals, and the density that it transports.

    (1)  dz/dt = gamma'(t) [ d alpha/d gamma x_hat + d sigma/d gamma eps_hat ]                (Song et al. 2021, eq. 13)
    (2)        = gamma' [ A z + B out ],      A = (alpha' b - sigma' a)/det,      B = alpha sigma/(2 det)
    (3)  d log p(z)/dt = - sum_i gamma_i' [ A_i + B_i d out_i/d z_i ]                (instantaneous change of variables)
    (4)  log p(z_0) = log N(z_1; 0, s^2 I) + int_0^1 sum_i gamma_i' [ A_i + B_i d out_i/d z_i ] dt

(2) is (1) with (x_hat, eps_hat) solved from the network's output (parameterizations.py, equation 2); alpha', sigma' are
derivatives with respect to gamma, and B has this form on every path because d log(sigma/alpha)/d gamma = 1/2. Per-pixel
schedules need nothing new. The trace in (3) is exact, or estimated with probes e, E[e e^T] = I, by

    (5)  sum_i gamma_i' B_i e_i (J e)_i,      J = d out/d z

whose diagonal part costs no variance where e is +-1. A probe is fixed along a solve. What is integrated is

    (6)  w = z/m,     dw/dt = gamma' (B/m) out(m w),      m = alpha, sigma or 1 for noise, data or velocity

in which the linear part A z is gone: it is solved exactly by m (d log m/d gamma = A), and contributes to (4) the
difference of sum_i log m_i between the ends. Errors of z = m w are measured in units of sigma, the noise at that time:
what the network sees of an error is its size beside sigma, which near the data is a thousandth of what it is at t = 1.

How many steps. The network sees t as tau, the mean of gamma over pixels scaled to [0, 1] (networks/unet.py, equation
1), through sines of up to 1000 rad: 159 waves. A trained network answers to them: the field and its divergence carry
waves along that are small, fast and of no consequence in the mean. N equal steps of a method that weighs every step
alike sum a wave of n periods to nothing, unless n lies near a multiple of N: then they take it for a slow one. So N
must keep clear of 159 and of what lies below. N = 224, for which the fastest wave looks like one of 65 periods, is what
an Adams method takes at least, of steps that are equal in tau:

    (7)  h <= (mean gamma(1) - mean gamma(0)) / (N mean gamma'(t))

A network of timesteps sees t itself, n = t (T - 1), through sines of one radian a timestep and less, so of the same 159
waves where T = 1000: there (7) is h <= 1/N.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nelbo import ode
from nelbo.model import DiffusionModel
from nelbo.paths import bisect

__all__ = ["LEAST_STEPS", "Flow", "Transport", "log_prior", "time_of"]

LEAST_STEPS = {"adams4": 224}  # the N of equation (7); other methods take as many as their error asks for


def log_prior(z: Tensor, scale: float) -> Tensor:
    """log N(z; 0, s^2 I) in nats, (B,) float64."""
    return -0.5 * ((z.double() / scale) ** 2 + math.log(2 * math.pi * scale**2)).flatten(1).sum(1)


def time_of(gamma: Callable[[Tensor], Tensor], level: float, like: Tensor) -> Tensor:
    """The time (B,) at which the mean over pixels of gamma(t) is ``level``, by bisection; an end where it never is."""

    def mean(t: Tensor) -> Tensor:
        return gamma(t).double().expand(len(like), -1, -1, -1).mean((1, 2, 3))

    return bisect(mean, torch.full_like(like, level), torch.zeros_like(like), torch.ones_like(like))


@dataclass(frozen=True)
class Transport:
    """Where the flow took z, and what it says about the density there.

    z (B, C, H, W) at the end; divergence (B,) nats, the integral of the field's divergence from the start to the end,
    so that log p(start) = log p(end) + divergence; ``solution``, the solver's record.
    """

    z: Tensor
    divergence: Tensor | None
    solution: ode.Solution


class Flow:
    """The field (2) of a model for one batch of latents c (B, size); the schedule's network runs once per batch.

    ``probes`` (B, P, C, H, W) for equation (5), averaged over P; None for the exact trace, C H W products of its own.
    """

    def __init__(
        self,
        model: DiffusionModel,
        c: Tensor | None = None,
        *,
        probes: Tensor | None = None,
        flag: Tensor | None = None,
    ) -> None:
        if model.schedule_reads_image:
            raise ValueError("a schedule that reads the image has no probability flow: its reverse process is discrete")
        self.model, self.c, self.flag, self.probes = model, c, flag, probes
        # The network's precision: the state may have more. None: that of the state.
        self.precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        self.rows: Tensor | None = None
        self.at_work: tuple[Any, ...] = ()

    def select(self, rows: Tensor) -> None:
        """Take the examples ``rows`` into work; nothing to do while they stay the same."""
        if rows is not self.rows:
            c, flag, probes = (None if v is None else v[rows] for v in (self.c, self.flag, self.probes))
            self.rows, self.at_work = rows, (self.model.curve(c), c, flag, probes)

    def scale(self, gamma: Tensor) -> Tensor:
        """m of equation (6), shaped as gamma."""
        alpha, sigma = self.model.path.coefficients(gamma)
        return self.model.parameterization.scale(alpha, sigma)

    def field(self, t: Tensor, w: Tensor, rows: Tensor, integrand: bool) -> tuple[Tensor, Tensor | None]:
        """dw/dt of equation (6) and, where asked for, the sum over entries of gamma' B d out/d z."""
        self.select(rows)
        model = self.model
        curve, c, flag, probes = self.at_work
        precision = self.precision or w.dtype
        gamma, rate = curve(t.to(precision))
        m = self.scale(gamma)
        weight = rate * model.parameterization.gain(model.path, gamma)
        z = (m * w).to(precision)
        if not integrand:
            return (weight / m * model(z, gamma, c, flag)).to(w.dtype), None
        out, trace = self.trace(z, gamma, weight, c, flag, probes)
        return (weight / m * out).to(w.dtype), trace

    def trace(
        self, z: Tensor, gamma: Tensor, weight: Tensor, c: Tensor | None, flag: Tensor | None, probes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out, and sum_i weight_i d out_i/d z_i (B,) float64: exact, or by equation (5)."""
        weight = weight.expand_as(z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            out = self.model(z, gamma, c, flag)
            total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
            if probes is None:
                flat, flat_weight = out.flatten(1), weight.flatten(1)
                for i in range(flat.shape[1]):
                    (g,) = torch.autograd.grad(flat[:, i].sum(), z, retain_graph=i + 1 < flat.shape[1])
                    total += (g.flatten(1)[:, i] * flat_weight[:, i]).double()
            else:
                for i in range(probes.shape[1]):
                    e = probes[:, i]
                    (g,) = torch.autograd.grad(out, z, weight * e, retain_graph=i + 1 < probes.shape[1])
                    total += (g * e).flatten(1).double().sum(1) / probes.shape[1]
        return out.detach(), total

    def gamma(self, t: Tensor) -> Tensor:
        """gamma of every example at its time t (B,), broadcastable to images."""
        self.select(torch.arange(len(t), device=t.device))
        return self.at_work[0](t.to(self.precision or t.dtype))[0]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over pixels of what is broadcastable to the images at work: (A,) float64."""
        assert self.rows is not None
        return values.double().flatten(1).mean(1).expand(len(self.rows))

    def noise(self, t: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """sigma and m at t, broadcastable to the states of ``rows``."""
        self.select(rows)
        gamma, _ = self.at_work[0](t.to(self.precision or t.dtype))
        return self.model.path.coefficients(gamma)[1], self.scale(gamma)

    @torch.no_grad()
    def transport(
        self,
        z: Tensor,
        t_0: float | Tensor,
        t_1: float,
        *,
        divergence: bool = False,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        method: str = "dopri5",
        least_steps: int | None = None,
        **solver: Any,
    ) -> Transport:
        """The flow from z (B, C, H, W) at t_0 (a number, or (B,)) to t_1, the network in evaluation mode.

        An entry's tolerance is sigma (atol + rtol |z|), the log-density's, per dimension, atol + rtol of its size.
        ``least_steps``, the N of equation (7) from t = 0 to 1, by default LEAST_STEPS; ``solver``: first_step and
        max_steps (10 000) of ``ode.solve``.
        """
        dimensions = z[0].numel()
        begin, end = (torch.as_tensor(t, dtype=torch.float64, device=z.device).expand(len(z)) for t in (t_0, t_1))
        self.select(torch.arange(len(z), device=z.device))
        gamma_start, gamma_end, gamma_0, gamma_1 = (
            self.at_work[0](t.to(self.precision or t.dtype))[0]
            for t in (begin, end, torch.zeros_like(begin), torch.ones_like(begin))
        )
        m_0, m_1, climb = self.scale(gamma_start), self.scale(gamma_end), self.mean(gamma_1) - self.mean(gamma_0)

        def field(t: Tensor, w: Tensor, rows: Tensor, integrand: bool) -> tuple[Tensor, Tensor | None]:
            speed, trace = self.field(t, w, rows, integrand)
            return speed, None if trace is None else trace / dimensions  # so that tolerances are per dimension

        def tolerance(t: Tensor, rows: Tensor, size: Tensor) -> Tensor:
            sigma, m = self.noise(t, rows)
            return sigma * (atol / m + rtol * size)

        least_steps = LEAST_STEPS.get(method, 1) if least_steps is None else least_steps
        if least_steps < 1:
            raise ValueError(f"least_steps must be at least 1, got {least_steps}")

        def longest(t: Tensor, rows: Tensor) -> Tensor:
            if self.model.schedule.timesteps:
                return torch.full_like(t, 1 / least_steps)
            self.select(rows)
            rate = self.mean(self.at_work[0](t.to(self.precision or t.dtype))[1])
            return climb[rows] / (least_steps * rate)

        training = self.model.training
        self.model.eval()
        try:
            solution = ode.solve(
                field, z / m_0, t_0, t_1, rtol=rtol, atol=atol, method=method, quadrature=divergence,
                tolerance=tolerance, longest_step=longest if least_steps > 1 else math.inf,
                **{"max_steps": 10_000} | solver,
            )  # fmt: skip
        finally:
            self.model.train(training)
        total = None
        if solution.quadrature is not None:
            linear = (m_1.double().log() - m_0.double().log()).expand(z.shape).flatten(1).sum(1)
            total = solution.quadrature * dimensions + linear
        return Transport(solution.y * m_1, total, solution)
