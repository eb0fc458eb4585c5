"""Parity of the probability flow: drifts and divergences, and whole likelihoods from recorded draws.

Mappings between the public conventions and ours. i-DODE integrates over gamma, along which our fixed linear schedule
runs evenly; on the straight path its network puts out (eps - x)/sqrt 2, ours eps - x. MuLAN starts from
x + sigma/alpha u, which is our z_0/alpha_0, and i-DODE's uniform noise from our z/alpha likewise.
"""

import itertools
import math
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from nelbo import latents, ode, pixels
from nelbo.convert.flax_checkpoints import channels_first
from nelbo.flow import Flow, log_prior
from nelbo.model import DiffusionModel
from nelbo.parameterizations import Noise, Velocity
from nelbo.paths import Straight, VariancePreserving
from nelbo.schedules import Linear, Schedule
from reference_cases import (
    Case,
    Comparison,
    VelocityFromEpsilon,
    build_encoder,
    build_network,
    build_schedule,
)

__all__ = ["drift", "ode_likelihood"]

# README: how far drifts and divergences may be apart, for each system.
DRIFT = {"idode": (3e-4, 5e-4), "mulan": (1e-3, 5e-3)}
REPEATED, ADAPTIVE = 0.1, 4.0  # nats of log p, with the recorded steps and with our own
# Draws of a variant that are integrated: all of another folder's; of our own two, for time, and the recorded log p of
# the others goes into the variant's bits/dim.
REPEATS = 1000 if os.environ.get("NELBO_REFERENCE") else 2


class Scaled(nn.Module):
    """A network whose output is multiplied by a constant."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, *inputs: Any) -> Tensor:
        return self.factor * self.network(*inputs)


def build(case: Case, settings: dict[str, Any], shape: tuple[int, int, int], kind: str) -> DiffusionModel:
    """The model of a variant of i-DODE (``kind``: vp, sp, vp_noise, sp_noise ...) or of MuLAN."""
    network: nn.Module = build_network(case.under("params/score_model/"), settings, settings.get("unet_type") == "ldm")
    if case.name.startswith("idode"):
        straight, noise = kind.startswith("sp"), kind.endswith("noise")
        path = Straight() if straight else VariancePreserving()
        prior = float(path.coefficients(torch.tensor(float(settings["gamma_max"])))[1])
        return DiffusionModel(
            network if noise or not straight else Scaled(network, math.sqrt(2)),
            Schedule(Linear(), settings["gamma_min"], settings["gamma_max"]),
            path,
            Noise() if noise else Velocity(),
            shape,
            settings["vocab_size"],
            flag=True,
            prior_scale=prior,
        )
    if kind.startswith("velocity_from_epsilon"):
        network = VelocityFromEpsilon(network)
    encoder = case.under("params/encoder_model/")
    return DiffusionModel(
        network,
        build_schedule(case.under("params/gamma/"), settings, shape),
        VariancePreserving(),
        Velocity() if kind.startswith("velocity") else Noise(),
        shape,
        settings["vocab_size"],
        latent=latents.PaperKHot(settings["latent_size"], settings["latent_k"]),
        encoder=build_encoder(encoder, shape),
    )


def z_field(flow: Flow, t: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """dz/dt and its divergence (B,): what the flow integrates is z/m."""
    model = flow.model
    flow.select(rows)
    gamma, rate = flow.at_work[0](t.to(z.dtype))
    m = flow.scale(gamma)
    speed, trace = flow.field(t, z / m, rows, True)
    assert trace is not None
    alpha, _ = model.path.coefficients(gamma)
    d_alpha, _ = model.path.derivatives(gamma)
    linear = rate * (d_alpha / alpha if isinstance(model.parameterization, Noise) else torch.zeros_like(alpha))
    return m * speed + linear * z, trace + linear.double().expand_as(z).flatten(1).sum(1)


def drift(case: Case, compare: Comparison) -> None:
    """The field and its Hutchinson divergence at recorded states."""
    system = case.name.split("_")[0]
    allowed, allowed_div = DRIFT[system]
    places = list(dict.fromkeys(key.split("/")[1] for key in case.arrays if re.match(r"out/\w+/\w+/drift", key)))
    for place in places:
        z, probe = channels_first(case[f"in/{place}/x_t"]), channels_first(case[f"draw/{place}/hutchinson"])
        batch, shape = len(z), (z.shape[1], z.shape[2], z.shape[3])
        found = (re.match(rf"out/{place}/(\w+)/drift$", key) for key in case.arrays)
        for kind in [match[1] for match in found if match]:
            settings = case.config | case.config.get("variants", {}).get(kind, {})
            model = build(case, settings, shape, kind)
            if system == "idode":
                span = settings["gamma_max"] - settings["gamma_min"]
                t = (case[f"in/{place}/gamma"].double() - settings["gamma_min"]) / span
                flow = Flow(model, probes=probe[:, None], flag=case["in/conditioning"])
            else:
                span, t = 1.0, case[f"in/{place}/t"].double().expand(batch)
                flow = Flow(model, case["in/embedding"], probes=probe[:, None])
            speed, divergence = z_field(flow, t, z, torch.arange(batch))
            for suffix in ("", "_high_precision"):
                key = f"{place}/{kind}/drift{suffix}"
                compare(key, speed / span, relative=allowed, layout=channels_first)
                compare(f"{place}/{kind}/div{suffix}", divergence / span, relative=allowed_div)
            with torch.no_grad():
                gamma, rate = model.curve(case["in/embedding"] if system == "mulan" else None)(t.float())
                columns = (case["in/embedding"], None) if system == "mulan" else (None, case["in/conditioning"])
                x_hat, eps_hat = model.predict(z, gamma, *columns)
            d_alpha, d_sigma = model.path.derivatives(gamma)
            compare.values(
                f"{key} by equation 1", rate * (d_alpha * x_hat + d_sigma * eps_hat), speed.detach(), relative=allowed
            )
            compare(f"{place}/{kind}/eps_hat", eps_hat, relative=allowed, layout=channels_first)
            compare(f"{place}/g_t", gamma.expand_as(z), absolute=2e-3, relative=1e-5, layout=channels_first)
            compare(f"{place}/g_t_grad", rate.expand_as(z), absolute=2e-2, relative=1e-5, layout=channels_first)


def repeat(flow: Flow, z: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """z and the integral of the divergence after the recorded steps of Dormand and Prince's pair."""
    tableau, rows = ode.METHODS["dopri5"], torch.arange(len(z))
    z, total = z.double(), torch.zeros(len(z), dtype=torch.float64)
    for t, after in itertools.pairwise(grid):
        h, speeds, divergences = after - t, list[Tensor](), list[Tensor]()
        for c, row in zip(tableau.c, tableau.a, strict=True):
            at = z + h * sum((a * k for a, k in zip(row, speeds, strict=True)), torch.zeros_like(z))
            speed, divergence = z_field(flow, (t + c * h).expand(len(z)), at.float(), rows)
            speeds.append(speed.double())
            divergences.append(divergence)
        z = z + h * sum(b * k for b, k in zip(tableau.b, speeds, strict=True))
        total = total + h * sum(b * k for b, k in zip(tableau.b, divergences, strict=True))
    return z.float(), total


