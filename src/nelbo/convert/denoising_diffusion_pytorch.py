r"""Trainer checkpoints (``model-N.pt``) of denoising-diffusion-pytorch, read by torch's weights-only loader.

The file holds the weights of a GaussianDiffusion, or of one with learned variance, its buffers, and their moving
average. The U-Net's sizes follow from the shapes, and what the network estimates from the buffer of loss weights,

    (1)  noise: w = c/SNR,   data: w = c,   velocity: w = c/(SNR + 1),    c = min(SNR, k), k the largest c there is

except that a learned variance comes with an estimate of the noise, whatever the buffer says: the package trains and
samples it so. The file does not hold the size of the images, nor theta of the time embedding (10000 here) nor the range
of the images (-1 to 1 here), the package's defaults. What follows from betas is taken in float64 (the package's float32
alphas_cumprod would be off by 5e-4). Its optimizer is Adam: AdamW without decay, at a rate that stays.

With a learned variance the package adds 0.001 of one step's KL in bits/dim to the mean square: of a bound of T steps
that is 0.001/T.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo.config import (
    Config,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ReverseConfig,
)
from nelbo.convert import Converted, Images
from nelbo.convert.torch_checkpoints import (
    adam_moments,
    image_shape,
    of_noise_levels,
    read_torch,
    schedule_of_betas,
    tensors_of,
    widened,
)
from nelbo.errors import UserError

__all__ = ["Trained", "convert", "read"]

PROGRAM = "denoising-diffusion-pytorch"
OF_VARIANCE = 0.001  # weight of the KL beside the mean square
NAMES = (
    (r"^init_conv", "conv_in"), (r"^time_mlp\.1", "dense_0"), (r"^time_mlp\.3", "dense_1"),
    (r"^(down|up)s\.(\d+)\.0", r"\1.\2.block_1"), (r"^(down|up)s\.(\d+)\.1", r"\1.\2.block_2"),
    (r"^(down|up)s\.(\d+)\.2", r"\1.\2.attention"), (r"^(down|up)s\.(\d+)\.3(\.1)?\.", r"\1.\2.resize."),
    (r"^mid_block(\d)", r"middle.block_\1"), (r"^mid_attn", "middle.attention"),
    (r"^final_res_block", "block_out"), (r"^final_conv", "conv_out"), (r"\bmlp\.1", "project"),
    (r"block(\d)\.proj", r"conv_\1"), (r"block(\d)\.norm\.g", r"norm_\1.scale"), ("res_conv", "shortcut"),
    (r"attention\.norm\.g", "attention.norm.scale"), ("mem_kv", "memory"), ("to_qkv", "qkv"),
    (r"to_out\.1\.g", "norm_out.scale"), (r"to_out(\.0)?\.", "out."),
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says: arguments of AttentionUNet; betas (T,) float64; the parameterization; the largest SNR in
    the weights of the loss, infinite where none is too large, None where they say nothing; whether the variance was
    learned; the channels of images; steps taken; raw and averaged weights under AttentionUNet's names; Adam's state
    under them, "exp_avg.NAME", and its settings, None where there are none."""

    network: dict[str, Any]
    betas: np.ndarray
    parameterization: str
    largest_snr: float | None
    learned: bool
    channels: int
    step: int
    weights: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Tensor] | None
    adam: dict[str, Any] | None


