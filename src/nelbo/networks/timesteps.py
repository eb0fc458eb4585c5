r"""Networks that are told a timestep, as DDPM's are, where the rest of the library speaks of gamma.

A network trained on T noise levels was shown their numbers n = 0 .. T - 1. Between the levels, and wherever only gamma
is known, it is told

    (1)  n(gamma), the monotone cubic through the points (gamma_n, n)

a whole number at every level, so that it is asked exactly what it was asked in training. That makes the denoiser one
function of (z, gamma), whatever the schedule between the levels. Beyond the levels n stays at 0 or T - 1.

DDPM's own U-Net is diffusers' UNet2DModel, built with the settings of the published checkpoints and used as it stands.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nelbo.cubics import MonotoneCubic
from nelbo.networks.attention_unet import AttentionUNet
from nelbo.networks.layers import Dropout

__all__ = ["TIMESTEP_NETWORKS", "DiffusersUNet", "TimestepNetwork", "ddpm_unet"]


class TimestepNetwork(nn.Module):
    """(z, gamma) -> network(z, n(gamma), estimate), equation (1).

    ``network``: (z (B, C, H, W), n (B,) float32, estimate of x or None) -> output. ``gammas`` (T,), rising.
    """

    def __init__(self, network: Callable[..., Tensor], gammas: Sequence[float] | np.ndarray) -> None:
        super().__init__()
        self.network, self.number = network, MonotoneCubic(gammas, np.arange(len(gammas)))

    def timestep(self, gamma: Tensor) -> Tensor:
        """n(gamma), float64, shaped as gamma."""
        return self.number(gamma)[0]

    def forward(
        self, z: Tensor, gamma: Tensor, conditioning: Tensor | None = None, estimate: Tensor | None = None
    ) -> Tensor:
        """The output for z (B, C, H, W) at one gamma an image, broadcastable to (B, 1, 1, 1)."""
        assert conditioning is None, "a network of timesteps takes no conditioning vector"
        n = self.timestep(gamma.reshape(gamma.shape[0], -1)[:, 0].expand(len(z)))
        return self.network(z, n.to(z.dtype), estimate)


class DiffusersUNet(nn.Module):
    """A UNet2DModel of diffusers as (z, n, estimate) -> output; the estimate's channels come before those of z.

    Its dropout becomes that of layers.py, whose mask belongs to the example."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        for part in list(unet.modules()):
            for name, layer in part.named_children():
                if type(layer) is nn.Dropout:
                    setattr(part, name, Dropout(layer.p))

    def forward(self, z: Tensor, n: Tensor, estimate: Tensor | None = None) -> Tensor:
        z = z if estimate is None else torch.cat((estimate, z), 1)
        return self.unet(z, n, return_dict=False)[0]


def ddpm_unet(
    shape: tuple[int, int, int],
    inputs: int,
    outputs: int,
    *,
    channels: int = 128,
    multipliers: Sequence[int] = (1, 2, 2, 2),
    blocks: int = 2,
    attention: Sequence[int] = (16,),
    groups: int = 32,
    dropout: float = 0.0,
    norm_eps: float = 1e-6,
    head_features: int | None = None,
    cosines_first: bool = False,
    frequency_shift: float = 1.0,
    downsample_padding: int = 0,
) -> DiffusersUNet:
    """DDPM's U-Net for images of ``shape``: ``channels`` times each of ``multipliers`` at halved resolutions,
    ``blocks`` residual blocks a level, attention where the height is one of ``attention``, and in the middle.

    The settings are those of google/ddpm-cifar10-32: with its arguments, 35.7 M parameters. ``head_features`` of
    attention (one head of all channels); ``cosines_first`` in the embedding of time, whose frequencies are
    10000^(-j/(c/2 - frequency_shift)); ``downsample_padding``: zeros beyond the end of a map that is halved (0), or on
    every side (1). Weights begin as in DDPM's code: Glorot's uniform, and zero where a block or the network ends.
    Raises ImportError without diffusers.
    """
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    sizes = [shape[1] // 2**i for i in range(len(multipliers))]
    kinds = ["Attn" if size in attention else "" for size in sizes]
    unet: Any = UNet2DModel(
        sample_size=shape[1:] if shape[1] != shape[2] else shape[1],
        in_channels=inputs,
        out_channels=outputs,
        center_input_sample=False,
        time_embedding_type="positional",
        # A whole number: diffusers' type, and what its published configurations hold.
        freq_shift=int(frequency_shift) if frequency_shift == int(frequency_shift) else frequency_shift,
        flip_sin_to_cos=cosines_first,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(channels * m for m in multipliers),
        layers_per_block=blocks,
        mid_block_scale_factor=1,
        downsample_padding=downsample_padding,
        dropout=dropout,
        act_fn="silu",
        attention_head_dim=head_features,
        norm_num_groups=groups,
        norm_eps=norm_eps,
    )
    parts: list[Any] = list(unet.modules())
    for part in parts:
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    ends: list[Any] = [part.conv2 for part in parts if isinstance(part, ResnetBlock2D)]
    ends += [part.to_out[0] for part in parts if isinstance(part, Attention)]
    for end in (*ends, parts[0].conv_out):
        nn.init.zeros_(end.weight)
    return DiffusersUNet(unet)


TIMESTEP_NETWORKS: dict[str, Callable[..., nn.Module]] = {"ddpm": ddpm_unet, "attention": AttentionUNet}
