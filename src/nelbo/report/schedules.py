r"""What a model's noise schedule has learned, and whether its auxiliary latent c is used.

For image i and draw r of c ~ q(c|x_i), gamma_ir(t) at one pixel varies for two reasons, by the law of total variance:

    (1)  var gamma = mean_i var_r gamma_ir + var_i mean_r gamma_ir        within an image + between images

estimated without bias by  w^2 = mean_i s_r^2(gamma_ir)  and  b^2 = s_i^2(mean_r gamma_ir) - w^2/R. The spread is the
root of (1): how much the noise moves with c. Its part between images is what follows the image.

    Rule: the schedule uses c where the spread, averaged over pixels, reaches 0.01 nats of gamma at some t.

The denoiser may use c as well: with z, gamma and eps as they are and c of another image,

    (2)  change = rms(eps_hat(z, gamma, c') - eps_hat(z, gamma, c)) / rms(eps_hat(z, gamma, c) - eps)

    Rule: the denoiser uses c where this reaches 1 % at some t.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo import pixels
from nelbo.draws import Draws
from nelbo.model import DiffusionModel

__all__ = ["ScheduleView", "latent_use", "schedule_view"]

SPREAD_RULE = 1e-2
CHANGE_RULE = 1e-2
TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MAP_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]


def _gamma(curve: Curve, t: float, count: int, model: DiffusionModel) -> np.ndarray:
    """gamma at one t for every row of the curve: (count, C, H, W) float64."""
    gamma, _ = curve(torch.full((1,), t, device=model.device))
    return gamma.detach().expand(count, *model.shape).double().cpu().numpy()


def _curves(
    model: DiffusionModel, x: Tensor, labels: Tensor | None, draws: int, seed: int, batch: int
) -> tuple[list[Curve], list[Tensor | None], Tensor, Tensor]:
    """A curve and a c for each draw of q(c|x), and the latent's KL and valid KL, each (n,) nats."""
    if model.latent is None:
        nothing = torch.zeros(len(x))
        return [model.schedule.given(x.flatten(1))], [None], nothing, nothing
    curves: list[Curve] = []
    cs: list[Tensor | None] = []
    for draw in range(draws):
        parts = []
        for start in range(0, len(x), batch):
            part = x[start : start + batch]
            noise = model.latent.noise(Draws(seed, range(start, start + len(part)), draw, model.device))
            latent = model.infer(part, noise, None if labels is None else labels[start : start + batch])
            assert latent is not None
            parts.append(latent)
        c = torch.cat([part.c for part in parts])
        curves.append(model.curve(c))
        cs.append(c)
    kl, valid = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("kl", "valid_kl"))
    return curves, cs, kl, valid


def _over_pixels(t: Sequence[float], spread: np.ndarray) -> dict[str, list[float]]:
    """Mean and largest over pixels of a spread (times, pixels), for JSON."""
    return {"t": list(t), "mean": spread.mean(1).tolist(), "max": spread.max(1).tolist()}


def _estimate(values: Tensor) -> dict[str, float]:
    array = values.double().numpy()
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else math.nan
    return {"mean": float(array.mean()), "standard_error": float(error)}


@torch.no_grad()
def latent_use(
    model: DiffusionModel,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    draws: int = 4,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    limit: int = 64,
    denoised: int = 16,
    batch: int = 64,
) -> dict[str, Any] | None:
    """Whether c is used, over the first ``limit`` of whole-number images (n, C, H, W); None for a model without one.

    ``draws`` R of q(c|x) for each image; ``denoised``, how many images the denoiser is tried on, 0 for none.
    Gives plain numbers for JSON: ``kl`` and ``valid_kl`` in nats per image; ``gamma_spread``, ``between_images`` and
    ``within_image``, the roots of the parts of equation (1), mean and largest over pixels for every t;
    ``largest_spread``, the largest mean, and its share of gamma's ``range``; ``denoiser_change`` by equation (2).
    """
    if model.latent is None and not model.schedule_reads_image:
        return None
    chosen = torch.as_tensor(images)[:limit].to(model.device)
    if len(chosen) < 2:
        raise ValueError(f"the spread over images needs at least 2 of them, got {len(chosen)}")
    label_tensor = None if labels is None else torch.as_tensor(labels)[:limit].to(model.device)
    training = model.training
    model.eval()
    try:
        x = pixels.encode(chosen, model.levels)
        curves, cs, kl, valid_kl = _curves(model, x, label_tensor, draws, seed, batch)
        n = len(x)
        within, between = np.zeros((2, len(times), model.dimensions))
        for row, t in enumerate(times):
            gamma = np.stack([_gamma(curve, t, n, model) for curve in curves]).reshape(len(curves), n, -1)
            if len(curves) > 1:
                within[row] = gamma.var(0, ddof=1).mean(0)
            between[row] = (gamma.mean(0).var(0, ddof=1) - within[row] / len(curves)).clip(min=0)
        spread = np.sqrt(within + between)
        ends = [_gamma(curves[0], t, n, model).mean() for t in (0.0, 1.0)]
        change = None
        if cs[0] is not None and model.network_sees_latent and denoised > 1:
            change = _denoiser_change(model, x[:denoised], cs[0][:denoised], seed)
    finally:
        model.train(training)
    largest = float(spread.mean(1).max())
    return {
        "latent": "the image itself" if model.latent is None else type(model.latent).__name__,
        "images": n,
        "draws": len(curves),
        "kl": _estimate(kl),
        "valid_kl": _estimate(valid_kl),
        "range": float(ends[1] - ends[0]),
        "gamma_spread": _over_pixels(times, spread),
        "between_images": _over_pixels(times, np.sqrt(between)),
        "within_image": _over_pixels(times, np.sqrt(within)),
        "largest_spread": largest,
        "largest_spread_share": largest / float(ends[1] - ends[0]),
        "spread_rule": SPREAD_RULE,
        "schedule_uses_latent": largest >= SPREAD_RULE,
        "denoiser_change": change,
        "change_rule": CHANGE_RULE,
        "denoiser_uses_latent": None if change is None else max(change["mean"]) >= CHANGE_RULE,
    }


