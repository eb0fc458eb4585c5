r"""Runs of addtt/variational-diffusion-models, a PyTorch port of VDM: ``config.yaml`` and ``model.pt``.

Its network is the flat U-Net of this library, but for four things, all of which a configuration says:

    (1)  Fourier features of exponents 5 and 6, an exponent's channels together; here a channel's exponents are
    (2)  group normalisation with eps = 1e-5, torch's own, where flax has 1e-6
    (3)  attention of several heads, where n_attention_heads is above 1: head h has the h-th part of the channels
    (4)  q, k and v are one convolution, (3 C, C, 1, 1), each a third of its outputs

(1) and (4) are matters of order, and Adam's moments follow the weights through both. gamma is b + |w| t, or the line
from gamma_min to gamma_max; either way the network is told (gamma - gamma_min)/(gamma_max - gamma_min). Images are of
256 levels, their bins' centres in [-1, 1]. Outputs agree to 1e-6 of their size: frequencies of the embedding of time,
which reaches 1000, are rounded otherwise there.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nelbo.config import Config, ReverseConfig
from nelbo.convert import Converted, Images
from nelbo.convert.torch_checkpoints import adam_moments, image_shape, read_torch, tensors_of
from nelbo.errors import UserError

__all__ = ["convert"]

PROGRAM = "addtt/variational-diffusion-models"
EXPONENTS, EPS, LEVELS = (5.0, 6.0), 1e-5, 256
SETTINGS: dict[str, type] = {
    "embedding_dim": int, "n_blocks": int, "n_attention_heads": int, "dropout_prob": float, "norm_groups": int,
    "input_channels": int, "use_fourier_features": bool, "attention_everywhere": bool, "batch_size": int,
    "noise_schedule": str, "gamma_min": float, "gamma_max": float, "antithetic_time_sampling": bool, "lr": float,
    "weight_decay": float, "clip_grad_norm": bool,
}  # fmt: skip
ENDS: dict[str, Any] = {"fixed_linear": "fixed", "learned_linear": "learned"}
NAMES = (
    (r"^model\.embed_conditioning\.0", "network.trunk.dense_0"), (r"^model\.embed_conditioning\.2",
    "network.trunk.dense_1"), (r"^model\.conv_in", "network.trunk.conv_in"),
    (r"^model\.mid_resnet_block_1", "network.trunk.middle.0.block"),
    (r"^model\.mid_attn_block", "network.trunk.middle.0.attention"),
    (r"^model\.mid_resnet_block_2", "network.trunk.middle.1.block"),
    (r"^model\.down_blocks", "network.trunk.down"), (r"^model\.up_blocks", "network.up"),
    (r"^model\.conv_out\.0", "network.norm"), (r"^model\.conv_out\.2", "network.conv_out"),
    (r"resnet_block", "block"), (r"attention_block", "attention"), (r"net1\.0", "norm_1"), (r"net1\.2", "conv_1"),
    (r"net2\.0", "norm_2"), (r"net2\.[23]", "conv_2"), (r"cond_proj", "project"), (r"skip_conv", "shortcut"),
    (r"layers\.0", "norm"), (r"layers\.1", "qkv"), (r"layers\.3", "out"),
    (r"^gamma\.b$", "schedule.start"), (r"^gamma\.w$", "schedule.slope"),
)  # fmt: skip


def convert(source: Path, base: Config, images: Images = Images()) -> Converted:  # noqa: B008, frozen
    """A folder with ``config.yaml`` and ``model.pt``, or the latter; ``base`` gives data, steps and what is logged.

    UserError where a file is missing, damaged, another program's or holds code, or a setting is of another version.
    """
    file = source / "model.pt" if source.is_dir() else source
    settings = _settings(file.with_name("config.yaml"))
    channels = settings["input_channels"]
    shape, levels = image_shape(file, channels, base, images)
    if levels not in (None, LEVELS):
        raise UserError(f"{file} is of images of {LEVELS} grey levels, and {base.data.source} has {levels}")
    content = read_torch(file)
    if not isinstance(content, dict) or "model" not in content:
        raise UserError(f"{file} is no checkpoint of {PROGRAM}: it lacks model")
    raw = tensors_of(file, content["model"], "model")
    states = {"raw": raw}
    if "ema" in content:
        average = tensors_of(file, content["ema"], "ema")
        states["ema"] = {n.removeprefix("ema_model."): v for n, v in average.items() if n.startswith("ema_model.")}
    moments = adam_moments(file, content.get("opt"), raw)
    try:
        weights = {kind: dict(_translated(state, channels)) for kind, state in states.items()}
        optimizer = None if moments is None else _moments(moments, channels)
    except (RuntimeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{file} does not fit its config.yaml: {reason}") from None
    step = content.get("step", 0)
    if type(step) is not int or step < 0:
        raise UserError(f"{file}: step must be a whole number, got {step!r}")
    config = _config(settings, base)
    size = "x".join(map(str, shape))
    notes = (
        f"{PROGRAM}: network, schedule, objective and optimizer are those of config.yaml",
        f"images: {size}, {LEVELS} levels: channels and levels as the program has them, height and width "
        + ("as given" if images.size else f"of {base.data.source}"),
        f"weights: {' and '.join(weights)}; moments of Adam: {'kept' if optimizer else 'none'}",
        "the program's AdamW decays biases too, and its average begins with a shorter memory: nelbo does neither",
    )
    return Converted(
        config=config, shape=shape, levels=LEVELS, weights=weights, step=step, optimizer=optimizer, notes=notes,
        origin={"program": PROGRAM, "source": str(file), "settings": settings, "inferred": {"images": size}},
    )  # fmt: skip


def _settings(path: Path) -> dict[str, Any]:
    """config.yaml, its settings all there and of their types."""
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path} is YAML: pip install 'nelbo[convert]'") from None
    try:
        found = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}, which says what the network is: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a table of settings, as {PROGRAM} writes it")
    for what, names in (("lacks", SETTINGS.keys() - found.keys()), ("has unknown", found.keys() - SETTINGS.keys())):
        if names:
            said = ", ".join(sorted(map(str, names)))
            raise UserError(f"{path} {what} settings ({said}): another program's or version's")
    for name, kind in SETTINGS.items():
        value = found[name]
        if kind is float and type(value) is int:
            found[name] = float(value)
        elif type(value) is not kind:
            raise UserError(f"{path}: {name} must be of type {kind.__name__}, got {value!r}")
    if found["noise_schedule"] not in ENDS:
        raise UserError(f"{path}: noise_schedule must be one of {', '.join(ENDS)}, got {found['noise_schedule']!r}")
    channels, heads = found["embedding_dim"], found["n_attention_heads"]
    if heads < 1 or channels % heads:
        raise UserError(f"{path}: n_attention_heads must divide embedding_dim = {channels}, got {heads}")
    if found["input_channels"] < 1:
        raise UserError(f"{path}: input_channels must be above 0, got {found['input_channels']}")
    return found


def _config(settings: dict[str, Any], base: Config) -> Config:
    """The run's configuration; UserError where a number in it is out of range."""
    channels, heads = settings["embedding_dim"], settings["n_attention_heads"]
    return Config(
        data=replace(base.data, encoding="centres", augment="none"),
        schedule=replace(
            base.schedule, kind="linear", ends=ENDS[settings["noise_schedule"]], gamma_min=settings["gamma_min"],
            gamma_max=settings["gamma_max"], betas=None,
        ),
        path="vp", parameterization="noise", reverse=ReverseConfig(),
        latent=replace(base.latent, kind="none"), encoder=replace(base.encoder, channels=None),
        network=replace(
            base.network, kind="flat", channels=channels, levels=settings["n_blocks"], groups=settings["norm_groups"],
            norm_eps=EPS, dropout=settings["dropout_prob"], heads=(4,),
            head_features=None if heads == 1 else (channels // heads,),
            fourier=EXPONENTS if settings["use_fourier_features"] else (),
            attention="everywhere" if settings["attention_everywhere"] else "middle",
            self_condition=False, flag=False, skip=1.0,
        ),
        objective=replace(
            base.objective, loss="bound", steps=0, minimise_variance=False, second_order=0.0, prior_scale=1.0,
            times="stratified" if settings["antithetic_time_sampling"] else "uniform",
        ),
        optimizer=replace(
            base.optimizer, learning_rate=settings["lr"], schedule_learning_rate=None, beta_1=0.9, beta_2=0.99,
            eps=1e-8, weight_decay=settings["weight_decay"], warmup=0, decay="none", ema=0.9999,
            clip=1.0 if settings["clip_grad_norm"] else 0.0,
        ),
        training=replace(base.training, batch=settings["batch_size"], accumulate=1),
    )  # fmt: skip


def _translated(state: dict[str, Tensor], channels: int) -> Iterator[tuple[str, Tensor]]:
    """Names and layouts of DiffusionModel, equations (1) and (4); ``channels`` of an image."""
    for name, value in state.items():
        own = _names(name)
        if len(own) == 3:
            yield from zip(own, (value.flatten(1) if value.ndim > 1 else value).chunk(3), strict=True)
        elif own[0].startswith("schedule."):
            yield own[0], value.reshape(1)
        elif own[0].endswith("attention.out.weight"):
            yield own[0], value.flatten(1)
        elif own[0].endswith("conv_in.weight"):
            yield own[0], _channels_together(value, channels)
        else:
            yield own[0], value


def _moments(moments: dict[str, dict[str, Tensor]], channels: int) -> dict[str, Tensor]:
    """Adam's state under our names: moments in the weights' layouts, and numbers of steps for every part."""
    found = {f"step.{own}": step.clone() for name, step in moments["step"].items() for own in _names(name)}
    for key in ("exp_avg", "exp_avg_sq"):
        found |= {f"{key}.{name}": value for name, value in _translated(moments[key], channels)}
    return found


def _names(theirs: str) -> tuple[str, ...]:
    """Our name of a parameter, or the names of its three parts."""
    own = theirs
    for pattern, name in NAMES:
        own = re.sub(pattern, name, own)
    return tuple(own.replace(".qkv.", f".{letter}.") for letter in "qkv") if ".qkv." in own else (own,)


def _channels_together(kernel: Tensor, channels: int) -> Tensor:
    """Equation (1): after z come sines and cosines, each (exponents, channels) there and (channels, exponents) here."""
    z, waves = kernel[:, :channels], kernel[:, channels:]
    waves = waves.unflatten(1, (2, -1, channels)).transpose(2, 3).flatten(1, 3) if waves.shape[1] else waves
    return torch.cat([z, waves], 1).contiguous()
