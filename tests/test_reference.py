"""Parity: the public implementations' own numbers, case by case, in float32.

Each file of the folder (`tests/reference`, or the one that NELBO_REFERENCE names) is one case, whose kind is the
longest known beginning of its name. Tolerances are those of `tests/reference/README.md`.
`pytest tests/test_reference.py -rP` prints every difference.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference_odes
from nelbo import latents, objectives, optimizers, pixels, samplers, times
from nelbo.config import OptimizerConfig
from nelbo.convert.flax_checkpoints import (
    ATTENTION,
    BLOCK,
    GROUPS,
    channels_first,
    layer_names,
    network_names,
    schedule_names,
    unflatten,
)
from nelbo.model import DiffusionModel
from nelbo.networks.layers import AttentionBlock, ResidualBlock, fourier_features, norm
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import VariancePreserving
from reference_cases import (
    Case,
    Comparison,
    VelocityFromEpsilon,
    build_encoder,
    build_network,
    build_schedule,
    load,
    without_gradient,
)

OWN = Path(__file__).parent / "reference"
FOLDER = Path(os.environ.get("NELBO_REFERENCE") or OWN)


def layers(case: Case, compare: Comparison) -> None:
    """Single layers on inputs of very small variance."""
    for v in case.variants("y"):
        parameters = case.under(f"params/{v}")
        x = channels_first(case[f"in/{v}x"]).requires_grad_()
        condition = case[f"in/{v}cond"].requires_grad_() if f"in/{v}cond" in case else None
        noise = without_gradient(parameters, alone=False)
        layer: nn.Module
        if "conv1/kernel" in parameters:
            assert condition is not None
            inputs, outputs = parameters["conv1/kernel"].shape[2:]
            pixelwise = condition.ndim == 4
            noise = without_gradient(parameters, outputs == GROUPS, pixelwise, whole=False)
            layer = ResidualBlock(inputs, outputs, condition.shape[-1], GROUPS)
            names = layer_names(parameters, BLOCK)
        elif "q/kernel" in parameters:
            layer, names = AttentionBlock(x.shape[1], GROUPS), layer_names(parameters, ATTENTION)
        else:
            layer, names = norm(x.shape[1], GROUPS), {"scale": "weight", "bias": "bias"}
        load(layer, parameters, names)
        if condition is None:
            y = layer(x)
        else:
            y = layer(x, channels_first(condition) if condition.ndim == 4 else condition)
        (y * channels_first(case[f"in/{v}cotangent"])).sum().backward()
        compare(f"{v}y", y, relative=1e-5, layout=channels_first)
        compare(f"{v}vjp_x", x.grad, relative=1e-5, layout=channels_first)
        if condition is not None and "cond_proj/kernel" not in noise:
            compare(f"{v}vjp_cond", condition.grad, relative=1e-5)
        compare.gradients(f"{v}grad_l2/", layer, names, noise, 1e-5)


def score_unet(case: Case, compare: Comparison) -> None:
    """A denoiser from z, gamma and conditioning, and its vector-Jacobian products."""
    parameters = case.under("params/")
    z = channels_first(case["in/z"]).requires_grad_()
    g_t = case["in/g_t"].requires_grad_()
    conditioning = case["in/conditioning"].requires_grad_()
    pixelwise = g_t.ndim == 4
    network = build_network(parameters, case.config, pixelwise)
    everywhere = "up.attn_0/q/bias" in parameters
    gamma = channels_first(g_t) if pixelwise else g_t[:, None, None, None]
    columns = conditioning if conditioning.ndim == 2 else conditioning[:, None]

    compare("fourier", fourier_features(z, (6.0, 7.0)), absolute=1e-5, layout=channels_first)
    time = network.time(gamma, z)
    compare("temb", time, absolute=2e-4)
    if "out/temb_crop" in case:
        rows, across = case["out/temb_crop"].shape[1:3]
        compare("temb_crop", time[:, :rows, :across], absolute=2e-4)
    out = network(z, gamma, columns)
    compare("eps_hat", out, absolute=1e-3 if everywhere else 5e-4, layout=channels_first)

    (out * channels_first(case["in/cotangent"])).sum().backward()
    tolerance = 2e-3 if everywhere else 5e-4
    alone = network.channels == GROUPS
    compare("vjp_z", z.grad, relative=tolerance, layout=channels_first)
    for key, ours in (("vjp_g_t", g_t.grad), ("vjp_conditioning", conditioning.grad)):
        if alone and not pixelwise:
            compare.skip(key)
        else:
            compare(key, ours, relative=tolerance)
    compare.gradients(
        "grad_l2/", network, network_names(parameters), without_gradient(parameters, alone, pixelwise), tolerance
    )


def encoder(case: Case, compare: Comparison) -> None:
    """An encoder of the auxiliary latent, from images."""
    parameters = case.under("params/")
    x = pixels.encode(channels_first(case["in/images"]), case.config["vocab_size"])
    compare.values("z", x, channels_first(case["in/z"]), absolute=1e-6)
    model = build_encoder(parameters, (x.shape[1], x.shape[2], x.shape[3]))
    outputs = model(x)
    if len(outputs) == 1:
        (logits,) = outputs
        compare("logits", logits, absolute=3e-4)
        (logits * case["in/cotangent"]).sum().backward()
    else:
        mu, var = outputs[0], nn.functional.softplus(outputs[1])
        compare("mu", mu, absolute=3e-4)
        compare("var", var, absolute=3e-4)
        (mu * case["in/cotangent_mu"] + var * case["in/cotangent_var"]).sum().backward()
    alone = "conv_in/kernel" in parameters and parameters["conv_in/kernel"].shape[-1] == GROUPS
    tolerance = 2e-3 if "down.attn_0/q/bias" in parameters else 5e-4
    compare.gradients("grad_l2/", model, network_names(parameters), without_gradient(parameters, alone), tolerance)


def schedule(case: Case, compare: Comparison) -> None:
    """gamma and its rate at some times, for each latent where there is one."""
    t, recorded = case["in/t"], case["out/gamma"]
    # A flat vector does not tell its image's sides; any that fit will do.
    flat = recorded.ndim == 3
    shape = (1, 1, recorded.shape[-1]) if flat else (recorded.shape[-1], *recorded.shape[-3:-1])
    model = build_schedule(case.under("params/"), case.config, shape)
    c = case["in/embedding"] if "in/embedding" in case else None
    curve = model.given(c)
    images = recorded.ndim > 1

    def layout(array: Tensor) -> Tensor:
        return array if not images else unflatten(array, shape) if flat else channels_first(array)

    def stack(part: int) -> Tensor:
        values = [curve(time.reshape(1))[part] for time in t]
        return torch.stack([v.expand(len(c), *shape) if c is not None else v.reshape(()) for v in values])

    hard = "dense_out_a/kernel" in case.under("params/")
    compare("gamma", stack(0), absolute=2e-3 if hard else 2e-5, relative=1e-5 if hard else 0, layout=layout)
    compare("dgamma_dt", stack(1), absolute=2e-2 if hard else 2e-5, relative=1e-5 if hard else 0, layout=layout)
    if hard:
        for name, coefficient in zip("abc", model.interior.coefficients(c), strict=True):
            compare(name, coefficient, relative=1e-5, layout=layout)


def latent(case: Case, compare: Comparison) -> None:
    """The latents' draws, what they cost, and the gradients of both."""
    for v in case.variants("embedding"):
        gaussian = "out/" + v + "vjp_mu" in case
        names = ("mu", "var") if gaussian else ("logits",)
        parameters = [case[f"in/{name}"].requires_grad_() for name in names]
        size = parameters[0].shape[1]
        if gaussian:
            drawn = latents.Gaussian(size).at(*parameters, case[f"draw/{v}eps_z"])
        elif v.startswith("topk"):
            model = latents.PaperKHot(size, case.settings(v)["latent_k"])
            if f"draw/{v}gamma_noise" in case:
                noise = model.sum_of_gamma(case[f"draw/{v}gamma_noise"].movedim(0, 1))
                compare(f"{v}noise", noise, absolute=1e-5)
            else:
                noise = case[f"draw/{v}gumbel_noise"]
            drawn = model.posterior(tuple(parameters), noise)
        else:
            step = re.search(r"step(\d+)", v)
            noise = case[f"draw/{v}gumbel_noise"]
            drawn = latents.OneHot(size).posterior(tuple(parameters), noise, int(step[1]) if step else 0)
        compare(f"{v}embedding", drawn.c, absolute=1e-6)
        compare(f"{v}kl", drawn.kl, relative=1e-5)
        vjp = torch.autograd.grad((drawn.c * case["in/cotangent"]).sum(), parameters, retain_graph=True)
        kl_grad = torch.autograd.grad(drawn.kl.sum(), parameters)
        for name, ours, of_kl in zip(names, vjp, kl_grad, strict=True):
            compare(f"{v}vjp_{name}", ours, relative=1e-4)
            compare(f"{v}kl_grad_{name}", of_kl, relative=1e-4)


