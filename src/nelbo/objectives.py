r"""The evidence lower bound, term by term, per image, in nats. Nothing here draws a random number.

    (1)  -log p(v) <= prior + reconstruction + diffusion + latent
    (2)  prior            KL(q(z_1|x,c) || N(0, s^2 I))
                              = 1/2 sum [ (sigma_1^2 + alpha_1^2 x^2)/s^2 - 1 - log(sigma_1^2/s^2) ]
    (3)  reconstruction   -log p(v|z_0)                                                       (pixels.py)
    (4)  diffusion        1/2 E_t sum gamma'(t) |eps - eps_hat|^2                             (VDM eq. 17; MuLAN eq. 8)
    (5)  at finite T      T/2 E_i sum expm1(gamma_t - gamma_s) |eps - eps_hat|^2,  t = i/T, s = (i-1)/T    (VDM eq. 14)
    (6)  latent           KL(q(c|x) || p(c))                                                  (latents.py)

|eps - eps_hat|^2 is evaluated in output space (parameterizations.py, equation 3). With a schedule per pixel the weights
stand inside the sum.

c = x_0 (MuLAN's ablation). Where the schedule reads the image itself, the reverse step can only use gamma of x_hat, so
q(z_s|z_t,x) and p(z_s|z_t) differ in variance too and the term is the KL of two Gaussians; it exists at finite T only:

    (7)  T E_i sum [ log(sigma_p/sigma_q) + (sigma_q^2 + (mu_q - mu_p)^2)/(2 sigma_p^2) - 1/2 ]

Second order (i-DODE, fine-tuning). The score of z is -E[eps|z]/sigma, and its derivative in z_i is (Var(eps_i|z) - 1)/
sigma_i^2: so the exact denoiser has sigma_i d eps_hat_i/d z_i = 1 - Var(eps_i|z), of which |eps_i - eps_hat_i|^2 (held
constant) is a sample. Training may add the squared residual of the trace,

    (8)  1/2 E_t r^2/D,     r = sum sqrt(gamma') [ sigma d eps_hat_i/d z_i - 1 + |eps - eps_hat|^2 ]
    (9)                       = sum sqrt(gamma') (alpha/det) [ sigma d out_i/d z_i - b + (alpha/det) |out - target|^2 ]

which is i-DODE's on both paths, for velocity and noise (its normalised velocity on the straight path is 1/sqrt 2 of
ours). The derivatives are estimated with one probe e, E[e e^T] = I, by sum w_i e_i (J e)_i, J = d out/d z. The square
of the estimate exceeds (8) by its variance, a penalty on the other entries of J, as publicly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nelbo import pixels, times
from nelbo.latents import LatentDraw
from nelbo.model import DiffusionModel
from nelbo.schedules import Curve, Linear

__all__ = [
    "GradientScale",
    "Terms",
    "TermsAndSecondOrder",
    "diffusion_term",
    "discrete_times",
    "elbo",
    "image_schedule_step",
    "prior_term",
    "second_order_residual",
]


@dataclass(frozen=True)
class Terms:
    """The four terms of the bound for each image, (B,) in nats.

    ``latent`` is what the posterior's authors charge, ``valid_latent`` what makes the sum a bound; they differ for the
    paper's k-hot only.
    """

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    latent: Tensor
    valid_latent: Tensor

    @property
    def total(self) -> Tensor:
        """The bound as its authors compute it, (B,)."""
        return self.prior + self.reconstruction + self.diffusion + self.latent

    @property
    def valid_total(self) -> Tensor:
        """A bound on -log p(v), (B,)."""
        return self.prior + self.reconstruction + self.diffusion + self.valid_latent

    @property
    def loss(self) -> Tensor:
        """What training minimises, (B,)."""
        return self.total


@dataclass(frozen=True)
class TermsAndSecondOrder(Terms):
    """The bound's terms and, no part of it, what second-order training adds to the loss, (B,) nats."""

    second_order: Tensor

    @property
    def loss(self) -> Tensor:
        return self.total + self.second_order


