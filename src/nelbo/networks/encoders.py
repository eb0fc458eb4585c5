"""Encoders of the auxiliary latent: x (B, C, H, W) -> the parameters of q(c|x), one (B, size) tensor per head.

The U-Net encoder is the denoiser's way down and middle with time 0 and conditioning 0, one output channel, swish and a
dense layer; the CNN is two convolutions and a dense layer. A Gaussian latent takes two heads (mean, and a number whose
softplus is the variance), the others one (logits).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.networks.layers import initialise, norm, time_embedding, zero
from nelbo.networks.unet import Trunk

__all__ = ["ENCODERS", "CNNEncoder", "UNetEncoder"]


class UNetEncoder(nn.Module):
    """MuLAN's encoder: Fourier features, ``levels`` residual blocks, attention in the middle, one channel, dense."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        size: int,
        heads: int = 1,
        *,
        channels: int,
        levels: int = 4,
        fourier: Sequence[float] = (),
        groups: int = 32,
        dropout: float = 0.0,
        attention_everywhere: bool = False,
        head_features: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.trunk = Trunk(
            shape[0], channels, levels, channels, 1, fourier, groups, dropout, attention_everywhere,
            head_features=head_features, eps=eps,
        )  # fmt: skip
        self.norm = norm(channels, groups, eps)
        self.conv_out = zero(nn.Conv2d(channels, 1, 3, padding=1))
        self.heads = nn.ModuleList(nn.Linear(math.prod(shape[1:]), size) for _ in range(heads))
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        time = time_embedding(x.new_zeros(len(x)), self.channels)
        condition = self.trunk.condition(time, x.new_zeros(len(x), 1))
        h, _ = self.trunk(x, condition)
        h = F.silu(self.conv_out(F.silu(self.norm(h))).flatten(1))
        return tuple(head(h) for head in self.heads)


class CNNEncoder(nn.Module):
    """MuLAN's small encoder: 3x3 convolutions of 32 and 16 channels with ReLU, dense."""

    def __init__(self, shape: tuple[int, int, int], size: int, heads: int = 1) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(shape[0], 32, 3, padding=1)
        self.conv_2 = nn.Conv2d(32, 16, 3, padding=1)
        self.heads = nn.ModuleList(nn.Linear(16 * math.prod(shape[1:]), size) for _ in range(heads))
        initialise(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.relu(self.conv_2(torch.relu(self.conv_1(x)))).flatten(1)
        return tuple(head(h) for head in self.heads)


ENCODERS: dict[str, type[nn.Module]] = {"unet": UNetEncoder, "cnn": CNNEncoder}