def _denoiser_change(model: DiffusionModel, x: Tensor, c: Tensor, seed: int) -> dict[str, list[float]]:
    """Equation (2) at three times; c' is the c of the image before."""
    curve, times = model.curve(c), (0.25, 0.5, 0.75)
    changes = []
    for draw, t in enumerate(times):
        gamma, _ = curve(torch.full((len(x),), t, device=x.device))
        eps = Draws(seed, range(len(x)), draw, x.device).normal("eps", model.shape)
        z = model.path.diffuse(x, gamma, eps)
        eps_hat, other = model.predict(z, gamma, c)[1], model.predict(z, gamma, c.roll(1, 0))[1]
        changes.append(float((other - eps_hat).double().norm() / (eps_hat - eps).double().norm()))
    return {"t": list(times), "mean": changes}


@dataclass(frozen=True)
class ScheduleView:
    """gamma(t, c) of a model over draws of c from the prior, the c that sampling uses.

    t (S,); gamma (3 draws at most, S, P) of P pixels; linear (S,), the straight line between the mean ends; spread
    (S, P), its standard deviation over all draws; mean_change (S,), the mean over pixels and draws of gamma - linear;
    maps_t (M,); maps, maps_change and maps_spread (M, C, H, W): mean over draws, the same minus linear, and standard
    deviation. ``draws`` is 1 where gamma does not depend on c; ``per_pixel``: whether pixels differ.
    """

    t: np.ndarray
    gamma: np.ndarray
    linear: np.ndarray
    spread: np.ndarray
    mean_change: np.ndarray
    maps_t: np.ndarray
    maps: np.ndarray
    maps_change: np.ndarray
    maps_spread: np.ndarray
    draws: int
    per_pixel: bool


@torch.no_grad()
def schedule_view(
    model: DiffusionModel,
    images: Tensor | np.ndarray | None = None,
    *,
    draws: int = 32,
    pixels_shown: int = 64,
    points: int = 41,
    seed: int = 0,
) -> ScheduleView | None:
    """What the schedule looks like. Where it reads the image itself, c is each of ``images``; None without them."""
    if model.schedule_reads_image:
        if images is None:
            return None
        x = pixels.encode(torch.as_tensor(images)[:draws].to(model.device), model.levels)
        draws = len(x)
        curve = model.schedule.given(x.flatten(1))
    elif model.latent is None or not model.schedule_sees_latent:
        draws, curve = 1, model.curve(None)
    else:
        curve = model.curve(model.latent.prior(Draws(seed, range(draws), 0, model.device)))
    t = np.linspace(0, 1, points)
    stride = np.unique(np.linspace(0, model.dimensions - 1, min(pixels_shown, model.dimensions)).astype(int))
    lines, spread, means = [], [], []
    for value in t:
        gamma = _gamma(curve, float(value), draws, model).reshape(draws, -1)
        means.append(gamma.mean())
        lines.append(gamma[:3, stride])
        spread.append(gamma[:, stride].std(0, ddof=1) if draws > 1 else np.zeros(len(stride)))
    linear = means[0] + (means[-1] - means[0]) * t
    maps_t = np.array(MAP_TIMES)
    at = np.stack([_gamma(curve, value, draws, model) for value in MAP_TIMES], 1)
    maps = at.mean(0)
    line = means[0] + (means[-1] - means[0]) * maps_t
    return ScheduleView(
        t=t,
        gamma=np.stack(lines, 1),
        linear=linear,
        spread=np.stack(spread),
        mean_change=np.array(means) - linear,
        maps_t=maps_t,
        maps=maps,
        maps_change=maps - line[:, None, None, None],
        maps_spread=at.std(0, ddof=1) if draws > 1 else np.zeros_like(maps),
        draws=draws,
        per_pixel=bool(np.ptp(at, (2, 3, 4)).max() > 1e-6),
    )
