r"""Samplers: from the prior to images, by callables.

    (1)  ancestral    z_s ~ N(mean, std^2),  the p(z_s|z_t) of the bound            (objectives.py, equation 10)
    (2)  DDIM         z_s = alpha_s x_hat + sqrt(sigma_s^2 - s_eta^2) eps_hat + s_eta eps,
                      s_eta = eta k^(1/2) sigma_s,   k = -expm1(gamma_s - gamma_t)      (Song et al. 2021, eq. 12, 16)
    (3)  ODE          the probability flow from t = 1 to 0: deterministic given z_1 and c     (flow.py, equation 1)

On every path k^(1/2) sigma_s is the deviation of q(z_s|z_t, x), and sigma_s (1 - k)^(1/2) = sigma_s^2 alpha_t/(alpha_s
sigma_t): so (2) with eta = 1 is (1) with the variance fixed-small, whatever the path and the schedule. With eta = 0 it
is Euler's method for (3) in the form d(z/alpha)/d(sigma/alpha) = eps_hat, of first order in the step. Like (3) it can
then be run upwards, from an image's z_0 to the noise that it is the sample of.

A decoder by levels reads the image off z_0; one that is the network's own Gaussian evaluates it once more and takes the
levels nearest to x_hat(z_0): no noise is added there, as in DDPM, whose T noise levels are T - 1 steps and the decoder.

Times are equal steps of t or, as DDIM's quadratic ones, of t^(1/2), finer where little noise is left. A schedule that
is a table of T levels is asked at its levels only.

Between two images A and B, at weights w from 0 to 1,

    (4)  z_t = (1 - w) z_t^A + w z_t^B,   z_t^i ~ q(z_t|x^i),   then (1) or (2) from there down    (DDPM section 4.3)
    (5)  z_1 = [ sin((1 - w) theta) z_1^A + sin(w theta) z_1^B ]/sin theta,   z_1^i by (3) or (2) upwards, then down
                                                                                   (DDIM section 5.3, appendix D.5)

with theta the angle between z_1^A and z_1^B. The noises in (4) are independent and their mixture is not rescaled, as in
the paper and its code: halfway there is half the variance that the network expects. Given the same noise for both
images the mixture keeps sigma_t.

``step(z, s, t)`` gives the mean and standard deviation of p(z_s|z_t) and x_hat; ``reverse_step`` and ``ddim_step`` make
one of a model. The noise of a sample is keyed by its number, so sample k does not depend on how many are drawn at once.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nelbo import objectives, pixels
from nelbo.draws import Draws
from nelbo.flow import Flow, Transport
from nelbo.likelihood import SolverError
from nelbo.model import DiffusionModel

__all__ = [
    "METHODS",
    "SPACINGS",
    "Chain",
    "Step",
    "ddim_step",
    "decode",
    "decode_noise",
    "encode_images",
    "interpolate",
    "interpolate_latents",
    "nearest_levels",
    "reverse_step",
    "sample",
    "sample_ode",
    "slerp",
    "time_grid",
    "walk",
]

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


# Steps ---------------------------------------------------------------------------------------------------------------


def reverse_step(
    model: DiffusionModel,
    c: Tensor | None = None,
    clip: bool = False,
    flag: Tensor | None = None,
    variance: str | None = None,
) -> Step:
    """p(z_s|z_t) of a model given c, equation (1).

    ``clip`` keeps x_hat within [-1, 1] even where the model does not (grey levels end there); ``variance``: fixed-small
    or fixed-large instead of the model's own. ``flag`` (B,) is 1 for samples as of augmented images.
    """
    if model.schedule_reads_image:
        return lambda z, s, t: objectives.image_schedule_step(model, z, s, t, flag)
    own, curve = model.reverse, model.curve(c)
    if variance == "learned" and not model.learned_variance:
        raise ValueError(f"the network has no output for a learned variance; its own is {own.variance}")
    reverse = replace(own, clip=clip or own.clip, variance=variance or own.variance)
    return lambda z, s, t: objectives.reverse_moments(model, z, curve(s)[0], curve(t)[0], c, flag, reverse)


def ddim_step(
    model: DiffusionModel, c: Tensor | None = None, eta: float = 0.0, clip: bool = False, flag: Tensor | None = None
) -> Step:
    """Equation (2) of a model given c, with eps_hat derived anew where ``clip`` keeps x_hat within [-1, 1].

    With eta = 0 the times may as well rise: s > t.
    """
    if model.schedule_reads_image:
        raise ValueError("a schedule that reads the image has no DDIM: gamma moves with x_hat")
    curve = model.curve(c)

    def step(z: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gamma_s, gamma_t = curve(s)[0], curve(t)[0]
        (alpha_s, sigma_s), (alpha_t, sigma_t) = map(model.path.coefficients, (gamma_s, gamma_t))
        x_hat, eps_hat = model.predict(z, gamma_t, c, flag)
        if clip:
            x_hat = x_hat.clamp(-1, 1)
            eps_hat = (z - alpha_t * x_hat) / sigma_t
        k = (-torch.expm1(gamma_s - gamma_t)).clamp(min=0)
        kept = 1 - eta**2 + eta**2 * (gamma_s - gamma_t).clamp(max=0).exp()  # 1 - eta^2 k, without cancellation
        mean = alpha_s * x_hat + sigma_s * kept.sqrt() * eps_hat
        return mean, eta * k.sqrt() * sigma_s, x_hat

    return step


def time_grid(steps: int, spacing: str = "even", timesteps: int = 0) -> Tensor:
    """The steps + 1 times from 1 to 0, float64; at the nearest levels n/(T - 1) of a table of T = ``timesteps``, each
    of them once."""
    t = (torch.arange(steps, -1, -1, dtype=torch.float64) / steps) ** SPACINGS[spacing]
    if not timesteps:
        return t
    return torch.unique((t * (timesteps - 1)).round()).flip(0) / (timesteps - 1)


def walk(
    step: Step,
    z: Tensor,
    times: Tensor,
    draws: Sequence[Draws | None],
    seen: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """z (B, C, H, W) at the last of ``times`` (N + 1,) from z at the first; ``draws[i]`` holds the noise of step i, or
    is None where there is none.

    ``seen(i, z, x_hat)`` is called after every step.
    """
    dtype = z.dtype
    for i, noise in enumerate(draws):
        t, s = times[i].expand(len(z)), times[i + 1].expand(len(z))
        mean, std, x_hat = step(z, s, t)
        z = (mean if noise is None else mean + std * noise.normal("step", z.shape[1:])).to(dtype)
        if seen is not None:
            seen(i, z, x_hat)
    return z


@dataclass(frozen=True)
class Chain:
    """How the way down is gone: by ``method`` ancestral or ddim, in ``steps`` steps, at times of a ``spacing``.

    ``eta`` belongs to ddim, ``variance`` (fixed-small or fixed-large; by default the model's own) to ancestral.
    ``clip``: x_hat is kept within [-1, 1] even where the model does not.
    """

    method: str = "ancestral"
    steps: int = 256
    spacing: str = "even"
    eta: float = 0.0
    variance: str | None = None
    clip: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("spacing", SPACINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def times(self, model: DiffusionModel, like: Tensor) -> Tensor:
        """From 1 to 0, in the precision of ``like``; in float64 for a table."""
        timesteps = model.schedule.timesteps
        if timesteps and self.steps >= timesteps:
            raise ValueError(
                f"{timesteps} noise levels have {timesteps - 1} steps between them, got steps = {self.steps}"
            )
        times = time_grid(self.steps, self.spacing, timesteps).to(like.device)
        return times if timesteps else times.to(like.dtype)

    def step(self, model: DiffusionModel, c: Tensor | None = None, flag: Tensor | None = None) -> Step:
        """The step of a model given c."""
        if self.method == "ddim":
            return ddim_step(model, c, self.eta, self.clip or model.reverse.clip, flag)
        return reverse_step(model, c, self.clip, flag, self.variance)

    def draws(self, seed: int, numbers: Sequence[int], steps: int, device: Any) -> list[Draws | None]:
        """The noise of ``steps`` steps for the samples of these numbers; None where the way is deterministic."""
        if self.method == "ddim" and not self.eta:
            return [None] * steps
        return [Draws(seed, numbers, i, device) for i in range(steps)]


# Images --------------------------------------------------------------------------------------------------------------


def nearest_levels(model: DiffusionModel, x: Tensor) -> Tensor:
    """The grey levels, uint8, in whose bins reals x lie; those beyond the ends take the end's."""
    levels = torch.floor((x / model.data_scale + 1) * model.levels / 2)
    return levels.clamp(0, model.levels - 1).to(torch.uint8)


def _precise(model: DiffusionModel, z: Tensor) -> Tensor:
    """z in the network's precision."""
    return z.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), z.dtype))


