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

DDPM. At finite T the reverse steps may have another variance than q(z_s|z_t,x), and x_hat may be clipped to the data's
range; with k = -expm1(gamma_s - gamma_t),

    (10)  p(z_s|z_t) = N(mu(z_t, x_hat), sigma_p^2),   log sigma_p^2 = f log(k sigma_t^2) + (1 - f) log(k sigma_s^2)
    (11)  KL(q(z_s|z_t,x) || p(z_s|z_t)) = 1/2 sum [ log(sigma_p^2/sigma_q^2) + sigma_q^2/sigma_p^2 - 1
                                                     + (alpha_s k)^2 (x - x_hat)^2/sigma_p^2 ],  sigma_q^2 = k sigma_s^2

f is 0 (fixed-small), 1 (fixed-large, DDPM's beta_t) or learned, f = (v + 1)/2, v an output of the network (Nichol and
Dhariwal 2021, eq. 15). f = 0 without clipping is (5). DDPM's T noise levels are T - 1 such steps and the decoder at the
first level, the same network's Gaussian around x_hat(z_0), integrated over the bin (pixels.py, equation 9). Its
variance is (10) between the first two levels, where log(k sigma_t^2) is replaced by that of the first step of all,
log sigma_0^2, if it is learned, and f is 0 if it is fixed: so in the public code, where q(z_{-1}|z_0,x) has variance 0.

    (12)  weighted   E w |out - target|^p/D, p = 2 or 1, at uniform levels; in front of |eps - eps_hat|^2 stands
          w = (det/alpha)^2 (none: the output's own error), 1 (SNR), min(SNR, 5)/SNR (min-SNR), (k + SNR)^-g (P2)
    (13)  hybrid     (12) + lambda L,   L the bound (11) in bits/dim with the gradient of x_hat stopped, lambda = 0.001
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nelbo import pixels, times
from nelbo.latents import LatentDraw
from nelbo.model import DiffusionModel, Reverse
from nelbo.schedules import Curve, Linear

__all__ = [
    "GradientScale",
    "Terms",
    "TermsAndError",
    "TermsAndSecondOrder",
    "Weighting",
    "decoder_term",
    "diffusion_term",
    "discrete_times",
    "elbo",
    "image_schedule_step",
    "prior_term",
    "reverse_moments",
    "second_order_residual",
    "weighted",
]


@dataclass(frozen=True)
class Terms:
    """The four terms of the bound for each image, (B,) in nats.

    ``latent`` is what the posterior's authors charge, ``valid_latent`` what makes the sum a bound; they differ for the
    paper's k-hot only. Beside them ``squared_error``, the mean over entries of (x - x_hat)^2 where the diffusion term
    was taken, in units of encode's x.
    """

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    latent: Tensor
    valid_latent: Tensor
    squared_error: Tensor | None = field(default=None, kw_only=True)

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


@dataclass(frozen=True)
class TermsAndError(Terms):
    """The bound's terms and, no part of it, the weighted error (12), (B,), of which training may minimise the sum with
    ``hybrid`` times the bound (13). ``loss`` is in nats, so that in bits/dim it is the error itself."""

    error: Tensor
    hybrid: float
    dimensions: int

    @property
    def loss(self) -> Tensor:
        bound = self.hybrid * (self.reconstruction + self.diffusion) if self.hybrid else 0.0
        return self.error * self.dimensions * math.log(2) + bound


@dataclass(frozen=True)
class Weighting:
    """Equations (12) and (13). ``norm``: l2 or l1; ``weight``: none, snr, min-snr or p2; ``hybrid``: lambda."""

    norm: str = "l2"
    weight: str = "none"
    min_snr: float = 5.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    hybrid: float = 0.0

    def __call__(self, model: DiffusionModel, gamma: Tensor) -> Tensor:
        """The weight of the output's error, shaped as gamma."""
        if self.weight == "none":
            return torch.ones_like(gamma)
        of_noise = model.parameterization.weight(model.path, gamma)
        snr = torch.exp(-gamma)
        if self.weight == "min-snr":
            return of_noise * snr.clamp(max=self.min_snr) / snr
        if self.weight == "p2":
            return of_noise * (self.p2_k + snr) ** -self.p2_gamma
        return of_noise


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
    return _diffusion(model, x, t, eps, c, steps=steps, flag=flag, curve=curve, density=density)[0]


def _diffusion(
    model: DiffusionModel,
    x: Tensor,
    t: Tensor,
    eps: Tensor,
    c: Tensor | None,
    *,
    steps: int,
    flag: Tensor | None,
    curve: Curve | None,
    density: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``diffusion_term``, and the mean over entries of (x - x_hat)^2, (B,) each."""
    if model.schedule_reads_image:
        return _image_schedule_term(model, x, t, eps, steps, flag), None
    curve = curve or model.curve(c)
    t = _precise(model, t)
    if steps:
        s, t = discrete_times(t, steps)
    gamma, rate = curve(t)
    z = model.path.diffuse(x, gamma, eps).to(x.dtype)
    out, v = model.outputs(z, gamma, c, flag)
    if steps and model.reverse != replace(model.reverse, variance="fixed-small", clip=False):
        x_hat = _estimate(model, z, gamma, out)
        return steps * _transition(model, x, x_hat, curve(s)[0], gamma, v), _mean_square(x - x_hat)
    weight = 0.5 * rate if not steps else 0.5 * steps * torch.expm1((gamma - curve(s)[0]).clamp(min=0))
    gain = model.parameterization.weight(model.path, gamma)
    square = (out - model.parameterization.target(model.path, gamma, x, eps)) ** 2
    term = (weight * gain * square).flatten(1).sum(1)
    error = (torch.exp(gamma) * gain * square).detach().flatten(1).mean(1)
    return term if density is None else term / density, error


def _precise(model: DiffusionModel, t: Tensor) -> Tensor:
    """Times of a table are float64: its gamma must not move by a rounding of t."""
    return t.double() if model.schedule.timesteps else t


def _mean_square(values: Tensor) -> Tensor:
    return (values.detach() ** 2).flatten(1).mean(1)


def _estimate(model: DiffusionModel, z: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """x_hat, clipped where the model does so."""
    x_hat, _ = model.parameterization.solve(model.path, gamma, z, out)
    return x_hat.clamp(-1, 1) if model.reverse.clip else x_hat


def _log_variances(model: DiffusionModel, gamma_s: Tensor, gamma_t: Tensor) -> tuple[Tensor, Tensor]:
    """log(k sigma_s^2) and log(k sigma_t^2), k kept above 0 where rounding would make it negative."""
    log_k = torch.log((-torch.expm1(gamma_s - gamma_t)).clamp(min=torch.finfo(gamma_t.dtype).tiny))
    (_, sigma_s), (_, sigma_t) = model.path.coefficients(gamma_s), model.path.coefficients(gamma_t)
    return log_k + 2 * sigma_s.log(), log_k + 2 * sigma_t.log()


def _between(variance: str, small: Tensor, large: Tensor, v: Tensor | None) -> Tensor:
    """log sigma_p^2 of equation (10)."""
    if variance == "learned":
        assert v is not None, "the network has no output for the variance"
        f = (v.to(small.dtype) + 1) / 2
        return f * large + (1 - f) * small
    return large if variance == "fixed-large" else small


def _transition(
    model: DiffusionModel, x: Tensor, x_hat: Tensor, gamma_s: Tensor, gamma_t: Tensor, v: Tensor | None
) -> Tensor:
    """Equation (11), (B,) nats."""
    small, large = _log_variances(model, gamma_s, gamma_t)
    log_p = _between(model.reverse.variance, small, large, v)
    alpha_s, _ = model.path.coefficients(gamma_s)
    moved = alpha_s * torch.expm1(gamma_s - gamma_t) * (x - x_hat)
    kl = 0.5 * (log_p - small + torch.exp(small - log_p) - 1 + moved**2 * torch.exp(-log_p))
    return kl.expand(x.shape).flatten(1).sum(1)


def decoder_term(
    model: DiffusionModel, images: Tensor, z_0: Tensor, c: Tensor | None = None, flag: Tensor | None = None
) -> Tensor:
    """-log p(images|z_0) by the network's Gaussian at the lowest noise level, (B,) nats; z_0 (B, C, H, W).

    The lowest level is t = 0 of a table of T levels, whose second one t = 1/(T - 1) gives the variance.
    """
    curve, zero = model.curve(c), torch.zeros(len(z_0), dtype=torch.float64, device=z_0.device)
    gamma = curve(zero)[0]
    out, v = model.outputs(z_0, gamma, c, flag)
    return _decoder(model, images, _estimate(model, z_0, gamma, out), v, curve)


def _decoder(model: DiffusionModel, images: Tensor, x_hat: Tensor, v: Tensor | None, curve: Curve) -> Tensor:
    if not model.schedule.timesteps:
        raise ValueError("the gaussian decoder needs a schedule of betas: the first two levels give its variance")
    zero = torch.zeros(1, dtype=torch.float64, device=x_hat.device)
    first, second = curve(zero)[0], curve(zero + 1 / (model.schedule.timesteps - 1))[0]
    small, _ = _log_variances(model, first, second)
    learned = model.reverse.variance == "learned"
    log_variance = _between("learned", small, 2 * model.path.coefficients(first)[1].log(), v) if learned else small
    return -pixels.bin_log_likelihood(images, x_hat, log_variance, model.levels, model.data_scale)


def reverse_moments(
    model: DiffusionModel,
    z: Tensor,
    gamma_s: Tensor,
    gamma_t: Tensor,
    c: Tensor | None = None,
    flag: Tensor | None = None,
    reverse: Reverse | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of p(z_s|z_t), equation (10), and x_hat; in the precision of z (B, C, H, W).

    ``reverse``: another variance, if it is a fixed one, and clipping than the model's own.
    """
    reverse = reverse or model.reverse
    out, v = model.outputs(z, gamma_t, c, flag)
    x_hat, eps_hat = model.parameterization.solve(model.path, gamma_t, z, out)
    if reverse.clip:
        alpha, sigma = model.path.coefficients(gamma_t)
        x_hat = x_hat.clamp(-1, 1)
        eps_hat = (z - alpha * x_hat) / sigma
    mean, std = model.path.reverse(z, eps_hat, gamma_s, gamma_t)
    if reverse.variance != "fixed-small":
        std = torch.exp(0.5 * _between(reverse.variance, *_log_variances(model, gamma_s, gamma_t), v))
    return mean.to(z.dtype), std.to(z.dtype), x_hat.to(z.dtype)


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
    decoded: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Terms:
    """All terms of equation (1) for whole-number images (B, C, H, W), from given times and noise.

    t (B,) in [0, 1); eps, eps_0 (B, C, H, W) standard normal, for the diffusion and the reconstruction; ``latent``, a
    draw of q(c|x); ``flag`` (B,); ``steps`` T, 0 for continuous time. ``variance``: the interior of the schedule gets
    the gradient of the estimator's second moment (GradientScale). ``importance``: t is u of times.importance.
    ``second_order`` > 0: TermsAndSecondOrder, with this weight on equation (8), from ``probe`` (B, C, H, W).
    ``decoded``: indices of the images whose gaussian decoder is asked, which costs another pass of the network; the
    reconstruction of the others is given as 0. By default all.
    """
    if steps and (importance or second_order):
        raise ValueError("importance-sampled times and the second order are of continuous time: steps must be 0")
    x = model.reals(images, dtype)
    c = None if latent is None else latent.c
    scale = GradientScale() if variance else None
    if model.schedule_reads_image:
        curve = model.schedule.given(x.flatten(1))
    else:
        curve = model.curve(c, scale) if scale else model.curve(c)
    density = None
    if importance:
        t, density = times.importance(t, curve, model.path, isinstance(model.schedule.interior, Linear))
    t = _precise(model, t)
    gamma_0, gamma_1 = model.schedule.ends(t, curve)
    if model.reverse.decoder == "gaussian":
        reconstruction = _decoded(model, images, x, gamma_0, eps_0, c, flag, decoded)
    else:
        reconstruction = _softmax(model, images, x, gamma_0, eps_0)
    diffusion, error = _diffusion(model, x, t, eps, c, steps=steps, flag=flag, curve=curve, density=density)
    if scale:
        scale.factor = 2 * diffusion.detach()
    zero = torch.zeros_like(diffusion)
    terms = Terms(
        prior=prior_term(model, x, gamma_1),
        reconstruction=reconstruction,
        diffusion=diffusion,
        latent=zero if latent is None else latent.kl,
        valid_latent=zero if latent is None else latent.valid_kl,
        squared_error=None if error is None else error / model.data_scale**2,
    )
    if not second_order:
        return terms
    assert probe is not None, "the second order needs a probe"
    residual = second_order_residual(model, x, t, eps, probe, c, flag=flag, curve=curve)
    added = 0.5 * second_order * residual**2 / model.dimensions
    return TermsAndSecondOrder(**vars(terms), second_order=added if density is None else added / density)


def _softmax(model: DiffusionModel, images: Tensor, x: Tensor, gamma_0: Tensor, eps_0: Tensor) -> Tensor:
    """-log p(images|z_0) by equation (2) of pixels.py, (B,) nats, in units of encode's x."""
    gamma_0 = gamma_0 - 2 * math.log(model.data_scale)
    z_0 = x / model.data_scale + torch.exp(gamma_0 / 2) * eps_0  # over alpha_0: a product and a quotient would round it
    return -pixels.log_likelihood(images, z_0, torch.ones_like(gamma_0), gamma_0, model.levels)


def _decoded(
    model: DiffusionModel,
    images: Tensor,
    x: Tensor,
    gamma_0: Tensor,
    eps_0: Tensor,
    c: Tensor | None,
    flag: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    """``decoder_term`` of the images in ``rows``, 0 for the others; (B,) nats."""
    z_0 = model.path.diffuse(x, gamma_0, eps_0).to(x.dtype)
    if rows is None:
        return decoder_term(model, images, z_0, c, flag)
    found = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    if len(rows):
        c, flag = (None if v is None else v[rows] for v in (c, flag))
        found[rows] = decoder_term(model, images[rows], z_0[rows], c, flag)
    return found


def weighted(
    model: DiffusionModel,
    images: Tensor,
    weighting: Weighting | None,
    *,
    t: Tensor,
    eps: Tensor,
    eps_0: Tensor | None = None,
    latent: LatentDraw | None = None,
    flag: Tensor | None = None,
    steps: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Terms:
    """Equation (12) or (13) and, from the same pass of the network, a draw of the bound's terms; arguments as in
    ``elbo``. Without a ``weighting`` the loss is the bound.

    With a gaussian decoder t falls on one of the steps + 1 noise levels with equal chance, as in DDPM; the decoder is
    asked at the first of them, a step of the chain at the others, each counted steps + 1 times: every image has one of
    the two, not both.
    """
    x = model.reals(images, dtype)
    c = None if latent is None else latent.c
    curve, t = model.curve(c), _precise(model, t)
    first = None
    if model.reverse.decoder == "gaussian":
        if not steps:
            raise ValueError("a gaussian decoder is trained at finite T: give steps")
        level = torch.floor(t * (steps + 1)).clamp(max=steps)
        s, t, first = (level - 1).clamp(min=0) / steps, level / steps, level == 0
    elif steps:
        s, t = discrete_times(t, steps)
    gamma_0, gamma_1 = model.schedule.ends(t, curve)
    gamma, rate = curve(t)
    z = model.path.diffuse(x, gamma, eps).to(dtype)
    out, v = model.outputs(z, gamma, c, flag)
    apart = out - model.parameterization.target(model.path, gamma, x, eps)
    stopped = out.detach() if weighting is not None else out
    x_hat = _estimate(model, z, gamma, stopped)
    if steps:
        gamma_s = torch.where(first.reshape(-1, 1, 1, 1), gamma - 1, curve(s)[0]) if first is not None else curve(s)[0]
        diffusion = _transition(model, x, x_hat, gamma_s, gamma, v)
    else:
        diffusion = (0.5 * rate * model.parameterization.weight(model.path, gamma) * apart**2).flatten(1).sum(1)
    if first is None:
        assert eps_0 is not None, "the decoder needs noise of its own"
        reconstruction = _softmax(model, images, x, gamma_0, eps_0)
        diffusion = diffusion * max(steps, 1)
    else:
        at = torch.nonzero(first)[:, 0]
        reconstruction = torch.zeros_like(diffusion)
        if len(at):
            decoded = _decoder(model, images[at], x_hat[at], None if v is None else v[at], curve)
            reconstruction = reconstruction.index_put((at,), (steps + 1) * decoded)
        diffusion = torch.where(first, 0.0, (steps + 1) * diffusion)
    zero = torch.zeros_like(diffusion)
    terms = Terms(
        prior=prior_term(model, x, gamma_1),
        reconstruction=reconstruction,
        diffusion=diffusion,
        latent=zero if latent is None else latent.kl,
        valid_latent=zero if latent is None else latent.valid_kl,
        squared_error=_mean_square(x - x_hat) / model.data_scale**2,
    )
    if weighting is None:
        return terms
    size = apart.abs() if weighting.norm == "l1" else apart**2
    error = (weighting(model, gamma) * size).flatten(1).mean(1)
    return TermsAndError(**vars(terms), error=error, hybrid=weighting.hybrid, dimensions=model.dimensions)