def ode_likelihood(case: Case, compare: Comparison) -> None:
    """log p of images from recorded dequantization noise and probes: with the recorded steps, and with our own."""
    images = channels_first(case["in/images"])
    batch, shape = len(images), (images.shape[1], images.shape[2], images.shape[3])
    for v in case.variants("log_p"):
        settings = case.settings(v)
        if case.name.startswith("idode"):
            settings = case.config | case.config["variants"].get(v.removesuffix("/"), {})
        kind = {"VP": "vp", "SP": "sp"}.get(settings.get("schedule", ""), v.removesuffix("/"))
        model, idode = build(case, settings, shape, kind), case.name.startswith("idode")
        probes = channels_first(case[f"draw/{v}hutchinson"])
        uniform = settings["dequantization"] == "u"
        noise = channels_first(case[f"draw/{v}dequant_u" if uniform or not idode else f"draw/{v}dequant_eps"])
        starts = channels_first(case[f"out/{v}x_init"])
        c, charge = None, torch.zeros(batch)
        if model.latent is not None:
            x = pixels.encode(images, model.levels)
            parameters = model.encode(x)
            draw = model.latent.posterior(parameters, torch.zeros_like(parameters[0]))  # the mode, as publicly
            c, charge = draw.c.detach(), draw.kl.detach()
            compare(f"{v}logits", parameters[0], absolute=3e-4)
            compare(f"{v}embedding", c, absolute=1e-6)
            compare(f"{v}aux_latent_loss", charge.expand(len(starts), -1), relative=1e-4)
        span = settings["gamma_max"] - settings["gamma_min"] if idode else 1.0
        level = pixels.Uniform().start(model.levels)
        t_0 = (level - settings["gamma_min"]) / span if uniform and level is not None else 0.0
        log_ps, log_qs = [], []
        for i, start in enumerate(starts):
            probe = probes if probes.ndim == 4 else probes[i]
            flow = Flow(model, c, probes=probe[:, None], flag=case["in/conditioning"] if idode else None)
            # The dequantization, from the recorded noise.
            gamma_0 = flow.gamma(torch.full((batch,), t_0, dtype=torch.float64))
            alpha, sigma = model.path.coefficients(gamma_0.detach())
            if uniform:
                drawn = pixels.Uniform().draw(images, alpha, sigma, model.levels, noise[i])
                place = drawn.z / alpha
            else:
                tau = alpha / (model.levels * sigma)
                mass = torch.erf(tau.double() / math.sqrt(2))
                chance = (torch.erf(noise[i].double() / math.sqrt(2)) / mass + 1) / 2
                drawn = pixels.TruncatedNormal().draw(images, alpha, sigma, model.levels, chance)
                place = drawn.z if idode else drawn.z / alpha
                compare(f"{v}tau", tau.mean(), relative=1e-6)
                compare(f"{v}Z", mass.mean(), relative=1e-6)
            compare.values(f"{v}x_init {i}", place, start, absolute=3e-7)
            log_qs.append(drawn)
            if i >= REPEATS:
                log_ps.append(case[f"out/{v}log_p"][i].double())
                continue
            # The recorded steps, then our own.
            n = int(case[f"out/{v}n_steps"][i])
            grid = case[f"out/{v}t_grid"][i][: n + 1].double()
            z, divergence = repeat(flow, start, (grid - settings["gamma_min"]) / span if idode else grid)
            prior = log_prior(z, model.prior_scale)
            for name, ours in (("delta_logp", divergence), ("prior_logp", prior), ("log_p", prior + divergence)):
                compare.values(f"{v}{name} {i}", ours, case[f"out/{v}{name}"][i], absolute=REPEATED)
            compare.values(f"{v}z_1 {i}", z, channels_first(case[f"out/{v}z_1"][i]), relative=1e-3)
            log_ps.append(prior + divergence)
            if i:
                continue  # one draw by our own steps is enough
            own = flow.transport(start, t_0, 1.0, divergence=True, rtol=settings["rtol"], atol=settings["atol"])
            assert own.solution.success, own.solution.advice
            assert own.divergence is not None
            log_p = log_prior(own.z, model.prior_scale) + own.divergence
            compare.values(f"{v}log_p {i}, own steps", log_p, case[f"out/{v}log_p"][i], absolute=ADAPTIVE)
        for name in ("x_init", "z_1", "delta_logp", "prior_logp", "log_p", "nfev", "n_steps", "t_grid"):
            compare.skip(v + name)
        compare_bits(case, compare, v, model, settings, torch.stack(log_ps), log_qs, charge, alpha, sigma, idode)


