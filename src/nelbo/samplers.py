"""Samplers: from the prior to images, by callables.

    (1)  ancestral    z_s ~ N(mean, std^2),  (mean, std) of q(z_s|z_t, x_hat)      (paths.py, equation 3)
    (2)  ODE          the probability flow from t = 1 to 0: deterministic given z_1 and c      (flow.py, equation 1)

(2) run from 0 to 1 encodes: an image's z_0 becomes the noise z_1 that it is the sample of.

``step(z, s, t)`` gives the mean and standard deviation of p(z_s|z_t) and x_hat; ``reverse_step`` makes one of a model.
The noise of a sample is keyed by its number, so sample k does not depend on how many are drawn at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nelbo import objectives, pixels
from nelbo.draws import Draws
from nelbo.flow import Flow, Transport
from nelbo.model import DiffusionModel

__all__ = ["Step", "ancestral", "decode_noise", "encode_images", "reverse_step", "sample", "sample_ode"]

Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def reverse_step(
    model: DiffusionModel, c: Tensor | None = None, clip: bool = False, flag: Tensor | None = None
) -> Step:
    """p(z_s|z_t) of a model given c; ``clip`` keeps x_hat within [-1, 1] (grey levels end there).

    ``flag`` (B,) is 1 for samples as of augmented images.
    """
    curve = None if model.schedule_reads_image else model.curve(c)

    def step(z: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if curve is None:
            return objectives.image_schedule_step(model, z, s, t, flag)
        gamma_s, gamma_t = curve(s)[0], curve(t)[0]
        x_hat, eps_hat = model.predict(z, gamma_t, c, flag)
        if clip:
            alpha, sigma = model.path.coefficients(gamma_t)
            x_hat = x_hat.clamp(-1, 1)
            eps_hat = (z - alpha * x_hat) / sigma
        mean, std = model.path.reverse(z, eps_hat, gamma_s, gamma_t)
        return mean, std, x_hat

    return step


def ancestral(
    step: Step, z_1: Tensor, draws: Sequence[Draws], seen: Callable[[int, Tensor, Tensor], None] | None = None
) -> Tensor:
    """z_0 (B, C, H, W) from z_1 by len(draws) steps, equation (1); ``draws[i]`` holds the noise of step i.

    ``seen(i, z, x_hat)`` is called after every step.
    """
    z, steps = z_1, len(draws)
    for i, noise in enumerate(draws):
        t = z.new_full((len(z),), (steps - i) / steps)
        s = z.new_full((len(z),), (steps - i - 1) / steps)
        mean, std, x_hat = step(z, s, t)
        z = mean + std * noise.normal("step", z.shape[1:])
        if seen is not None:
            seen(i, z, x_hat)
    return z


@torch.no_grad()
def sample(
    model: DiffusionModel,
    count: int,
    *,
    steps: int = 256,
    clip: bool = False,
    categorical: bool = False,
    seed: int = 0,
    first: int = 0,
    seen: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Images (count, C, H, W) uint8 by ancestral sampling in T = ``steps`` steps.

    ``clip`` x_hat to the data's range; ``categorical``: draw the levels from p(v|z_0) instead of taking the most
    probable; ``first``, the number of the first sample (samples are keyed by seed and number).
    """
    if count < 1 or steps < 1:
        raise ValueError(f"count and steps must be at least 1, got {count} and {steps}")
    numbers = range(first, first + count)
    training, device = model.training, model.device
    model.eval()
    try:
        start = Draws(seed, numbers, 0, device)
        z_1, c = model.draw_prior(start)
        step_draws = [Draws(seed, numbers, i, device) for i in range(steps)]
        z_0 = ancestral(reverse_step(model, c, clip), z_1, step_draws, seen)
        uniform = start.uniform("decode", model.shape) if categorical else None
        return _levels(model, z_0, c, uniform)
    finally:
        model.train(training)


def _levels(model: DiffusionModel, z_0: Tensor, c: Tensor | None, uniform: Tensor | None = None) -> Tensor:
    """uint8 images from z_0: the decoder's most probable levels, or a draw of it."""
    curve = model.schedule.given(z_0.flatten(1)) if model.schedule_reads_image else model.curve(c)
    gamma_0, _ = curve(z_0.new_zeros(len(z_0)))
    alpha_0, _ = model.path.coefficients(gamma_0)
    return pixels.decode(z_0, alpha_0, gamma_0, model.levels, uniform)


@torch.no_grad()
def encode_images(model: DiffusionModel, images: Tensor, c: Tensor | None = None, **solver: Any) -> Transport:
    """The noise z_1 (B, C, H, W) that the flow makes of whole-number images: z_0 = alpha_0 x, taken to t = 1.

    ``c`` (B, size): the latents of the images, where the model has one (``model.infer``). ``solver``: rtol,
    atol, method.
    """
    pixels.check_images(images, model.shape, model.levels)
    x = pixels.encode(images.to(model.device), model.levels)
    gamma_0, _ = model.curve(c)(x.new_zeros(len(x)))
    return Flow(model, c).transport(model.path.coefficients(gamma_0)[0] * x, 0.0, 1.0, **solver)


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
    """Images (count, C, H, W) uint8 by equation (2), and the solver's record; arguments as in ``sample``."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    training = model.training
    model.eval()
    try:
        start = Draws(seed, range(first, first + count), 0, model.device)
        z_1, c = model.draw_prior(start)
        end = decode_noise(model, z_1, c, rtol=rtol, atol=atol, method=method)
        return _levels(model, end.z, c, start.uniform("decode", model.shape) if categorical else None), end
    finally:
        model.train(training)