GAMMA = {
    "learnable_scalar": ("w", "b"),
    "learnable_nnet": ("l1/", "l2/", "l3/", "l_int/"),
    "poly_fixedend": ("dense_",),
}


def build_model(case: Case, settings: dict[str, Any], shape: tuple[int, int, int], kind: str) -> DiffusionModel:
    """The model of a variant; ``kind``: its parameterization. Conditioning that is not a latent is our flag."""
    parameters = case.under("params/score_model/")
    pixelwise = settings.get("unet_type") == "ldm"
    network: nn.Module = build_network(parameters, settings, pixelwise)
    if kind == "velocity" and settings["velocity_from_epsilon"]:
        network = VelocityFromEpsilon(network)
    own = GAMMA.get(settings["gamma_type"], ())
    gamma = {name: array for name, array in case.under("params/gamma/").items() if name.startswith(own)} if own else {}
    of_encoder = case.under("params/encoder_model/")
    encoder = build_encoder(of_encoder, shape) if of_encoder else None
    sees_latent = bool(settings.get("z_conditioning"))
    return DiffusionModel(
        network,
        build_schedule(gamma, settings, shape),
        VariancePreserving(),
        PARAMETERIZATIONS[kind](),
        shape,
        settings["vocab_size"],
        latent=build_latent(settings) if encoder else None,
        encoder=encoder,
        network_sees_latent=sees_latent,
        flag=not sees_latent,
    )


