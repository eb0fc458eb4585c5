r"""Likelihoods with error bars, in bits per dimension.

The variational bound (VLB) of an image is the mean of the bound's terms over N stratified times in each of R shifts:

    (1)  t_rj = (u_r + j/N) mod 1,     L_r = mean_j terms(t_rj),     L = mean_r L_r
    (2)  standard error                 std_i(L_i)/sqrt(n)                      images and draws together
    (3)  the draws' own part of it      sqrt( sum_i var_r(L_ir)/R )/n           needs R >= 2

(2) is the spread of the per-image figures, which already contains the draws' noise; (3) is never added to it. The
times within a shift are not independent, the shifts are. Each draw has its own latent, eps_0 and eps, keyed by
(seed, image index, draw): figures do not depend on the batch size or on the order of the images.

The likelihood by the probability flow (flow.py) of an image v dequantized to z (pixels.py), with K draws of c and z:

    (4)  w_k = log p(z_k|c_k) + log p(v|z_k) - log q(z_k|v) + log p(c_k) - log q(c_k|x)
    (5)  L_r = log K - logsumexp_k w_k,        L = mean_r L_r                     in each of R replicates
    (6)  K = 1:   L_r = - log p(z|c) - log p(v|z) + E log q(z|v) + KL(q(c|x) || p(c))

E L is a bound on -log p(v) that falls with K. With Hutchinson's trace log p(z|c) is unbiased but its exponential is
not: K independent probes would push (5) below the bound, by about half the variance of a probe and more. So one probe
is shared by the K draws of a replicate: the error that they have in common is then no weight of any of them. What is
their own stays (docs/experiments.md). So the figure is called an estimate, and a bound only with the exact trace.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo import objectives, pixels, times
from nelbo.draws import Draws
from nelbo.flow import LEAST_STEPS, Flow, log_prior, time_of
from nelbo.group import ALONE, Group
from nelbo.latents import LatentDraw, PaperKHot
from nelbo.model import DiffusionModel

__all__ = ["BitsPerDim", "Estimate", "SolverError", "compare", "draw_terms", "draw_weighted", "ode", "ode_table", "vlb"]

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

    value: a bound on the negative log-likelihood (valid latent charge), or an estimate of one: ``is_bound``.
    as_published: the figure with the charge of the
    posterior's authors, where it differs (the paper's k-hot). draws_error: the draws' own part of the standard error,
    nan for a single shift. terms: bits/dim of each term. index: (n,) image indices. per_image: (n,) bits/dim.
    per_image_error: (n,) standard error from the draws. per_image_terms: term -> (n,) bits/dim. by_time: times and
    diffusion terms of a VLB's draws and the mean squared errors of x_hat there (n N R each). cost: what an ODE's
    solves took.
    """

    value: Estimate
    as_published: Estimate | None
    draws_error: float
    terms: dict[str, Estimate]
    index: np.ndarray
    per_image: np.ndarray
    per_image_error: np.ndarray
    per_image_terms: dict[str, np.ndarray]
    settings: dict[str, Any]
    by_time: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    is_bound: bool = True
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The bound, bits/dim."""
        return self.value.mean

    @property
    def standard_error(self) -> float:
        """Its standard error, bits/dim."""
        return self.value.standard_error


class SolverError(ArithmeticError):
    """An ODE could not be solved to its end; the message says why and what to try."""


def _reverse(model: DiffusionModel, steps: int) -> dict[str, Any]:
    """What the figure depends on beside the method: the decoder and, at finite T, the reverse steps."""
    settings: dict[str, Any] = {"decoder": model.reverse.decoder}
    if steps:
        settings["variance"] = model.reverse.variance
    return settings | ({"clip": model.reverse.clip} if steps or model.reverse.decoder == "gaussian" else {})


def _estimate(values: np.ndarray) -> Estimate:
    n = len(values)
    error = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values.mean()), error)


def _summary(valid: np.ndarray, published: np.ndarray | None, terms: dict[str, np.ndarray]) -> dict[str, Any]:
    """Equations (1) to (3) from figures (n, R) and terms (n,), all in bits/dim: fields of BitsPerDim."""
    n, replicates = valid.shape
    spread = valid.var(1, ddof=1) / replicates if replicates > 1 else np.full(n, math.nan)
    return {
        "value": _estimate(valid.mean(1)),
        "as_published": None if published is None else _estimate(published.mean(1)),
        "draws_error": float(np.sqrt(spread.sum()) / n),
        "terms": {name: _estimate(v) for name, v in terms.items()},
        "per_image": valid.mean(1),
        "per_image_error": np.sqrt(spread),
        "per_image_terms": terms,
    }


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
    importance: bool = False,
    second_order: float = 0.0,
    decoded: Tensor | None = None,
) -> objectives.Terms:
    """The bound's terms at times t (B,), with eps_0, eps and the latent's noise from ``draws``. (B,) nats each.

    Training and evaluation both call this. ``step`` anneals a one-hot latent's gradient; the others are as in
    ``objectives.elbo``, the probe of the second order from ``draws`` too.
    """
    return objectives.elbo(
        model,
        images,
        t=t,
        eps=draws.normal("eps", model.shape),
        eps_0=draws.normal("eps_0", model.shape),
        latent=_infer(model, images, draws, labels, step),
        flag=flag,
        steps=steps,
        variance=variance,
        importance=importance,
        second_order=second_order,
        probe=1.0 - 2.0 * (draws.uniform("probe", model.shape) < 0.5) if second_order else None,
        decoded=decoded,
    )


def _infer(model: DiffusionModel, images: Tensor, draws: Draws, labels: Tensor | None, step: int) -> LatentDraw | None:
    noise = None if model.latent is None else model.latent.noise(draws)
    return model.infer(model.reals(images), noise, labels, step)


def draw_weighted(
    model: DiffusionModel,
    images: Tensor,
    weighting: objectives.Weighting | None,
    t: Tensor,
    draws: Draws,
    *,
    labels: Tensor | None = None,
    flag: Tensor | None = None,
    steps: int = 0,
    step: int = 0,
) -> objectives.Terms:
    """``objectives.weighted`` with the same draws as ``draw_terms``; for training."""
    return objectives.weighted(
        model,
        images,
        weighting,
        t=t,
        eps=draws.normal("eps", model.shape),
        eps_0=draws.normal("eps_0", model.shape) if model.reverse.decoder == "levels" else None,
        latent=_infer(model, images, draws, labels, step),
        flag=flag,
        steps=steps,
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
    group: Group = ALONE,
    progress: Callable[[int, float], None] | None = None,
) -> BitsPerDim:
    """The variational bound of whole-number images (n, C, H, W), equations (1) to (3).

    ``index`` (n,) names the images for the keyed randomness (0 .. n - 1 by default). ``times_per_shift`` N and
    ``shifts`` R; ``steps`` T of the discrete bound, 0 for continuous time; ``batch``, network rows at once; ``group``,
    the processes that share the batches, all of which get the result: that of one process, to the last bit.
    ``progress(images done, bits/dim so far)`` is called as it runs. Units: bits/dim.
    """
    if times_per_shift < 1 or shifts < 1:
        raise ValueError(f"times_per_shift and shifts must be at least 1, got {times_per_shift} and {shifts}")
    images = pixels.as_tensor(images)
    pixels.check_images(images, model.shape, model.levels)
    n, per_image = len(images), times_per_shift * shifts
    index = np.arange(n) if index is None else np.asarray(index)
    label_tensor = None if labels is None else torch.as_tensor(labels)
    rows = n * per_image
    values = {name: np.zeros(rows) for name in TERMS}
    row_times, row_errors = np.zeros(rows), np.zeros(rows)
    own_decoder = model.reverse.decoder == "gaussian"  # another pass of the network: one in each shift
    device, training = model.device, model.training
    mine = np.zeros(rows, dtype=bool)
    model.eval()
    try:
        for i in group.units(math.ceil(rows / batch)):
            chunk = np.arange(i * batch, min((i + 1) * batch, rows))
            image, draw = chunk // per_image, chunk % per_image
            key = index[image]
            u = Draws(seed, key, draw // times_per_shift, device).uniform("time")
            t = times.stratified(u, torch.as_tensor(draw % times_per_shift, device=device), times_per_shift)
            decoded = np.flatnonzero(draw % times_per_shift == 0)
            terms = draw_terms(
                model,
                images[image].to(device),
                t.float(),
                Draws(seed, key, draw, device),
                labels=None if label_tensor is None else label_tensor[image].to(device),
                steps=steps,
                decoded=torch.as_tensor(decoded, device=device) if own_decoder else None,
            )
            for name in TERMS:
                values[name][chunk] = getattr(terms, name).double().cpu().numpy()
            if own_decoder:
                values["reconstruction"][chunk] *= times_per_shift
            row_times[chunk] = t.double().cpu().numpy()
            row_errors[chunk] = math.nan if terms.squared_error is None else terms.squared_error.double().cpu().numpy()
            mine[chunk] = True
            if progress is not None:
                so_far = sum(values[name][mine].mean() for name in TERMS if name != "latent")
                progress(int(chunk[-1] + 1) // per_image, float(pixels.bits_per_dim(float(so_far), model.dimensions)))
    finally:
        model.train(training)
    group.merge(*values.values(), row_times, row_errors)
    bits = {
        name: np.asarray(pixels.bits_per_dim(v.reshape(n, shifts, times_per_shift).mean(2), model.dimensions))
        for name, v in values.items()
    }
    valid = bits["prior"] + bits["reconstruction"] + bits["diffusion"] + bits["valid_latent"]
    published = valid - bits["valid_latent"] + bits["latent"]
    differs = bool(np.any(bits["latent"] != bits["valid_latent"]))
    terms_per_image = {name: v.mean(1) for name, v in bits.items() if differs or name != "valid_latent"}
    return BitsPerDim(
        **_summary(valid, published if differs else None, terms_per_image),
        index=index,
        by_time=(row_times, np.asarray(pixels.bits_per_dim(values["diffusion"], model.dimensions)), row_errors),
        settings={
            "method": "vlb",
            "times_per_shift": times_per_shift,
            "shifts": shifts,
            "steps": steps,
            "seed": seed,
            "batch": batch,
            **_reverse(model, steps),
        },
    )


# What ``ode`` keeps of every draw, (n, R, K) float64 each; nats but for the last three.
DRAW = (
    "prior", "divergence", "decoder", "log_q", "entropy_form", "log_weight", "latent", "valid_latent",
    "evaluations", "rejected", "seconds",
)  # fmt: skip


def ode_table(images: int, replicates: int, samples: int) -> dict[str, np.ndarray]:
    """An empty table of ``ode``'s draws: nan where nothing was solved yet."""
    return {name: np.full((images, replicates, samples), math.nan) for name in DRAW}


