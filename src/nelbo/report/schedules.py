"""What a model's noise schedule has learned: gamma over time, over the image and over draws of c, for the figures."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo import pixels
from nelbo.draws import Draws
from nelbo.latent_use import gamma_at
from nelbo.model import DiffusionModel

__all__ = ["ScheduleView", "schedule_view"]

MAP_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


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
    points: int = 33,
    seed: int = 0,
) -> ScheduleView | None:
    """What the schedule looks like. Where it reads the image itself, c is each of ``images``; None without them."""
    if model.schedule_reads_image:
        if images is None:
            return None
        x = model.reals(pixels.as_tensor(images)[:draws].to(model.device))
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
        gamma = gamma_at(curve, float(value), draws, model).reshape(draws, -1)
        means.append(gamma.mean())
        lines.append(gamma[:3, stride])
        spread.append(gamma[:, stride].std(0, ddof=1) if draws > 1 else np.zeros(len(stride)))
    linear = means[0] + (means[-1] - means[0]) * t
    maps_t = np.array(MAP_TIMES)
    at = np.stack([gamma_at(curve, value, draws, model) for value in MAP_TIMES], 1)
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