def build_latent(settings: dict[str, Any]) -> latents.Latent:
    """The latent that a configuration of MuLAN names."""
    if settings["latent_type"] == "topk":
        return latents.PaperKHot(settings["latent_size"], settings["latent_k"])
    return {"gumbel": latents.OneHot, "gaussian": latents.Gaussian}[settings["latent_type"]](settings["latent_size"])


def latent_noise(case: Case, v: str, model: DiffusionModel) -> Tensor:
    """The recorded noise of a variant's latent, as its posterior takes it."""
    if f"draw/{v}gamma_noise" in case:
        assert isinstance(model.latent, latents.PaperKHot)
        return model.latent.sum_of_gamma(case[f"draw/{v}gamma_noise"].movedim(0, 1))
    return case[f"draw/{v}gumbel_noise" if f"draw/{v}gumbel_noise" in case else f"draw/{v}eps_z"]


def record(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """A list that will hold (output, inputs ...) of each call of a module."""
    calls: list[tuple[Tensor, ...]] = []
    module.register_forward_hook(lambda _, inputs, output: calls.append((output, *inputs)))
    return calls


def draw_times(case: Case, v: str, batch: int) -> Tensor:
    """The times of a batch before they are put on the grid of a finite T."""
    t0 = case[f"draw/{v}t0"]
    return times.stratified(t0, torch.arange(batch), batch) if t0.ndim == 0 else t0


@dataclass(frozen=True)
class Allowed:
    """What a loss may differ by: gamma, z_t and output absolutely, output, losses and gradients relatively."""

    gamma: float
    z: float
    output: dict[str, float]
    loss: float
    gradient: float


VDM = Allowed(gamma=2e-5, z=1e-5, output={"absolute": 5e-4}, loss=3e-5, gradient=2e-3)
MULAN = Allowed(gamma=1e-3, z=3e-4, output={"relative": 3e-3}, loss=1e-4, gradient=5e-2)


def loss(case: Case, compare: Comparison, kind: str, allowed: Allowed) -> None:
    """A loss from the images on: its parts, what goes into the network and what comes out, and the gradients."""
    images = channels_first(case["in/images"])
    batch, shape = len(images), (images.shape[1], images.shape[2], images.shape[3])
    flag = case["in/conditioning"] if "in/conditioning" in case else None
    for v in case.variants("loss_diff"):
        settings = case.settings(v)
        steps = settings["sm_n_timesteps"]
        model = build_model(case, settings, shape, kind)
        network = model.network.network if isinstance(model.network, VelocityFromEpsilon) else model.network
        calls, raw = record(model.network), record(network)
        x = pixels.encode(images, model.levels)
        t = draw_times(case, v, batch)
        eps, eps_0 = (channels_first(case[f"draw/{v}{name}"]) for name in ("eps", "eps_0"))
        latent = None
        if model.latent is not None:
            latent = model.infer(x, latent_noise(case, v, model), step=settings.get("step", 0))
        terms = objectives.elbo(model, images, t=t, eps=eps, eps_0=eps_0, latent=latent, flag=flag, steps=steps)
        bpd = pixels.bits_per_dim(terms.total.mean(), model.dimensions)
        bpd.backward()
        ((output, z_t, gamma, _),) = calls
        s, t = objectives.discrete_times(t, steps) if steps else (t, t)
        curve = model.curve(None if latent is None else latent.c)

        def compare_gamma(name: str, ours: Tensor, v: str = v) -> None:
            per_pixel = f"out/{v}{name}" in case and case[f"out/{v}{name}"].ndim > 1
            ours = ours.expand(batch, *shape) if per_pixel else ours.flatten()
            compare(v + name, ours, absolute=allowed.gamma, layout=channels_first if per_pixel else None)

        compare(f"{v}t", t, absolute=1e-6)
        gamma_0, gamma_1 = curve(torch.zeros(batch))[0], curve(torch.ones(batch))[0]
        for name, ours in (("g_0", gamma_0), ("g_1", gamma_1), ("g_t", gamma), ("g_s", curve(s)[0])):
            compare_gamma(name, ours)
        compare_gamma("g_t_grad", curve(t)[1])
        if settings.get("unet_type") == "ldm":
            compare_gamma("score_g_t", gamma)
        else:
            compare(f"{v}score_g_t", gamma.mean((1, 2, 3)), absolute=allowed.gamma)
        compare(f"{v}var_0", torch.sigmoid(gamma_0).mean(), relative=allowed.loss)
        compare(f"{v}var_1", torch.sigmoid(gamma_1).mean(), relative=allowed.loss)
        compare(f"{v}z_t", z_t, absolute=allowed.z, layout=channels_first)
        compare(
            f"{v}v_target",
            model.parameterization.target(model.path, gamma, x, eps),
            absolute=allowed.z,
            layout=channels_first,
        )
        compare(f"{v}net_out", raw[0][0], **allowed.output, layout=channels_first)
        for name in ("eps_hat", "v_hat"):
            compare(v + name, output, **allowed.output, layout=channels_first)
        compare(f"{v}loss_recon", terms.reconstruction, relative=allowed.loss)
        # A pixel's part of the prior term is a small difference of numbers near 1, of which float32 loses up to 2^-24;
        # gamma_t and gamma_s, up to 16, each lose 2^-21.
        of_prior = model.dimensions * 2**-24 / float(case[f"out/{v}loss_klz"].mean())
        of_step = 2**-20 / float((gamma - curve(s)[0]).detach().mean()) if steps else 0.0
        compare(f"{v}loss_klz", terms.prior + terms.latent, relative=allowed.loss + of_prior)
        compare(f"{v}loss_diff", terms.diffusion, relative=allowed.loss + of_step)
        compare(f"{v}bpd", bpd, relative=allowed.loss + of_step)
        for prefix, part in (("score_model/", network), ("encoder_model/", model.encoder)):
            if part is not None:
                parameters = case.under(f"params/{prefix}")
                pixelwise = prefix == "score_model/" and settings.get("unet_type") == "ldm"
                noise = without_gradient(parameters, network.channels == GROUPS, pixelwise)
                compare.gradients(f"{v}grad_l2/{prefix}", part, network_names(parameters), noise, allowed.gradient)
        of_gamma = schedule_names(case.under(f"out/{v}grad_l2/gamma/"))
        compare.gradients(f"{v}grad_l2/gamma/", model.schedule, of_gamma, set(), allowed.gradient)
        if latent is not None:
            with torch.no_grad():
                latent_parts(case, compare, v, model, x, latent)
                refed(case, compare, v, network, flag)


def idode_loss(case: Case, compare: Comparison) -> None:
    """i-DODE's losses from the images on: both paths, importance-sampled times, the second order, and the gradients.

    Its decoder divides z_0 by alpha_0 twice; its loss has the prior N(0, I); a straight velocity of it is 1/sqrt 2 of
    ours. ``F_div`` is that of its network.
    """
    images, flag = channels_first(case["in/images"]), case["in/conditioning"]
    batch, shape = len(images), (images.shape[1], images.shape[2], images.shape[3])
    for v in case.variants("loss_diff"):
        settings = case.settings(v)
        model = reference_odes.build(case, settings, shape, v.removesuffix("/"))
        model.prior_scale = 1.0
        network = model.network.network if isinstance(model.network, reference_odes.Scaled) else model.network
        calls, raw = record(model.network), record(network)
        x, t = pixels.encode(images, model.levels), draw_times(case, v, batch)
        eps, eps_0 = (channels_first(case[f"draw/{v}{name}"]) for name in ("eps", "eps_0"))
        weight = settings["second_order_weight"] if settings["second_order"] else 0.0
        probe = channels_first(case[f"draw/{v}hutchinson"]) if weight else None
        terms = objectives.elbo(
            model, images, t=t, eps=eps, eps_0=eps_0, flag=flag,
            importance=settings["importance"], second_order=weight, probe=probe,
        )  # fmt: skip
        gamma_0, gamma_1 = (model.schedule(torch.tensor([end]))[0] for end in (0.0, 1.0))
        alpha_0, sigma_0 = model.path.coefficients(gamma_0)
        twice = -pixels.log_likelihood(images, x + torch.exp(gamma_0 / 2) * eps_0, alpha_0, gamma_0, model.levels)
        bpd = pixels.bits_per_dim((terms.loss - terms.reconstruction + twice).mean(), model.dimensions)
        bpd.backward()
        _, z_t, gamma, columns = calls[0]
        added = terms.second_order if isinstance(terms, objectives.TermsAndSecondOrder) else torch.zeros(batch)
        if probe is not None:
            z = z_t.detach().requires_grad_()
            (product,) = torch.autograd.grad(network(z, gamma, columns), z, probe)
            compare(f"{v}F_div", (product * probe).flatten(1).sum(1), relative=3e-4)
        compare(f"{v}t", t, absolute=1e-6)
        compare(f"{v}g_t", gamma.flatten(), absolute=VDM.gamma)
        compare(f"{v}var_0", (sigma_0**2).squeeze(), relative=VDM.loss)
        compare(f"{v}var_1", (model.path.coefficients(gamma_1)[1] ** 2).squeeze(), relative=VDM.loss)
        compare(f"{v}z_t", z_t, absolute=VDM.z, layout=channels_first)
        compare(f"{v}net_out", raw[0][0], **VDM.output, layout=channels_first)
        compare(f"{v}loss_recon", twice, relative=VDM.loss)
        of_prior = model.dimensions * 2**-24 / float(case[f"out/{v}loss_klz"].mean())  # as above
        compare(f"{v}loss_klz", terms.prior, relative=VDM.loss + of_prior)
        compare(f"{v}loss_diff", terms.diffusion, relative=VDM.loss)
        if weight:
            compare(f"{v}loss_diff2", added, relative=3e-4)
        else:
            compare(f"{v}loss_diff2", added, absolute=1e-30)
        compare(f"{v}bpd_train", bpd, relative=VDM.loss)
        parameters = case.under("params/score_model/")
        noise = without_gradient(parameters, network.channels == GROUPS)
        prefix = f"{v}grad_l2/score_model/"
        compare.gradients(prefix, network, network_names(parameters), noise, VDM.gradient)


def latent_parts(
    case: Case, compare: Comparison, v: str, model: DiffusionModel, x: Tensor, latent: latents.LatentDraw
) -> None:
    """The encoder's outputs, the latent and its cost."""
    assert model.encoder is not None
    outputs = model.encoder(x)
    gaussian = len(outputs) == 2
    for name, ours in zip(("mu", "var") if gaussian else ("logits",), outputs, strict=True):
        compare(v + name, nn.functional.softplus(ours) if name == "var" else ours, absolute=3e-4)
    compare(f"{v}embedding", latent.c, absolute=3e-4 if gaussian else 1e-6)
    compare(f"{v}kl_z", latent.kl, relative=1e-4)


def refed(case: Case, compare: Comparison, v: str, network: nn.Module, flag: Tensor | None) -> None:
    """The network from the recorded z_t, gamma and embedding."""
    gamma = case[f"out/{v}score_g_t"]
    gamma = channels_first(gamma) if gamma.ndim == 4 else gamma[:, None, None, None]
    columns = case[f"out/{v}embedding"] if case.settings(v)["z_conditioning"] else flag[:, None]
    output = network(channels_first(case[f"out/{v}z_t"]), gamma, columns)
    name = "net_out" if f"out/{v}net_out" in case else "eps_hat"
    compare.values(f"{v}{name} again", output, channels_first(case[f"out/{v}{name}"]), absolute=5e-4)


def ancestral(case: Case, compare: Comparison) -> None:
    """One reverse step, and grey levels from z_0."""
    z_t, z_0, eps = (channels_first(case[key]) for key in ("in/z_t", "in/z_0", "draw/eps"))
    batch, shape = len(z_t), (z_t.shape[1], z_t.shape[2], z_t.shape[3])
    i, steps = int(case["in/i"]), int(case["in/T"])
    t, s = torch.full((batch,), (steps - i) / steps), torch.full((batch,), (steps - i - 1) / steps)
    flag = case["in/conditioning"] if "in/conditioning" in case else None
    given = case["in/embedding"] if "in/embedding" in case else None
    compare.seen.add("out/deterministic_embedding")
    fixed = case["out/deterministic_embedding"] if given is not None else None
    for v in case.variants("z_s"):
        settings = case.settings(v) | {"velocity_from_epsilon": False}
        model = build_model(case, settings, shape, "velocity" if v.startswith("velocity") else "noise")
        with torch.no_grad():
            for name, c in (("z_s_conditional", given), ("z_s", fixed)):
                if f"out/{v}{name}" in case:
                    mean, std, _ = samplers.reverse_step(model, c, flag=flag)(z_t, s, t)
                    z_s = mean + std * eps
                    assert z_s.isfinite().all(), f"{case.name}, {v}{name}: not finite"
                    recorded = channels_first(case[f"out/{v}{name}"])
                    known = ~recorded.isnan()  # the public code gives NaN where a schedule is flat
                    compare.seen.add(f"out/{v}{name}")
                    compare.values(v + name, z_s[known], recorded[known], absolute=2e-4)
            gamma_0 = model.curve(fixed)(torch.zeros(batch))[0]
            alpha_0, _ = model.path.coefficients(gamma_0)
            levels = pixels.decode(z_0, alpha_0, gamma_0, model.levels)
            log_probs = pixels.level_log_probs(z_0, alpha_0, gamma_0, model.levels)
        compare(f"{v}x", levels, absolute=0.5, layout=channels_first)
    recorded = case["out/decode_logprobs_crop"]
    rows, across = recorded.shape[1:3]
    crop = log_probs[:, :, :rows, :across].permute(0, 2, 3, 1, 4)
    # Float32 rounds the distances to the levels, in units of exp(gamma_0/2), and their halved squares, down to -1e6.
    distance = (2 * recorded.abs()).sqrt()
    rounding = 2**-22 * (torch.exp(-gamma_0.mean() / 2) * distance + recorded.abs())
    scale = 1 + rounding / 2e-4
    compare.seen.add("out/decode_logprobs_crop")
    compare.values("decode_logprobs_crop", crop / scale, recorded / scale, absolute=2e-4)
    per_pixel = case["out/g_0"].ndim > 1
    compare(
        "g_0",
        gamma_0.expand(batch, *shape) if per_pixel else gamma_0[0].flatten(),
        absolute=2e-5,
        layout=channels_first if per_pixel else None,
    )


class Tree(nn.Module):
    """Parameters under their flax paths."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        for name, array in parameters.items():
            *path, leaf = name.replace(".", "_").split("/")
            node: nn.Module = self
            for part in path:
                if part not in dict(node.named_children()):
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            node.register_parameter(leaf, nn.Parameter(array.clone()))


def optimizer(case: Case, compare: Comparison) -> None:
    """AdamW with its decay mask, the moving average, and the warm-up."""
    settings, recorded = case.config, case.under("params/")
    # torch's AdamW rounds twice a step, for the decay and for the update, flax's once: so steps are taken in float64
    # and rounded to float32.
    model = Tree(recorded).double()
    parameters = {name: model.get_parameter(name.replace(".", "_").replace("/", ".")) for name in recorded}
    config = OptimizerConfig(
        learning_rate=settings["lr"],
        beta_1=settings["b1"],
        beta_2=settings["b2"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        warmup=settings["num_steps_lr_warmup"],
        ema=settings["ema_rate"],
    )
    groups = optimizers.parameter_groups(model, config, set())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in parameters.items():
        compare(f"decayed/{name}", torch.tensor(id(parameter) in decayed), absolute=0.5)
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta_1, config.beta_2), eps=config.eps)
    ema = [array.clone() for array in recorded.values()]
    for step in range(len(case.variants("params/" + re.escape(next(iter(recorded)))))):
        for name, parameter in parameters.items():
            parameter.grad = case[f"in/step{step}/grad/{name}"].double()
        adamw.step()
        rounded = [parameter.detach().float() for parameter in parameters.values()]
        optimizers.update_ema(ema, rounded, config.ema)
        for (name, parameter), now, average in zip(parameters.items(), rounded, ema, strict=True):
            parameter.data.copy_(now)
            compare(f"step{step}/params/{name}", now, absolute=1e-7)
            compare(f"step{step}/ema/{name}", average, absolute=1e-7)
    numbers = case["out/lr_schedule_steps"]
    compare.seen.add("out/lr_schedule_steps")
    rates = [
        config.learning_rate * optimizers.learning_rate_factor(int(n), config, int(numbers.max()) + 1) for n in numbers
    ]
    compare("lr_schedule", torch.tensor(rates), absolute=1e-9)


KINDS: dict[str, Callable[[Case, Comparison], None]] = {
    "layers": layers,
    "score_unet_vdm": score_unet,
    "score_unet_per_pixel": score_unet,
    "encoder_unet": encoder,
    "encoder_cnn": encoder,
    "schedule_poly_fixedend": schedule,
    "schedule_nnet_multivariate": schedule,
    "schedule_linear_multivariate": schedule,
    "schedule_nnet_scalar": schedule,
    "schedule_scalar": schedule,
    "schedule_linear": schedule,
    "latents": latent,
    "vdm_loss": partial(loss, kind="noise", allowed=VDM),
    "mulan_epsilon_loss": partial(loss, kind="noise", allowed=MULAN),
    "idode_loss": idode_loss,
    "mulan_velocity_loss": partial(loss, kind="velocity", allowed=MULAN),
    "vdm_ancestral": ancestral,
    "mulan_ancestral": ancestral,
    "optimizer": optimizer,
    "idode_ode_drift": reference_odes.drift,
    "mulan_ode_drift": reference_odes.drift,
    "idode_ode_likelihood": reference_odes.ode_likelihood,
    "mulan_ode_likelihood": reference_odes.ode_likelihood,
}
FILES = sorted(FOLDER.glob("*.npz"))


def test_the_folder_holds_cases() -> None:
    assert FOLDER.is_dir(), f"{FOLDER} is not a folder"
    assert FILES, f"no reference case (*.npz) in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.timeout(1800)  # a folder of whole likelihoods takes minutes each
def test_case(path: Path) -> None:
    known = [kind for kind in KINDS if path.name.startswith(kind)]
    assert known, f"{path.name} begins with no known kind of case: {', '.join(KINDS)}"
    case = Case(path)
    compare = Comparison(case)
    KINDS[max(known, key=len)](case, compare)
    compare.finish(complete=FOLDER == OWN)