def compare_bits(
    case: Case,
    compare: Comparison,
    v: str,
    model: DiffusionModel,
    settings: dict[str, Any],
    log_p: Tensor,
    drawn: list[pixels.Dequantized],
    charge: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    idode: bool,
) -> None:
    """log q and bits/dim, with what the public code leaves out put back."""
    draws, dimensions = len(log_p), model.dimensions
    log_q = torch.stack([d.log_q for d in drawn])
    expected = torch.stack([d.entropy_form for d in drawn])
    whole = dimensions * math.log(2)
    scale = float(sigma.double().expand(1, *model.shape).log().sum()) if sigma.shape[0] == 1 else float(
        sigma.double().log().mean() * dimensions)  # fmt: skip
    if settings["dequantization"] == "u":
        compare(f"{v}log_q", torch.zeros_like(log_q), absolute=1e-9)
        # Publicly unscaled: log(L/2) where ours is log(L/(2 alpha)).
        unscaled = log_q + dimensions * float(alpha.double().mean().log())
        bits = (unscaled - log_p).mean(0) / whole
    elif idode:
        one = settings["num_importance"] == 1
        compare(f"{v}log_q", expected if one else log_q, absolute=0.01)
        weights = (expected if one else log_q) - log_p
        bits = (weights.mean(0) if one else -torch.logsumexp(-weights, 0)) / whole  # publicly without log K
    else:
        # The scale sigma_0 stands in bpd_offset. alpha_0 is left out publicly: 2e-6 bits/dim.
        compare(f"{v}log_q", log_q + scale, absolute=0.01)
        if draws == 1:
            compare(f"{v}bpd_offset", expected[0].mean() / whole, absolute=1e-5)
            bits = (charge + expected[0] - log_p[0]) / whole
        else:
            compare(f"{v}bpd_offset", torch.tensor(-scale / whole), absolute=1e-5)
            bits = (charge + math.log(draws) - torch.logsumexp(log_p - log_q, 0)) / whole
        compare(f"{v}bpd", bits.mean(), absolute=2e-3)
    compare(f"{v}bpd_per_image", bits, absolute=2e-3)