def ode(
    model: DiffusionModel,
    images: Tensor | np.ndarray,
    *,
    index: np.ndarray | None = None,
    labels: np.ndarray | Tensor | None = None,
    dequantization: str = "truncated-normal",
    samples: int = 1,
    replicates: int = 2,
    trace: str = "rademacher",
    probes: int = 1,
    rtol: float = 1e-3,
    atol: float = 1e-3,
    method: str = "adams4",
    least_steps: int | None = None,
    double: bool = False,
    seed: int = 0,
    batch: int = 64,
    table: dict[str, np.ndarray] | None = None,
    save: Callable[[dict[str, np.ndarray]], None] | None = None,
    group: Group = ALONE,
    progress: Callable[[int, float], None] | None = None,
) -> BitsPerDim:
    """The likelihood of whole-number images (n, C, H, W) by the probability flow, equations (4) to (6).

    ``dequantization``: truncated-normal, uniform or variational; ``samples`` K and ``replicates`` R; ``trace``: exact,
    or Hutchinson's with ``probes`` rademacher or gaussian ones, averaged; ``rtol``, ``atol``, ``method`` of the solver
    (ode.py), tolerances of a pixel in units of the noise there and, for the log-density, in nats per dimension, and
    ``least_steps``, the N of flow.py's equation (7); ``double``: a float64 state; ``batch``, solves at once. ``table``
    (``ode_table``): draws that are in it already are not solved again, and it is filled in place; ``save(table)`` is
    called after every batch, by each process of ``group`` with what it knows; processes share the batches and all get
    the result. ``progress(images done, bits/dim so far)``. Units: bits/dim. Raises SolverError where a solve fails.
    """
    if samples < 1 or replicates < 1 or probes < 1:
        raise ValueError(f"samples, replicates and probes must be at least 1, got {samples}, {replicates}, {probes}")
    if trace not in ("exact", "rademacher", "gaussian"):
        raise ValueError(f"trace must be exact, rademacher or gaussian, got {trace!r}")
    images = pixels.as_tensor(images)
    pixels.check_images(images, model.shape, model.levels)
    n, per_image = len(images), replicates * samples
    index = np.arange(n) if index is None else np.asarray(index)
    if len(np.unique(index)) != n:
        raise ValueError("index must name every image once: an image's latent is inferred once for all its draws")
    table = ode_table(n, replicates, samples) if table is None else table
    flat = {name: values.reshape(-1) for name, values in table.items()}
    label_tensor = None if labels is None else torch.as_tensor(labels)
    training, mine = model.training, np.zeros(n * per_image, dtype=bool)
    model.eval()
    try:
        for i in group.units(math.ceil(len(mine) / batch)):
            rows = np.arange(i * batch, min((i + 1) * batch, len(mine)))
            mine[rows] = True
            rows = rows[np.isnan(flat["prior"][rows])]
            if not len(rows):
                continue
            image, draw = rows // per_image, rows % per_image
            begun = time.perf_counter()
            found = _solve_draws(
                model,
                images[image],
                None if label_tensor is None else label_tensor[image],
                Draws(seed, index[image], draw, model.device),
                Draws(seed, index[image], draw // samples, model.device),
                dequantization=pixels.DEQUANTIZATIONS[dequantization](),
                trace=trace,
                probes=probes,
                dtype=torch.float64 if double else torch.float32,
                solver={"rtol": rtol, "atol": atol, "method": method, "least_steps": least_steps},
            )
            found["seconds"] = np.full(len(rows), (time.perf_counter() - begun) / len(rows))
            for name in DRAW:
                flat[name][rows] = found[name]
            if save is not None:
                save(table)
            if progress is not None:
                whole = ~np.isnan(table["prior"]).any((1, 2))
                done = max(int(whole.sum()), int(rows[-1] + 1) // per_image)  # others have those before
                solved = {name: values[whole] for name, values in table.items()}
                so_far = float(_figures(solved, samples)[0].mean()) if whole.any() else math.nan
                progress(done, float(pixels.bits_per_dim(so_far, model.dimensions)))
    finally:
        model.train(training)
    for values in flat.values():
        values[~mine] = 0
    group.merge(*flat.values())
    nats, terms = _figures(table, samples)
    bits = {name: np.asarray(pixels.bits_per_dim(v.mean(1), model.dimensions)) for name, v in terms.items()}
    valid = np.asarray(pixels.bits_per_dim(nats, model.dimensions))
    charge, valid_charge = (table[name].mean(2) for name in ("latent", "valid_latent"))
    differs = bool(np.any(charge != valid_charge))
    published = valid + np.asarray(pixels.bits_per_dim(charge - valid_charge, model.dimensions))
    return BitsPerDim(
        **_summary(valid, published if differs else None, bits),
        index=index,
        is_bound=trace == "exact",
        settings={
            "method": "ode",
            "dequantization": dequantization,
            **(_reverse(model, 0) if dequantization == "variational" else {"decoder": None}),
            "samples": samples,
            "replicates": replicates,
            "trace": trace,
            "probes": 0 if trace == "exact" else probes,
            "rtol": rtol,
            "atol": atol,
            "solver": method,
            "least_steps": LEAST_STEPS.get(method, 1) if least_steps is None else least_steps,
            "double": double,
            "seed": seed,
            "batch": batch,
        },
        cost={
            "evaluations_per_solve": float(table["evaluations"].mean()),
            "most_evaluations": float(table["evaluations"].max()),
            "rejected_per_solve": float(table["rejected"].mean()),
            "seconds_per_image": float(table["seconds"].sum() / n),
        },
    )


def _figures(table: dict[str, np.ndarray], samples: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Equation (5) or (6), (n, R) nats, and the terms that add up to it."""
    terms = {"prior": -table["prior"], "divergence": -table["divergence"], "decoder": -table["decoder"]}
    if samples == 1:
        terms |= {"dequantization": table["entropy_form"], "latent": table["valid_latent"]}
    else:
        terms |= {"dequantization": table["log_q"], "latent": -table["log_weight"]}
    costs = np.sum(list(terms.values()), 0)
    figure = math.log(samples) - np.logaddexp.reduce(-costs, 2)
    means = {name: value.mean(2) for name, value in terms.items()}
    if samples > 1:
        means["weighting"] = figure - costs.mean(2)
    return figure, means


@torch.no_grad()
def _solve_draws(
    model: DiffusionModel,
    images: Tensor,
    labels: Tensor | None,
    draws: Draws,
    probe_draws: Draws,
    *,
    dequantization: pixels.Dequantization,
    trace: str,
    probes: int,
    dtype: torch.dtype,
    solver: dict[str, Any],
) -> dict[str, np.ndarray]:
    """The entries of ``DRAW`` for one batch of rows, (B,) each; ``probe_draws`` are shared by the K draws."""
    images, shape = images.to(model.device), model.shape
    c, log_weight, charge, valid_charge = _latent_draw(model, images, labels, draws)
    e = None
    if trace == "rademacher":
        e = 1.0 - 2.0 * (probe_draws.uniform("probe", (probes, *shape)) < 0.5)
    elif trace == "gaussian":
        e = probe_draws.normal("probe", (probes, *shape))
    flow = Flow(model, c, probes=e)
    t_0 = torch.zeros(len(images), dtype=torch.float64, device=model.device)
    gamma_0 = flow.gamma(t_0)
    level = dequantization.start(levels=model.levels)
    if level is not None:
        if model.schedule.timesteps and not float(gamma_0.min()) <= level:
            raise ValueError(
                f"this dequantization starts at gamma = {level:.2f}, below the lowest noise the network was trained "
                f"on, {float(gamma_0.min()):.2f}: use variational, or truncated-normal"
            )
        t_0 = time_of(flow.gamma, level, t_0)
        gamma_0 = flow.gamma(t_0)
    alpha, sigma = model.path.coefficients(gamma_0)
    noise = draws.normal("eps_0", shape) if dequantization.noise == "normal" else draws.uniform("eps_0", shape)
    start = dequantization.draw(images, model.data_scale * alpha, sigma, model.levels, noise.to(dtype))
    decoder = start.decoder
    if isinstance(dequantization, pixels.Variational) and model.reverse.decoder == "gaussian":
        decoder = -objectives.decoder_term(model, images, start.z.to(flow.precision or dtype), c)
    end = flow.transport(start.z, t_0, 1.0, divergence=True, **solver)
    if not end.solution.success:
        raise SolverError(end.solution.advice)
    assert end.divergence is not None
    found = {
        "prior": log_prior(end.z, model.prior_scale),
        "divergence": end.divergence,
        "decoder": decoder,
        "log_q": start.log_q,
        "entropy_form": start.entropy_form,
        "log_weight": log_weight,
        "latent": charge,
        "valid_latent": valid_charge,
        "evaluations": end.solution.evaluations,
        "rejected": end.solution.rejected,
    }
    return {name: value.double().cpu().numpy() for name, value in found.items()}


def _latent_draw(
    model: DiffusionModel, images: Tensor, labels: Tensor | None, draws: Draws
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """c with its log-weight, its charge as published and the valid one, (B,) nats each; images may repeat."""
    none = torch.zeros(len(images), device=images.device)
    latent = model.latent
    if latent is None:
        return None, none, none, none
    # The encoder sees an image once, however many draws of it there are.
    _, first, place = np.unique(draws.index, return_index=True, return_inverse=True)
    seen = model.reals(images[first])
    parameters = model.encode(seen, None if labels is None else labels[first].to(images.device))
    parameters = tuple(p[place] for p in parameters)
    # The paper's posterior is evaluated at its mode, as publicly: the k largest logits without noise.
    noise = latent.noise(draws)
    noise = torch.zeros_like(noise) if isinstance(latent, PaperKHot) else noise
    draw = latent.posterior(parameters, noise)
    return draw.c, latent.log_weight(parameters, draw.c), draw.kl, draw.valid_kl


def compare(a: BitsPerDim, b: BitsPerDim) -> Estimate:
    """The mean of a - b over the images that both saw, paired, with its standard error. Bits/dim."""
    if not np.array_equal(a.index, b.index):
        raise ValueError("a comparison needs two evaluations of the same images in the same order")
    return _estimate(a.per_image - b.per_image)
