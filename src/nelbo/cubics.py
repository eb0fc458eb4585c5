r"""Monotone cubic interpolation (PCHIP, Fritsch and Butland 1984): through every point, continuous with its slope,
nowhere steeper in sign than the points are, so that what rises stays rising."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["MonotoneCubic"]


class MonotoneCubic(nn.Module):
    """The curve through (x_i, y_i), i = 0 .. N - 1, x rising; beyond the ends it stays at y_0 or y_{N-1}.

    Buffers in float64, kept out of checkpoints: they follow from a configuration.
    """

    x: Tensor
    powers: Tensor

    def __init__(self, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> None:
        super().__init__()
        from scipy.interpolate import PchipInterpolator

        x, y = (np.array(v, dtype=np.float64) for v in (x, y))
        self.register_buffer("x", torch.from_numpy(x), persistent=False)
        powers = np.ascontiguousarray(PchipInterpolator(x, y).c)  # (4, N - 1), the highest power first
        self.register_buffer("powers", torch.from_numpy(powers), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope at x (any shape), float64."""
        x = x.double().clamp(self.x[0], self.x[-1])
        i = torch.searchsorted(self.x[1:-1].contiguous(), x.contiguous(), right=True)
        a, b, c, d = self.powers[:, i]
        u = x - self.x[i]
        return ((a * u + b) * u + c) * u + d, (3 * a * u + 2 * b) * u + c