def decode(model: DiffusionModel, z_0: Tensor, c: Tensor | None = None, uniform: Tensor | None = None) -> Tensor:
    """uint8 images from z_0 (B, C, H, W): the decoder's most probable levels; with ``uniform`` in [0, 1) of that shape
    a draw of p(v|z_0), by a decoder of levels only."""
    curve = model.schedule.given(z_0.flatten(1)) if model.schedule_reads_image else model.curve(c)
    gamma_0, _ = curve(z_0.new_zeros(len(z_0)))
    if model.reverse.decoder == "gaussian":
        if uniform is not None:
            raise ValueError("a gaussian decoder adds no noise: its levels are the nearest to x_hat, not a draw")
        return nearest_levels(model, model.predict(_precise(model, z_0), gamma_0, c)[0])
    alpha_0, _ = model.path.coefficients(gamma_0)
    scale = torch.as_tensor(model.data_scale, dtype=gamma_0.dtype, device=gamma_0.device)
    return pixels.decode(z_0, alpha_0 * scale, gamma_0 - 2 * scale.log(), model.levels, uniform)


@contextlib.contextmanager
def _evaluating(model: DiffusionModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def sample(
    model: DiffusionModel,
    count: int,
    *,
    categorical: bool = False,
    seed: int = 0,
    first: int = 0,
    seen: Callable[[int, Tensor, Tensor], None] | None = None,
    **chain: Any,
) -> Tensor:
    """Images (count, C, H, W) uint8 by equation (1) or (2).

    ``chain``: the fields of Chain: method, steps, spacing, eta, variance, clip. ``categorical``: draw the levels from
    p(v|z_0) instead of taking the most probable; ``first``, the number of the first sample (samples are keyed by seed
    and number).
    """
    how = Chain(**chain)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    numbers = range(first, first + count)
    with _evaluating(model):
        start = Draws(seed, numbers, 0, model.device)
        z_1, c = model.draw_prior(start)
        times = how.times(model, z_1)
        z_0 = walk(how.step(model, c), z_1, times, how.draws(seed, numbers, len(times) - 1, model.device), seen)
        return decode(model, z_0, c, start.uniform("decode", model.shape) if categorical else None)


@torch.no_grad()
def encode_images(model: DiffusionModel, images: Tensor, c: Tensor | None = None, **solver: Any) -> Transport:
    """The noise z_1 (B, C, H, W) that the flow makes of whole-number images: z_0 = alpha_0 x, taken to t = 1.

    ``c`` (B, size): the latents of the images, where the model has one (``model.infer``). ``solver``: rtol,
    atol, method.
    """
    return Flow(model, c).transport(_signal(model, images, c), 0.0, 1.0, **solver)


def _signal(model: DiffusionModel, images: Tensor, c: Tensor | None) -> Tensor:
    """z_0 = alpha_0 x of whole-number images."""
    pixels.check_images(images, model.shape, model.levels)
    x = model.reals(images.to(model.device))
    gamma_0, _ = model.curve(c)(x.new_zeros(len(x)))
    return model.path.coefficients(gamma_0)[0] * x


@torch.no_grad()
def decode_noise(model: DiffusionModel, z_1: Tensor, c: Tensor | None = None, **solver: Any) -> Transport:
    """z_0 from the noise z_1 at t = 1, the inverse of ``encode_images`` up to the solver's tolerance."""
    return Flow(model, c).transport(z_1, 1.0, 0.0, **solver)


@torch.no_grad()
def sample_ode(
    model: DiffusionModel,
    count: int,
    *,
    rtol: float = 3e-4,
    atol: float = 3e-4,
    method: str = "bosh3",
    categorical: bool = False,
    seed: int = 0,
    first: int = 0,
) -> tuple[Tensor, Transport]:
    """Images (count, C, H, W) uint8 by equation (3), and the solver's record; arguments as in ``sample``."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    with _evaluating(model):
        start = Draws(seed, range(first, first + count), 0, model.device)
        z_1, c = model.draw_prior(start)
        end = decode_noise(model, z_1, c, rtol=rtol, atol=atol, method=method)
        return decode(model, end.z, c, start.uniform("decode", model.shape) if categorical else None), end


# Between two images --------------------------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Equation (5): a, b (C, H, W), weights (n,) -> (n, C, H, W); the straight line where they point the same way."""
    w, u, v = (x.double() for x in (weights.reshape(-1, 1, 1, 1), a, b))
    theta = torch.arccos(((u * v).sum() / (u.norm() * v.norm())).clamp(-1, 1))
    if theta.sin() < 1e-6:
        return ((1 - w) * u + w * v).to(a.dtype)
    return ((torch.sin((1 - w) * theta) * u + torch.sin(w * theta) * v) / theta.sin()).to(a.dtype)


def _latents_between(c: Tensor | None, weights: Tensor) -> Tensor | None:
    """The latent of the nearer image, A's halfway: (n, size)."""
    return None if c is None else c[(weights > 0.5).long()]


def _check_pair(images: Tensor) -> None:
    if len(images) != 2:
        raise ValueError(f"an interpolation is between 2 images, got {len(images)}")


@torch.no_grad()
def interpolate(
    model: DiffusionModel,
    images: Tensor,
    weights: Tensor,
    *,
    time: float = 0.5,
    shared: bool = False,
    c: Tensor | None = None,
    seed: int = 0,
    **chain: Any,
) -> Tensor:
    """Images (n, C, H, W) uint8 by equation (4), at weights (n,), between two whole-number images (2, C, H, W).

    They are noised to the last time of the ``chain`` (as in ``sample``) that is not above ``time``, by noises of their
    own or a ``shared`` one. The noise on the way down is the same for all weights. ``c`` (2, size): their latents,
    where the model has one; the nearer image's is used.
    """
    _check_pair(images)
    pixels.check_images(images, model.shape, model.levels)
    if model.schedule_reads_image:
        raise ValueError("a schedule that reads the image noises two images differently: there is no mixture of them")
    how, device = Chain(**chain), model.device
    with _evaluating(model):
        x, weights = model.reals(images.to(device)), weights.to(device)
        times = how.times(model, x)
        times = times[times <= time + 1e-6]
        if len(times) < 2:
            raise ValueError(
                f"time must be at least the chain's first, {float(how.times(model, x)[-2]):.3g}, got {time}"
            )
        noise = Draws(seed, [0, 0 if shared else 1], 0, device).normal("eps", model.shape)
        a, b = model.path.diffuse(x, model.curve(c)(times[:1].expand(2))[0], noise)
        w, c_w = weights.to(x.dtype).reshape(-1, 1, 1, 1), _latents_between(c, weights)
        draws = how.draws(seed, [0] * len(weights), len(times) - 1, device)
        return decode(model, walk(how.step(model, c_w), _precise(model, (1 - w) * a + w * b), times, draws), c_w)


@torch.no_grad()
def interpolate_latents(
    model: DiffusionModel,
    images: Tensor,
    weights: Tensor,
    *,
    c: Tensor | None = None,
    steps: int | None = None,
    spacing: str = "even",
    **solver: Any,
) -> Tensor:
    """Images (n, C, H, W) uint8 by equation (5), at weights (n,), between two whole-number images (2, C, H, W).

    By DDIM in so many ``steps`` each way, without clipping; by default by the flow with the ``solver``'s rtol, atol and
    method. Raises likelihood.SolverError where that fails. ``c`` as in ``interpolate``.
    """
    _check_pair(images)
    weights = weights.to(model.device)
    c_w = _latents_between(c, weights)

    def gone(z: Tensor, c: Tensor | None, up: bool) -> Tensor:
        if steps is None:
            end = Flow(model, c).transport(z, *((0.0, 1.0) if up else (1.0, 0.0)), **solver)
            if not end.solution.success:
                raise SolverError(end.solution.advice)
            return end.z
        times = Chain("ddim", steps, spacing).times(model, z)
        return walk(ddim_step(model, c), _precise(model, z), times.flip(0) if up else times, [None] * (len(times) - 1))

    with _evaluating(model):
        a, b = gone(_signal(model, images, c), c, up=True)
        return decode(model, gone(slerp(a, b, weights), c_w, up=False), c_w)


METHODS = ("ancestral", "ddim")  # of a Chain
SPACINGS = {"even": 1, "quadratic": 2}  # the p of t_i = (i/N)^p