class GradientScale:
    """VDM's variance minimisation (appendix I.2) in one backward pass.

    The ends of the schedule follow the gradient of the loss l_i, the interior that of the estimator's second moment
    E[l^2], which is E[2 l dl/du]. So u and u' are passed through this function, which multiplies their gradient by
    ``factor`` (B,): 2 l_i, known once the forward pass is through and set then.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None

    def __call__(self, u: Tensor) -> Tensor:
        if not u.requires_grad:
            return u
        scaled = u.clone()
        scaled.register_hook(self._scale)
        return scaled

    def _scale(self, gradient: Tensor) -> Tensor:
        assert self.factor is not None, "the loss must set factor before the backward pass"
        return gradient * self.factor.reshape(-1, 1, 1, 1)


def discrete_times(t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The grid step (s, t) = ((i-1)/T, i/T) that a time in [0, 1) falls into; (B,) each."""
    i = (torch.floor(t * steps) + 1).clamp(max=steps)
    return (i - 1) / steps, i / steps


def prior_term(model: DiffusionModel, x: Tensor, gamma_1: Tensor) -> Tensor:
    """Equation (2): encoded images (B, C, H, W) -> (B,) nats."""
    alpha, sigma = model.path.coefficients(gamma_1)
    s_2 = model.prior_scale**2
    variance = sigma**2 / s_2
    return 0.5 * (variance + alpha**2 * x**2 / s_2 - 1 - torch.log(variance)).flatten(1).sum(1)


def diffusion_term(
    model: DiffusionModel,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    c: Tensor | None = None,
    *,
    steps: int = 0,
    flag: Tensor | None = None,
    curve: Curve | None = None,
    density: Tensor | None = None,
) -> Tensor:
    """Equation (4), or (5) where ``steps`` > 0, at one t and eps per image: (B,) nats, unbiased for uniform t.

    x, eps: (B, C, H, W) reals; t: (B,) in [0, 1); c: (B, size) or None; ``curve``, the schedule given c, where the
    caller already has it; ``density`` (B,), of t where it was not drawn uniformly: the term is divided by it.
    """
    if model.schedule_reads_image:
        return _image_schedule_term(model, x, t, eps, steps, flag)
    curve = curve or model.curve(c)
    if steps:
        s, t = discrete_times(t, steps)
    gamma, rate = curve(t)
    weight = 0.5 * rate if not steps else 0.5 * steps * torch.expm1((gamma - curve(s)[0]).clamp(min=0))
    z = model.path.diffuse(x, gamma, eps)
    error = model(z, gamma, c, flag) - model.parameterization.target(model.path, gamma, x, eps)
    term = (weight * model.parameterization.weight(model.path, gamma) * error**2).flatten(1).sum(1)
    return term if density is None else term / density


def second_order_residual(
    model: DiffusionModel,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    probe: Tensor,
    c: Tensor | None = None,
    *,
    flag: Tensor | None = None,
    curve: Curve | None = None,
) -> Tensor:
    """r of equation (9), (B,), at one t, eps and probe (B, C, H, W) of -1 and 1 per image.

    Its gradient reaches the network only: schedule and latent follow the bound.
    """
    with torch.no_grad():
        gamma, rate = (curve or model.curve(c))(t)
        alpha, sigma = model.path.coefficients(gamma)
        a, b = model.parameterization.pair(model.path, alpha, sigma)
        gain = alpha / (alpha * b - sigma * a)
        z, target = model.path.diffuse(x, gamma, eps), model.parameterization.target(model.path, gamma, x, eps)
    # The fused kernels of attention have no second derivative.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        z.requires_grad_()
        out = model(z, gamma, None if c is None else c.detach(), flag)
        along = rate.sqrt() * gain * sigma * probe
        (product,) = torch.autograd.grad(out, z, along, create_graph=True)
    rest = rate.sqrt() * gain * (gain * (out.detach() - target) ** 2 - b)
    return (product * probe + rest).flatten(1).sum(1)


