"""From a configuration to a model: the one place that turns names into parts."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from nelbo import latents, networks, schedules
from nelbo.config import Config
from nelbo.errors import UserError
from nelbo.model import DiffusionModel, Reverse
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS

__all__ = ["build_model", "noise_parameters", "parameters_by_part", "table_model"]


def fourier_exponents(config: Config, levels: int) -> tuple[float, ...]:
    """By default the real exponents log2(L/4), the last bit, and log2(L/2), the place in a bin; 6, 7 for 256 levels."""
    if config.network.fourier is not None:
        return config.network.fourier
    return math.log2(levels) - 2, math.log2(levels) - 1


def _latent(config: Config, classes: int | None) -> latents.Latent | None:
    kind, size = config.latent.kind, config.latent.size
    if kind in ("none", "image"):
        return None
    if kind == "label":
        if classes is None:
            raise UserError(f"latent.kind = label needs images with labels; {config.data.source} has none")
        if size < classes:
            raise UserError(f"latent.size must be at least the number of classes = {classes}, got {size}")
        return latents.Label(size)
    if kind == "k-hot":
        if config.latent.posterior == "paper":
            return latents.PaperKHot(size, config.latent.k, config.latent.noise)
        return latents.KHot(size, config.latent.k)
    return latents.LATENTS[kind](size)


def _interior(config: Config, shape: tuple[int, int, int], ends: tuple[float, float]) -> schedules.Interior:
    schedule, latent = config.schedule, config.latent
    condition = {"none": 0, "image": math.prod(shape)}.get(latent.kind, latent.size)
    if schedule.kind == "monotone":
        return schedules.Monotone(*ends, width=schedule.width)
    if schedule.kind == "pixel-monotone":
        return schedules.PixelMonotone(shape, *ends, condition=condition, width=schedule.width)
    if schedule.kind == "polynomial":
        return schedules.Polynomial(shape, condition, schedule.width, schedule.rank)
    if schedule.kind == "scalar-polynomial":
        return schedules.Polynomial((1, 1, 1), condition, schedule.width)
    return schedules.Linear()


def _table(config: Config) -> np.ndarray:
    """gamma_n of a schedule of betas."""
    own, schedule = config.schedule.betas, config.schedule
    return schedules.gammas_of_betas(schedules.betas(schedule.form, schedule.timesteps) if own is None else own)


def _head_features(config: Config) -> int | None:
    """Features of every attention head; None for one head of all channels."""
    return None if config.network.head_features is None else config.network.head_features[0]


def _of_timesteps(config: Config, shape: tuple[int, int, int], gammas: np.ndarray) -> nn.Module:
    """A network that is told timesteps."""
    network, smallest = config.network, 2 ** (len(config.network.multipliers) - 1)
    if shape[1] % smallest or shape[2] % smallest:
        raise UserError(
            f"network.multipliers = {network.multipliers} halves images {len(network.multipliers) - 1} times: height "
            f"and width must be multiples of {smallest}, got {shape[1]}x{shape[2]}"
        )
    outputs = shape[0] * (1 + (config.reverse.variance == "learned"))
    made: dict[str, Any] = {
        "channels": network.channels,
        "multipliers": network.multipliers,
        "dropout": network.dropout,
    }
    unet: nn.Module
    heights = [shape[1] // 2**i for i in range(len(network.multipliers))]
    if network.kind == "attention":
        heads, features = network.heads, network.head_features or (32,)
        unet = networks.AttentionUNet(
            shape[0], outputs, self_condition=network.self_condition, first=network.first_channels,
            full=None if network.full_at is None else [height in network.full_at for height in heights],
            heads=heads if len(heads) > 1 else heads[0], features=features if len(features) > 1 else features[0],
            **made,
        )  # fmt: skip
        return networks.TimestepNetwork(unet, gammas)
    per_head = _head_features(config) or 1
    for m, height in zip(network.multipliers, heights, strict=True):
        if height in (*network.attention_at, heights[-1]) and network.channels * m % per_head:
            raise UserError(
                "network.head_features must divide the channels where attention acts, which are "
                f"{network.channels * m} at height {height}, got {per_head}"
            )
    try:
        inputs = shape[0] * (1 + network.self_condition)
        unet = networks.ddpm_unet(
            shape, inputs, outputs, blocks=network.blocks, attention=network.attention_at, groups=network.groups,
            norm_eps=network.norm_eps, head_features=_head_features(config), cosines_first=network.cosines_first,
            frequency_shift=network.frequency_shift, downsample_padding=network.downsample_padding, **made,
        )  # fmt: skip
    except ImportError as error:
        raise UserError(f"network.kind = ddpm needs diffusers: pip install 'nelbo[ddpm]' ({error})") from None
    return networks.TimestepNetwork(unet, gammas)


def build_model(config: Config, shape: tuple[int, int, int], levels: int, classes: int | None = None) -> DiffusionModel:
    """The model of a configuration for images (C, H, W) of ``levels`` grey levels; weights from training.seed."""
    if not 2 <= levels <= 256:
        raise UserError(f"the number of grey levels must lie in 2 .. 256, got {levels}")
    gamma_0, gamma_1 = config.schedule.gamma_min, config.schedule.gamma_max
    if gamma_0 is None:
        gamma_0 = schedules.default_gamma_0(levels)
    table = _table(config) if config.schedule.kind == "betas" else None
    if table is not None:
        gamma_0, gamma_1 = float(table[0]), float(table[-1])
    if not gamma_0 < gamma_1:
        raise UserError(f"schedule.gamma_max must lie above gamma at t = 0 = {gamma_0:.3f}, got {gamma_1}")
    fourier = fourier_exponents(config, levels)
    network = config.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        latent = _latent(config, classes)
        sees_latent = latent is not None and config.latent.network
        if network.kind in networks.TIMESTEP_NETWORKS:
            assert table is not None  # a configuration says so
            unet = _of_timesteps(config, shape, table)
        else:
            unet = networks.NETWORKS[network.kind](
                shape[0],
                network.channels,
                network.levels,
                (latent.size if latent is not None and sees_latent else 0) + network.flag,
                fourier,
                gamma_0,
                gamma_1,
                groups=network.groups,
                dropout=network.dropout,
                attention_everywhere=network.attention == "everywhere",
                checkpointing=network.checkpointing,
                head_features=_head_features(config),
                eps=network.norm_eps,
                skip=network.skip,
            )
        encoder: nn.Module | None = None
        if latent is not None and latent.heads:
            if config.encoder.kind == "cnn":
                encoder = networks.CNNEncoder(shape, latent.size, latent.heads)
            else:
                encoder = networks.UNetEncoder(
                    shape,
                    latent.size,
                    latent.heads,
                    channels=config.encoder.channels or network.channels,
                    levels=config.encoder.levels,
                    fourier=fourier,
                    groups=network.groups,
                    dropout=network.dropout,
                    attention_everywhere=network.attention == "everywhere",
                    head_features=_head_features(config),
                    eps=network.norm_eps,
                )
        interior = _interior(config, shape, (gamma_0, gamma_1)) if table is None else schedules.Table(table)
        schedule = schedules.Schedule(interior, gamma_0, gamma_1, config.schedule.ends)
    return DiffusionModel(
        unet,
        schedule,
        PATHS[config.path](),
        PARAMETERIZATIONS[config.parameterization](),
        shape,
        levels,
        latent=latent,
        encoder=encoder,
        network_sees_latent=sees_latent,
        flag=network.flag,
        prior_scale=config.objective.prior_scale,
        schedule_reads_image=config.latent.kind == "image",
        data_scale=levels / (levels - 1) if config.data.encoding == "ends" else 1.0,
        reverse=Reverse(**asdict(config.reverse)),
        self_condition=network.self_condition,
    )


def table_model(
    network: nn.Module,
    gammas: np.ndarray,
    shape: tuple[int, int, int],
    levels: int,
    parameterization: str,
    reverse: Reverse,
    self_condition: bool = False,
) -> DiffusionModel:
    """A network of timesteps, (z, n, estimate) -> output, trained on noise levels gamma_n (T,) and x from -1 to 1."""
    return DiffusionModel(
        networks.TimestepNetwork(network, gammas),
        schedules.Schedule(schedules.Table(gammas), float(gammas[0]), float(gammas[-1])),
        PATHS["vp"](),
        PARAMETERIZATIONS[parameterization](),
        shape,
        levels,
        data_scale=levels / (levels - 1),
        reverse=reverse,
        self_condition=self_condition,
    )


def noise_parameters(model: DiffusionModel) -> set[str]:
    """Names of the parameters that make the noise: those of schedule and encoder."""
    return {name for name, _ in model.named_parameters() if name.startswith(("schedule.", "encoder."))}


def parameters_by_part(model: DiffusionModel) -> dict[str, int]:
    """How many parameters each part has: network, schedule, encoder."""
    parts = dict[str, int]()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
