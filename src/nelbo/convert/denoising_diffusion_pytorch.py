r"""Trainer checkpoints (``model-N.pt``) of denoising-diffusion-pytorch, read by torch's weights-only loader.

The file holds the weights of a GaussianDiffusion, or of one with learned variance, its buffers, and their moving
average. The U-Net's sizes follow from the shapes, and what the network estimates from the buffer of loss weights,

    (1)  noise: w = c/SNR,   data: w = c,   velocity: w = c/(SNR + 1),    c = min(SNR, k), k the largest c there is

except that a learned variance comes with an estimate of the noise, whatever the buffer says: the package trains and
samples it so. The file does not hold the size of the images, nor theta of the time embedding (10000 here) nor the range
of the images (-1 to 1 here), the package's defaults. Betas are float32 there; what follows from them is taken in
float64, which puts gamma within 1.3e-5 of the package's own (its float32 alphas_cumprod would be off by 5e-4).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo.errors import UserError

__all__ = ["Trained", "read"]

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
    """What a checkpoint says: arguments of AttentionUNet; betas (T,) float64; the parameterization; whether the
    variance was learned; the channels of images; steps taken; raw and averaged weights under AttentionUNet's names."""

    network: dict[str, Any]
    betas: np.ndarray
    parameterization: str
    learned: bool
    channels: int
    step: int
    weights: dict[str, dict[str, Tensor]]


def read(path: Path, parameterization: str | None = None) -> Trained:
    """The contents of a trainer checkpoint. ``parameterization`` (noise, data, velocity) where the file does not tell.

    UserError where the file is none, is damaged, or holds code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise what they like
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "betas" not in state or "model.init_conv.weight" not in state:
        raise UserError(
            f"{path} is no trainer checkpoint of denoising-diffusion-pytorch: it lacks model.betas or a U-Net"
        )
    try:
        raw = _unet_weights(state, "model.")
        network, channels, learned = _arguments(state)
    except (KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: its U-Net is of another kind ({type(error).__name__}: {error})") from None
    averaged = content.get("ema")
    weights = {"raw": raw}
    if isinstance(averaged, dict):
        weights["ema"] = _unet_weights(averaged, "ema_model.model.")
    return Trained(
        network=network,
        betas=state["betas"].double().numpy(),
        parameterization=parameterization or ("noise" if learned else _parameterization(path, state)),
        learned=learned,
        channels=channels,
        step=int(content.get("step", 0)),
        weights=weights,
    )


def _unet_weights(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The U-Net's tensors by AttentionUNet's names and in its layouts."""
    found = {}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
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


def _parameterization(path: Path, state: dict[str, Tensor]) -> str:
    """Equation (1) read backwards; UserError where no choice fits."""
    betas = state["betas"].double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    snr = alpha_bar / (1 - alpha_bar)
    weight = state.get("loss_weight")
    if weight is not None and weight.shape == snr.shape:
        for name, factor in (("noise", snr), ("data", torch.ones_like(snr)), ("velocity", snr + 1)):
            c = weight.double() * factor
            if torch.allclose(c, snr.clamp(max=c.max()), rtol=0.02):
                return name
    raise UserError(f"{path} does not say what its network estimates: give --parameterization noise, data or velocity")
