r"""Whether a model uses its auxiliary latent c.

For image i and draw r of c ~ q(c|x_i), gamma_ir(t) at one pixel varies for two reasons, by the law of total variance:

    (1)  var gamma = mean_i var_r gamma_ir + var_i mean_r gamma_ir        within images + between images

The root of the left is the spread: how far the noise moves with c. A c that knows nothing of x moves it too, so only
the part between images shows use. Without bias, from R draws for each of n images and averaged over pixels,

    (2)  w^2 = mean_i s_r^2(gamma_ir),      b^2 = s_i^2(mean_r gamma_ir) - w^2/R

Chance is the largest b of 99 trials in which the draws are dealt to the images at random.

    Rule: the schedule uses c where b reaches 0.01 nats of gamma at some t, and chance (a test at the 1 % level).

The denoiser may use c as well. With z and gamma as they are and c' of another image in place of c, over images (and in
(4) over t too),

    (3)  change = rms(eps_hat' - eps_hat) / rms(eps_hat - eps)
    (4)  gain   = mean(|eps_hat' - eps|^2 - |eps_hat - eps|^2) / mean |eps_hat - eps|^2

    Rule: the denoiser uses c where the gain reaches 1 % and two standard errors. (c also tells it the gamma of every
    pixel, of which the network sees the mean: it may use a c that knows nothing of x.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo import pixels
from nelbo.draws import Draws
from nelbo.model import DiffusionModel

__all__ = ["gamma_at", "latent_use"]

SPREAD_RULE = 1e-2
GAIN_RULE = 1e-2
TRIALS = 99
TIMES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)

Curve = Callable[[Tensor], tuple[Tensor, Tensor]]


def gamma_at(curve: Curve, t: float, count: int, model: DiffusionModel) -> np.ndarray:
    """gamma at one t for every row of the curve: (count, C, H, W) float64."""
    gamma, _ = curve(torch.full((1,), t, device=model.device))
    return gamma.detach().expand(count, *model.shape).double().cpu().numpy()


def _parameters(model: DiffusionModel, x: Tensor, labels: Tensor | None, batch: int) -> tuple[Tensor, ...]:
    """The parameters of q(c|x) for encoded images, or the labels where c is one."""
    if model.encoder is None:
        if labels is None:
            raise ValueError("a label latent needs the labels of the images")
        return (labels,)
    parts = [model.encoder(x[start : start + batch]) for start in range(0, len(x), batch)]
    return tuple(torch.cat(heads).to(x.dtype) for heads in zip(*parts, strict=True))


def _parts(gram: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """w and b of equation (2), from the inner products of centred curves, averaged over pixels; groups (n, R)."""
    blocks = gram[groups[:, :, None], groups[:, None, :]]  # (n, R, R)
    images, draws = groups.shape
    whole, own = blocks.sum((1, 2)), np.trace(blocks, axis1=1, axis2=2)
    within = max(float(((own - whole / draws) / (draws - 1)).mean()), 0.0)
    between = float(whole.sum()) / draws**2 / (images - 1) - within / draws
    return math.sqrt(within), math.sqrt(max(between, 0.0))


def _estimate(values: Tensor) -> dict[str, float]:
    array = values.double().cpu().numpy()
    return {"mean": float(array.mean()), "standard_error": float(array.std(ddof=1) / math.sqrt(len(array)))}


@torch.no_grad()
def latent_use(
    model: DiffusionModel,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    draws: int = 16,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    limit: int = 64,
    denoised: int = 16,
    batch: int = 64,
) -> dict[str, Any] | None:
    """Whether c is used, over the first ``limit`` of whole-number images (n, C, H, W); None for a model without one.

    ``draws`` R of q(c|x) for each image; ``denoised``, how many images the denoiser is tried on, 0 for none.
    Gives plain numbers for JSON, gamma in nats: ``kl`` and ``valid_kl`` an image; ``gamma_spread``, mean and largest
    over pixels at every t; ``between_images`` and ``within_images``, b and w of equation (2); ``chance``;
    ``largest_spread``, the largest mean, and its share of gamma's ``range``; ``denoiser_change`` and
    ``denoiser_gain`` by equations (3) and (4); and what the rules say, ``schedule_uses_latent`` and
    ``denoiser_uses_latent``.
    """
    if model.latent is None and not model.schedule_reads_image:
        return None
    chosen = pixels.as_tensor(images)[:limit].to(model.device)
    if len(chosen) < 2 or draws < 2:
        raise ValueError(f"the spread needs at least 2 images and 2 draws, got {len(chosen)} and {draws}")
    label_tensor = None if labels is None else torch.as_tensor(labels)[:limit].to(model.device)
    training = model.training
    model.eval()
    try:
        n, x = len(chosen), model.reals(chosen)
        if model.latent is None:
            curves, c = [model.schedule.given(x.flatten(1))] * draws, None
            kl = valid_kl = torch.zeros(n)
        else:
            parameters = _parameters(model, x, label_tensor, batch)
            noises = (model.latent.noise(Draws(seed, range(n), draw, model.device)) for draw in range(draws))
            drawn = [model.latent.posterior(parameters, noise) for noise in noises]
            curves, c = [model.curve(draw.c) for draw in drawn], drawn[0].c
            kl, valid_kl = drawn[0].kl, drawn[0].valid_kl
        gamma_0, gamma_1 = (float(gamma_at(curves[0], t, n, model).mean()) for t in (0.0, 1.0))
        spread, between, within, chances = _spreads(curves, times, n, model, seed)
        denoiser = None
        if c is not None and model.network_sees_latent and denoised > 1:
            denoiser = _denoiser(model, x[:denoised], c[:denoised], seed)
    finally:
        model.train(training)
    largest, chance = float(spread.mean(1).max()), float(max(chances))
    gain = None if denoiser is None else denoiser["gain"]
    return {
        "latent": "the image itself" if model.latent is None else type(model.latent).__name__,
        "images": n,
        "draws": draws,
        "kl": _estimate(kl),
        "valid_kl": _estimate(valid_kl),
        "range": gamma_1 - gamma_0,
        "gamma_spread": {"t": list(times), "mean": spread.mean(1).tolist(), "max": spread.max(1).tolist()},
        "between_images": {"t": list(times), "rms": between},
        "within_images": {"t": list(times), "rms": within},
        "chance": chance,
        "largest_spread": largest,
        "largest_spread_share": largest / (gamma_1 - gamma_0),
        "spread_rule": SPREAD_RULE,
        "schedule_uses_latent": max(between) >= max(SPREAD_RULE, chance),
        "denoiser_change": None if denoiser is None else denoiser["change"],
        "denoiser_gain": gain,
        "gain_rule": GAIN_RULE,
        "denoiser_uses_latent": None if gain is None else gain["mean"] >= max(GAIN_RULE, 2 * gain["standard_error"]),
    }


def _spreads(
    curves: list[Curve], times: Sequence[float], n: int, model: DiffusionModel, seed: int
) -> tuple[np.ndarray, list[float], list[float], np.ndarray]:
    """The spread (times, pixels) over all images and draws, b and w at every t, and the largest b of every trial."""
    rng, draws = np.random.default_rng(seed), len(curves)
    groups = np.arange(draws * n).reshape(draws, n).T  # (n, R): image i has rows i, n + i, ...
    dealt = [np.stack([rng.permutation(column) for column in groups.T], 1) for _ in range(TRIALS)]
    spread, between, within, chances = [], [], [], np.zeros(TRIALS)
    for t in times:
        gamma = np.concatenate([gamma_at(curve, t, n, model).reshape(n, -1) for curve in curves])  # (R n, pixels)
        centred = gamma - gamma.mean(0)
        gram = centred @ centred.T / centred.shape[1]
        spread.append(gamma.std(0, ddof=1))
        w, b = _parts(gram, groups)
        within.append(w)
        between.append(b)
        chances = np.maximum(chances, [_parts(gram, trial)[1] for trial in dealt])
    return np.stack(spread), between, within, chances


def _denoiser(model: DiffusionModel, x: Tensor, c: Tensor, seed: int) -> dict[str, Any]:
    """Equations (3), at three times, and (4), over them; c' is the c of the image before."""
    curve, times = model.curve(c), (0.25, 0.5, 0.75)
    changes, own, other = [], x.new_zeros(len(x)), x.new_zeros(len(x))
    for draw, t in enumerate(times):
        gamma, _ = curve(torch.full((len(x),), t, device=x.device))
        eps = Draws(seed, range(len(x)), draw, x.device).normal("eps", model.shape)
        z = model.path.diffuse(x, gamma, eps)
        eps_hat, eps_other = model.predict(z, gamma, c)[1], model.predict(z, gamma, c.roll(1, 0))[1]
        changes.append(float((eps_other - eps_hat).norm() / (eps_hat - eps).norm()))
        own = own + ((eps_hat - eps) ** 2).flatten(1).sum(1)
        other = other + ((eps_other - eps) ** 2).flatten(1).sum(1)
    return {"change": {"t": list(times), "mean": changes}, "gain": _estimate((other - own) / own.mean())}