def read(path: Path, parameterization: str | None = None, otherwise: str | None = None) -> Trained:
    """The contents of a trainer checkpoint. ``parameterization`` (noise, data, velocity), whatever the file tells;
    ``otherwise``, where it tells nothing.

    UserError where the file is none, is damaged, or holds code.
    """
    content = read_torch(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "betas" not in state or "model.init_conv.weight" not in state:
        raise UserError(f"{path} is no trainer checkpoint of {PROGRAM}: it lacks model.betas or a U-Net")
    state = tensors_of(path, state, "model")
    parameters = {name: value for name, value in state.items() if name.startswith("model.")}
    moments = adam_moments(path, content.get("opt"), parameters)
    try:
        raw = _unet_weights(state, "model.")
        network, channels, learned = _arguments(state)
    except (KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: its U-Net is of another kind ({type(error).__name__}: {error})") from None
    averaged = content.get("ema")
    weights = {"raw": raw}
    if isinstance(averaged, dict):
        weights["ema"] = _unet_weights(tensors_of(path, averaged, "ema"), "ema_model.model.")
    told = None if learned else _of_loss_weights(state)
    estimates = parameterization or ("noise" if learned else told[0] if told else otherwise)
    if estimates is None:
        raise UserError(
            f"{path} does not say what its network estimates: give --parameterization noise, data or velocity"
        )
    step = content.get("step", 0)
    if type(step) is not int or step < 0:
        raise UserError(f"{path}: step must be a whole number, got {step!r}")
    return Trained(
        network=network,
        betas=widened(state["betas"].double().numpy()),
        parameterization=estimates,
        largest_snr=told[1] if told and told[0] == estimates else None,
        learned=learned,
        channels=channels,
        step=step,
        weights=weights,
        optimizer=None if moments is None else _moments(moments),
        adam=None if moments is None else content["opt"]["param_groups"][0],
    )


def _own_name(key: str, prefix: str) -> str:
    name = key.removeprefix(prefix)
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _moments(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Adam's state under AttentionUNet's names: moments in the layouts of the weights."""
    found = {f"step.{_own_name(name, 'model.')}": step for name, step in moments["step"].items()}
    for key in ("exp_avg", "exp_avg_sq"):
        found |= {f"{key}.{name}": value for name, value in _unet_weights(moments[key], "model.").items()}
    return found


def _unet_weights(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The U-Net's tensors by AttentionUNet's names and in its layouts."""
    found = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        name = _own_name(key, prefix)
        if name.endswith("scale"):
            value = value.flatten()
        elif "attention" in name and name.endswith("weight"):
            value = value.flatten(1)
        elif "resize" in name and value.shape[2:] == (1, 1):  # a 1x1 kernel on 2x2 pixels side by side
            value = value.reshape(len(value), -1, 2, 2).permute(0, 2, 3, 1)
        elif re.search(r"ups\.\d+\.3\.1\.weight", key):  # after nearest neighbours: a transposed kernel here
            value = value.permute(1, 2, 3, 0)
        elif name.endswith("weight") and value.ndim == 4:
            value = value.permute(0, 2, 3, 1)
        elif name.endswith("memory") and _linear(state, prefix, key):
            value = value.mT
        found[name] = value.contiguous()
    return found


def _linear(state: dict[str, Tensor], prefix: str, key: str) -> bool:
    """Whether an attention's output is normalised, as linear attention's is."""
    return key.rsplit(".", 1)[0] + ".to_out.1.g" in state


def _arguments(state: dict[str, Tensor]) -> tuple[dict[str, Any], int, bool]:
    """Arguments of AttentionUNet, the channels of images, and whether the variance is learned."""
    first, inputs = state["model.init_conv.weight"].shape[:2]
    outputs = state["model.final_conv.weight"].shape[0]
    width, features = state["model.time_mlp.1.weight"].shape
    if width != 4 * features:
        raise RuntimeError("its embedding of time is learned or random")
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("model.downs."))
    sizes = [state[f"model.downs.{i}.3{'' if i == levels - 1 else '.1'}.weight"].shape[0] for i in range(levels)]
    linear = [f"model.downs.{i}.2.to_out.1.g" in state for i in range(levels)]
    memory = [state[f"model.downs.{i}.2.mem_kv"].shape for i in range(levels)]
    learned = outputs == 2 * inputs
    network = {
        "outputs": outputs,
        "channels": features,
        "multipliers": tuple(size // features for size in sizes),
        "first": first,
        "self_condition": inputs == 2 * outputs,
        "full": [not value for value in linear],
        "heads": [shape[1] for shape in memory],
        "features": [shape[2] if value else shape[3] for shape, value in zip(memory, linear, strict=True)],
    }
    return network, min(inputs, outputs), learned


def _of_loss_weights(state: dict[str, Tensor]) -> tuple[str, float] | None:
    """Equation (1) read backwards: what is estimated, and k, infinite where it is above every SNR; None where no choice
    fits."""
    betas = state["betas"].double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    snr = alpha_bar / (1 - alpha_bar)
    weight = state.get("loss_weight")
    if weight is not None and weight.shape == snr.shape:
        for name, factor in (("noise", snr), ("data", torch.ones_like(snr)), ("velocity", snr + 1)):
            c = weight.double() * factor
            if torch.allclose(c, snr.clamp(max=c.max()), rtol=0.02):
                return name, float(f"{c.max():.6g}") if c.max() < 0.99 * snr.max() else float("inf")
    return None


# Runs ----------------------------------------------------------------------------------------------------------------


def convert(source: Path, base: Config, images: Images = Images()) -> Converted:  # noqa: B008, frozen
    """A trainer's ``model-N.pt``; ``base`` gives data, and steps and weights of the loss where the file is silent.

    UserError where the file is none, is damaged or holds code, or the size of its images is not known.
    """
    found = read(source, otherwise=base.parameterization)
    shape, levels = image_shape(source, found.channels, base, images)
    config = Config(
        data=replace(base.data, encoding="ends"), schedule=schedule_of_betas(found.betas, base.schedule), path="vp",
        parameterization=found.parameterization,  # type: ignore[arg-type]
        latent=replace(base.latent, kind="none"), encoder=replace(base.encoder, channels=None),
        network=_network(found, shape[1], base.network),
        reverse=ReverseConfig("learned" if found.learned else "fixed-small", clip=True, decoder="gaussian"),
        objective=_objective(found, base.objective), optimizer=_adam(source, found.adam, base.optimizer),
        training=base.training,
    )  # fmt: skip
    size = f"{'x'.join(map(str, shape))}, {levels or 256} levels"
    said = "as given" if images.size else f"of {base.data.source}"
    noted = {
        "schedule.form": "the file's betas" if config.schedule.betas else config.schedule.form,
        "parameterization": found.parameterization,
        "reverse.variance": config.reverse.variance,
        "network": f"{found.network['channels']} channels times {found.network['multipliers']}",
    }
    told = found.learned or found.largest_snr is not None
    notes = (
        *(f"{name}: {value}" for name, value in noted.items()),
        f"images: {size}, {said}; the file does not say",
        f"weights: {' and '.join(found.weights)}; moments of Adam: {'kept' if found.optimizer else 'none'}",
        "the package's defaults: x from -1 to 1, x_hat clipped, theta = 10000, "
        + ("the loss of LearnedGaussianDiffusion" if found.learned else "the posterior's variance"),
        *(() if told else (f"weights of the loss and parameterization are the preset's: {config.objective.weight}",)),
        "clipping of the gradient, decay of the average, batch and augmentation are the preset's",
    )
    return Converted(
        config=config, shape=shape, levels=levels or 256, step=found.step, notes=notes,
        weights={kind: _placed(state) for kind, state in found.weights.items()},
        optimizer=None if found.optimizer is None else _placed(found.optimizer),
        origin={"program": PROGRAM, "source": str(source), "inferred": noted | {"images": size}},
    )  # fmt: skip


def _placed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """AttentionUNet's names -> DiffusionModel's, of weights and of moments."""
    return {re.sub(r"^((?:exp_avg|exp_avg_sq|step)\.)?", r"\1network.network.", name): v for name, v in state.items()}


def _network(found: Trained, height: int, base: NetworkConfig) -> NetworkConfig:
    """The U-Net of images of that height; defaults where it is as the package builds it by default."""
    sizes = found.network
    levels = len(sizes["multipliers"])
    heads, features, full = (tuple(sizes[key]) for key in ("heads", "features", "full"))
    usual = (False,) * (levels - 1) + (True,)
    return replace(
        base, kind="attention", channels=sizes["channels"], multipliers=sizes["multipliers"],
        first_channels=None if sizes["first"] == sizes["channels"] else sizes["first"],
        full_at=None if full == usual else tuple(height // 2**i for i in range(levels) if full[i]),
        heads=heads if len(set(heads)) > 1 else heads[:1],
        head_features=None if set(features) == {32} else features if len(set(features)) > 1 else features[:1],
        self_condition=sizes["self_condition"], flag=False,
    )  # fmt: skip


def _objective(found: Trained, base: ObjectiveConfig) -> ObjectiveConfig:
    """The package's loss: squares, weighted as the file's buffer says, else as the preset does."""
    made = of_noise_levels(base, len(found.betas), found.learned)
    if found.learned:
        return replace(made, loss="hybrid", norm="l2", weight="none", hybrid=OF_VARIANCE / len(found.betas))
    made = replace(made, loss="simple", norm="l2")
    if found.largest_snr is None:
        return made
    if found.largest_snr == float("inf"):
        return replace(made, weight="snr")
    return replace(made, weight="min-snr", min_snr=found.largest_snr)


def _adam(path: Path, group: dict[str, Any] | None, base: OptimizerConfig) -> OptimizerConfig:
    """Adam's settings, at a rate that stays; the preset's where the file has none."""
    if group is None:
        return base
    try:
        rate, eps, decay, (beta_1, beta_2) = (group[key] for key in ("lr", "eps", "weight_decay", "betas"))
        values = {
            "learning_rate": rate,
            "eps": eps,
            "weight_decay": decay,
            "beta_1": beta_1,
            "beta_2": beta_2,
        }
        return replace(base, **{k: float(v) for k, v in values.items()}, warmup=0, decay="none")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its optimizer has no rate, betas, eps and decay of Adam ({error})") from None
