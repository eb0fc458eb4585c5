"""Randomness that belongs to an example, not to its batch.

Every random number is a function of (seed, index, draw, stream): the image's index, which draw of that image, and what
the number is for. So a figure does not depend on the batch size, on the order of the images or on the number of
processes, and a training step can be repeated exactly. The generator is numpy's counter-based Philox; numbers are drawn
on the CPU in float32 and moved, so that every device sees the same ones.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Draws", "generator"]

STREAMS = {
    name: i
    for i, name in enumerate(("time", "latent", "eps_0", "eps", "prior", "step", "data", "decode", "probe", "dropout"))
}


def generator(seed: int, index: int, draw: int, stream: str) -> np.random.Generator:
    """The generator of one example's stream; seeds, indices and draws are whole numbers from 0 to 2^64 - 1."""
    # The lowest word of the counter is the one that runs. Lists of numbers above and below 2^63 would turn into floats.
    words = np.array([seed, index, 0, 0, draw, STREAMS[stream]], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words[:2], counter=words[2:]))


class Draws:
    """The random numbers of a batch: one (index, draw) for each example.

    Methods return float32 tensors (B, *shape) on ``device``; the same call always returns the same numbers.
    """

    def __init__(
        self,
        seed: int,
        index: Sequence[int] | np.ndarray,
        draw: int | Sequence[int] | np.ndarray = 0,
        device: Any = "cpu",
    ) -> None:
        self.seed, self.device = int(seed), device
        self.index = [int(i) for i in index]
        self.draw = [int(d) for d in np.broadcast_to(np.asarray(draw, dtype=np.uint64), (len(self.index),))]

    def _each(self, stream: str, shape: Sequence[int], draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        values = np.empty((len(self.index), *shape), dtype=np.float32)
        for row, (index, number) in enumerate(zip(self.index, self.draw, strict=True)):
            values[row] = draw(generator(self.seed, index, number, stream))
        return torch.from_numpy(values).to(self.device)

    def keys(self, stream: str, count: int) -> Tensor:
        """``count`` keys an example for generators on a device: any whole numbers of 64 bits, (B, count), int64."""
        values = np.empty((len(self.index), count), dtype=np.int64)
        for row, (index, number) in enumerate(zip(self.index, self.draw, strict=True)):
            values[row] = generator(self.seed, index, number, stream).bit_generator.random_raw(count).view(np.int64)
        return torch.from_numpy(values).to(self.device)

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers."""
        return self._each(stream, shape, lambda g: g.standard_normal(shape, dtype=np.float32))

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return self._each(stream, shape, lambda g: g.random(shape, dtype=np.float32))

    def gumbel(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard Gumbel numbers, -log(-log u)."""
        return self._each(stream, shape, lambda g: g.gumbel(size=shape))

    def gamma(self, stream: str, concentration: float, shape: Sequence[int]) -> Tensor:
        """Gamma numbers of scale 1."""
        return self._each(stream, shape, lambda g: g.gamma(concentration, size=shape))
