"""The denoisers: VDM's flat U-Net, which sees one noise level an image, and MuLAN's, which sees one a pixel.

Both work at full resolution in every layer: conv_in; L down blocks; block, attention, block; L + 1 up blocks, each on
[h, skip]; norm, swish, conv_out. The output is that plus the input z. gamma reaches them scaled by fixed constants,

    (1)  t = (gamma - gamma_0) / (gamma_1 - gamma_0)

also where a schedule has learned other ends (t can then leave [0, 1]). Any height, width and number of channels; with
three channels and the Fourier exponents 6 and 7 they are the public networks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nelbo.networks.layers import (
    AttentionBlock,
    ResidualBlock,
    float32_vectors,
    fourier_features,
    initialise,
    norm,
    time_embedding,
    zero,
)

__all__ = ["NETWORKS", "FlatUNet", "PixelNoiseUNet", "Trunk"]


class Level(nn.Module):
    """A residual block and, on request, attention after it; recomputed in the backward pass on request."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        condition: int,
        groups: int,
        dropout: float,
        attention: bool,
        recompute: bool,
        head_features: int | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, channels, condition, groups, dropout, eps)
        self.attention = AttentionBlock(channels, groups, head_features, eps) if attention else nn.Identity()
        self.recompute = recompute

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, h, condition, use_reentrant=False)
        return self._run(h, condition)

    def _run(self, h: Tensor, condition: Tensor) -> Tensor:
        return self.attention(self.block(h, condition))


class Trunk(nn.Module):
    """What denoisers and encoder share: Fourier features, conv_in, the conditioning vector, down and middle."""

    def __init__(
        self,
        image_channels: int,
        channels: int,
        levels: int,
        time_features: int,
        conditioning: int,
        fourier: Sequence[float],
        groups: int,
        dropout: float = 0.0,
        attention: bool = False,
        recompute: bool = False,
        head_features: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.fourier = tuple(fourier)
        width = 4 * channels
        self.dense_0 = nn.Linear(time_features + conditioning, width)
        self.dense_1 = nn.Linear(width, width)
        self.conv_in = nn.Conv2d(image_channels * (1 + 2 * len(self.fourier)), channels, 3, padding=1)

        def level(attention: bool) -> Level:
            return Level(channels, channels, width, groups, dropout, attention, recompute, head_features, eps)

        self.down = nn.ModuleList(level(attention) for _ in range(levels))
        self.middle = nn.ModuleList((level(True), level(False)))

    def condition(self, time: Tensor, conditioning: Tensor | None) -> Tensor:
        """swish(dense_1(swish(dense_0([time embedding, conditioning])))): (..., time_features) -> (..., 4 channels)."""
        if conditioning is not None:
            time = torch.cat([time, conditioning.to(time.dtype)], -1)
        with float32_vectors(time):
            return F.silu(self.dense_1(F.silu(self.dense_0(time))))

    def features(self, z: Tensor) -> Tensor:
        """z with its Fourier features, (B, C (1 + 2 F), H, W)."""
        return torch.cat([z, fourier_features(z, self.fourier)], 1) if self.fourier else z

    def forward(self, z: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The middle's output and the skips, from conv_in's on."""
        skips = [self.conv_in(self.features(z))]
        for level in self.down:
            skips.append(level(skips[-1], condition))
        h = skips[-1]
        for level in self.middle:
            h = level(h, condition)
        return h, skips


class FlatUNet(nn.Module):
    """VDM's network: (z, gamma, conditioning) -> output shaped as z.

    Parameters: ``image_channels``; ``channels`` and ``levels`` of the trunk; ``conditioning`` columns beside time;
    ``fourier`` exponents; ``gamma_0, gamma_1``, the constants of equation (1); ``groups`` of the normalisation;
    ``dropout``; ``attention_everywhere`` (else in the middle only); ``checkpointing``; ``head_features`` of attention
    (one head of all channels); ``eps`` of the normalisation; ``skip``, how often z is added.
    """

    def __init__(
        self,
        image_channels: int,
        channels: int,
        levels: int,
        conditioning: int,
        fourier: Sequence[float],
        gamma_0: float,
        gamma_1: float,
        groups: int = 32,
        dropout: float = 0.0,
        attention_everywhere: bool = False,
        checkpointing: bool = False,
        head_features: int | None = None,
        eps: float = 1e-6,
        skip: float = 1.0,
    ) -> None:
        super().__init__()
        self.channels, self.conditioning, self.skip = channels, conditioning, skip
        self.gamma_0, self.gamma_1 = gamma_0, gamma_1
        width = 4 * channels
        self.trunk = Trunk(
            image_channels, channels, levels, self.time_features(image_channels, channels), conditioning, fourier,
            groups, dropout, attention_everywhere, checkpointing, head_features, eps,
        )  # fmt: skip
        self.up = nn.ModuleList(
            Level(
                2 * channels, channels, width, groups, dropout, attention_everywhere, checkpointing, head_features, eps
            )
            for _ in range(levels + 1)
        )
        self.norm = norm(channels, groups, eps)
        self.conv_out = zero(nn.Conv2d(channels, image_channels, 3, padding=1))
        initialise(self)

    @staticmethod
    def time_features(image_channels: int, channels: int) -> int:
        """Columns of the time embedding."""
        return channels

    def time(self, gamma: Tensor, z: Tensor) -> Tensor:
        """Embedding of the mean of gamma over the image: (B, channels)."""
        mean = gamma.expand(len(z), *gamma.shape[1:]).mean((1, 2, 3))
        t = (mean - self.gamma_0) / (self.gamma_1 - self.gamma_0)  # of a table in float64
        return time_embedding(t.to(z.dtype), self.channels)

    def conditioned(self, gamma: Tensor, z: Tensor, conditioning: Tensor | None) -> Tensor:
        """The conditioning vector of every residual block: (B, 4 channels)."""
        return self.trunk.condition(self.time(gamma, z), conditioning)

    def forward(self, z: Tensor, gamma: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """z (B, C, H, W), gamma broadcastable to it, conditioning (B, columns) -> (B, C, H, W)."""
        condition = self.conditioned(gamma, z, conditioning)
        h, skips = self.trunk(z, condition)
        for level in self.up:
            h = level(torch.cat([h, skips.pop()], 1), condition)
        return torch.add(self.conv_out(F.silu(self.norm(h))).to(z.dtype), z, alpha=self.skip)


class PixelNoiseUNet(FlatUNet):
    """MuLAN's second network: every pixel and channel has its own time, and the conditioning acts per pixel."""

    @staticmethod
    def time_features(image_channels: int, channels: int) -> int:
        return image_channels * channels

    def time(self, gamma: Tensor, z: Tensor) -> Tensor:
        """Embeddings of a pixel's channels side by side: (B, H, W, C channels)."""
        t = (gamma.expand_as(z) - self.gamma_0) / (self.gamma_1 - self.gamma_0)
        return time_embedding(t.to(z.dtype).permute(0, 2, 3, 1), self.channels).flatten(-2)

    def conditioned(self, gamma: Tensor, z: Tensor, conditioning: Tensor | None) -> Tensor:
        """That of every pixel: (B, 4 channels, H, W)."""
        if conditioning is not None:
            conditioning = conditioning[:, None, None].expand(-1, *z.shape[2:], -1)
        condition = self.trunk.condition(self.time(gamma, z), conditioning).permute(0, 3, 1, 2)
        return condition.contiguous() if z.device.type == "cpu" else condition  # as the images lie there


NETWORKS: dict[str, type[FlatUNet]] = {"flat": FlatUNet, "pixel-noise": PixelNoiseUNet}
