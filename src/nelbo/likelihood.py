r"""Likelihoods with error bars, in bits per dimension.

The variational bound (VLB) of an image is the mean of the bound's terms over N stratified times in each of R shifts:

    (1)  t_rj = (u_r + j/N) mod 1,     L_r = mean_j terms(t_rj),     L = mean_r L_r
    (2)  standard error                 std_i(L_i)/sqrt(n)                      images and draws together
    (3)  the draws' own part of it      sqrt( sum_i var_r(L_ir)/R )/n           needs R >= 2

(2) is the spread of the per-image figures, which already contains the draws' noise; (3) is never added to it. The
times within a shift are not independent, the shifts are. Each draw has its own latent, eps_0 and eps, keyed by
(seed, image index, draw): figures do not depend on the batch size or on the order of the images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo import objectives, pixels, times
from nelbo.draws import Draws
from nelbo.model import DiffusionModel

__all__ = ["BitsPerDim", "Estimate", "compare", "draw_terms", "vlb"]

TERMS = ("prior", "reconstruction", "diffusion", "latent", "valid_latent")


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error; nan where one image leaves none."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_error:.4f}"


@dataclass(frozen=True)
class BitsPerDim:
    """A likelihood in bits per dimension, and where it comes from.

    value: a bound on the negative log-likelihood (valid latent charge). as_published: the figure with the charge of the
    posterior's authors, where it differs (the paper's k-hot). draws_error: the draws' own part of the standard error,
    nan for a single shift. terms: bits/dim of each term. index: (n,) image indices. per_image: (n,) bits/dim.
    per_image_error: (n,) standard error from the draws. per_image_terms: term -> (n,) bits/dim.
    """

    value: Estimate
    as_published: Estimate | None
    draws_error: float
    terms: dict[str, Estimate]
    index: np.ndarray
    per_image: np.ndarray
    per_image_error: np.ndarray
    per_image_terms: dict[str, np.ndarray]
    by_time: tuple[np.ndarray, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The bound, bits/dim."""
        return self.value.mean

    @property
    def standard_error(self) -> float:
        """Its standard error, bits/dim."""
        return self.value.standard_error


def _estimate(values: np.ndarray) -> Estimate:
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values.mean()), error)


def draw_terms(
    model: DiffusionModel,
    images: Tensor,
    t: Tensor,
    draws: Draws,
    *,
    labels: Tensor | None = None,
    flag: Tensor | None = None,
    steps: int = 0,
    step: int = 0,
    variance: bool = False,
) -> objectives.Terms:
    """The bound's terms at times t (B,), with eps_0, eps and the latent's noise from ``draws``. (B,) nats each.

    Training and evaluation both call this. ``step`` anneals a one-hot latent's gradient; ``variance`` is VDM's
    variance minimisation.
    """
    x = pixels.encode(images, model.levels)
    noise = None if model.latent is None else model.latent.noise(draws)
    latent = model.infer(x, noise, labels, step)
    return objectives.elbo(
        model,
        images,
        t=t,
        eps=draws.normal("eps", model.shape),
        eps_0=draws.normal("eps_0", model.shape),
        latent=latent,
        flag=flag,
        steps=steps,
        variance=variance,
    )


@torch.no_grad()
def vlb(
    model: DiffusionModel,
    images: Tensor | np.ndarray,
    *,
    index: np.ndarray | None = None,
    labels: np.ndarray | Tensor | None = None,
    times_per_shift: int = 16,
    shifts: int = 2,
    steps: int = 0,
    seed: int = 0,
    batch: int = 256,
    progress: Callable[[int, float], None] | None = None,
) -> BitsPerDim:
    """The variational bound of whole-number images (n, C, H, W), equations (1) to (3).

    ``index`` (n,) names the images for the keyed randomness (0 .. n - 1 by default). ``times_per_shift`` N and
    ``shifts`` R; ``steps`` T of the discrete bound, 0 for continuous time; ``batch``, network rows at once.
    ``progress(images done, bits/dim so far)`` is called as it runs. Units: bits/dim.
    """
    if times_per_shift < 1 or shifts < 1:
        raise ValueError(f"times_per_shift and shifts must be at least 1, got {times_per_shift} and {shifts}")
    images = torch.as_tensor(images)
    pixels.check_images(images, model.shape, model.levels)
    n, per_image = len(images), times_per_shift * shifts
    index = np.arange(n) if index is None else np.asarray(index)
    label_tensor = None if labels is None else torch.as_tensor(labels)
    rows = np.arange(n * per_image)
    values = {name: np.empty(n * per_image) for name in TERMS}
    row_times = np.empty(n * per_image)
    device, training = model.device, model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch):
            chunk = rows[start : start + batch]
            image, draw = chunk // per_image, chunk % per_image
            key = index[image]
            u = Draws(seed, key, draw // times_per_shift, device).uniform("time")
            t = times.stratified(u, torch.as_tensor(draw % times_per_shift, device=device), times_per_shift)
            terms = draw_terms(
                model,
                images[image].to(device),
                t.float(),
                Draws(seed, key, draw, device),
                labels=None if label_tensor is None else label_tensor[image].to(device),
                steps=steps,
            )
            for name in TERMS:
                values[name][chunk] = getattr(terms, name).double().cpu().numpy()
            row_times[chunk] = t.double().cpu().numpy()
            if progress is not None:
                done = int(chunk[-1] + 1) // per_image
                so_far = (
                    sum(values[name][: done * per_image].mean() for name in TERMS if name != "latent") if done else 0
                )
                progress(done, float(pixels.bits_per_dim(float(so_far), model.dimensions)))
    finally:
        model.train(training)
    bits = {
        name: np.asarray(pixels.bits_per_dim(v.reshape(n, shifts, times_per_shift).mean(2), model.dimensions))
        for name, v in values.items()
    }
    valid = bits["prior"] + bits["reconstruction"] + bits["diffusion"] + bits["valid_latent"]
    published = valid - bits["valid_latent"] + bits["latent"]
    spread = valid.var(1, ddof=1) / shifts if shifts > 1 else np.full(n, math.nan)
    differs = bool(np.any(bits["latent"] != bits["valid_latent"]))
    terms_per_image = {name: v.mean(1) for name, v in bits.items() if differs or name != "valid_latent"}
    return BitsPerDim(
        value=_estimate(valid.mean(1)),
        as_published=_estimate(published.mean(1)) if differs else None,
        draws_error=float(np.sqrt(spread.sum()) / n),
        terms={name: _estimate(v) for name, v in terms_per_image.items()},
        index=index,
        per_image=valid.mean(1),
        per_image_error=np.sqrt(spread),
        per_image_terms=terms_per_image,
        by_time=(row_times, np.asarray(pixels.bits_per_dim(values["diffusion"], model.dimensions))),
        settings={
            "method": "vlb",
            "times_per_shift": times_per_shift,
            "shifts": shifts,
            "steps": steps,
            "seed": seed,
            "batch": batch,
        },
    )


def compare(a: BitsPerDim, b: BitsPerDim) -> Estimate:
    """The mean of a - b over the images that both saw, paired, with its standard error. Bits/dim."""
    if not np.array_equal(a.index, b.index):
        raise ValueError("a comparison needs two evaluations of the same images in the same order")
    return _estimate(a.per_image - b.per_image)