def _image_schedule_term(
    model: DiffusionModel, x: Tensor, t: Tensor, eps: Tensor, steps: int, flag: Tensor | None
) -> Tensor:
    """Equation (7), (B,) nats: q moves by gamma(t, x), p by gamma(t, x_hat)."""
    if not steps:
        raise ValueError("a schedule that reads the image has a bound at finite T only: give steps")
    s, t = discrete_times(t, steps)
    given_x = model.schedule.given(x.flatten(1))
    gamma_t, gamma_s = given_x(t)[0], given_x(s)[0]
    z = model.path.diffuse(x, gamma_t, eps)
    mean_q, std_q = model.path.reverse(z, eps, gamma_s, gamma_t)
    mean_p, std_p, _ = image_schedule_step(model, z, s, t, flag)
    # Where a schedule is flat both steps are of no width: a floor far below any step keeps the KL finite there.
    std_q, std_p = std_q.clamp(min=1e-8), std_p.clamp(min=1e-8)
    kl = torch.log(std_p / std_q) + (std_q**2 + (mean_q - mean_p) ** 2) / (2 * std_p**2) - 0.5
    return steps * kl.flatten(1).sum(1)


def image_schedule_step(
    model: DiffusionModel, z: Tensor, s: Tensor, t: Tensor, flag: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of p(z_s|z_t), and x_hat, where the schedule reads the image: gamma of x_hat."""
    x_hat = model(z, model.level_gamma(t), None, flag).clamp(-1, 1)
    given = model.schedule.given(x_hat.flatten(1))
    gamma_t, gamma_s = given(t)[0], given(s)[0]
    alpha, sigma = model.path.coefficients(gamma_t)
    mean, std = model.path.reverse(z, (z - alpha * x_hat) / sigma, gamma_s, gamma_t)
    return mean, std, x_hat


def elbo(
    model: DiffusionModel,
    images: Tensor,
    *,
    t: Tensor,
    eps: Tensor,
    eps_0: Tensor,
    latent: LatentDraw | None = None,
    flag: Tensor | None = None,
    steps: int = 0,
    variance: bool = False,
    importance: bool = False,
    second_order: float = 0.0,
    probe: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Terms:
    """All terms of equation (1) for whole-number images (B, C, H, W), from given times and noise.

    t (B,) in [0, 1); eps, eps_0 (B, C, H, W) standard normal, for the diffusion and the reconstruction; ``latent``, a
    draw of q(c|x); ``flag`` (B,); ``steps`` T, 0 for continuous time. ``variance``: the interior of the schedule gets
    the gradient of the estimator's second moment (GradientScale). ``importance``: t is u of times.importance.
    ``second_order`` > 0: TermsAndSecondOrder, with this weight on equation (8), from ``probe`` (B, C, H, W).
    """
    if steps and (importance or second_order):
        raise ValueError("importance-sampled times and the second order are of continuous time: steps must be 0")
    x = pixels.encode(images, model.levels, dtype)
    c = None if latent is None else latent.c
    scale = GradientScale() if variance else None
    if model.schedule_reads_image:
        curve = model.schedule.given(x.flatten(1))
    else:
        curve = model.curve(c, scale) if scale else model.curve(c)
    density = None
    if importance:
        t, density = times.importance(t, curve, model.path, isinstance(model.schedule.interior, Linear))
    gamma_0, _ = curve(torch.zeros_like(t))
    gamma_1, _ = curve(torch.ones_like(t))
    z_0 = x + torch.exp(gamma_0 / 2) * eps_0  # over alpha_0: a product and a quotient would each round it
    reconstruction = -pixels.log_likelihood(images, z_0, torch.ones_like(gamma_0), gamma_0, model.levels)
    diffusion = diffusion_term(model, x, t, eps, c, steps=steps, flag=flag, curve=curve, density=density)
    if scale:
        scale.factor = 2 * diffusion.detach()
    zero = torch.zeros_like(diffusion)
    terms = Terms(
        prior=prior_term(model, x, gamma_1),
        reconstruction=reconstruction,
        diffusion=diffusion,
        latent=zero if latent is None else latent.kl,
        valid_latent=zero if latent is None else latent.valid_kl,
    )
    if not second_order:
        return terms
    assert probe is not None, "the second order needs a probe"
    residual = second_order_residual(model, x, t, eps, probe, c, flag=flag, curve=curve)
    added = 0.5 * second_order * residual**2 / model.dimensions
    return TermsAndSecondOrder(**vars(terms), second_order=added if density is None else added / density)
