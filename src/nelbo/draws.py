"""Randomness that belongs to an example, not to its batch.

Every random number is a function of (seed, index, draw, stream): the image's index, which draw of that image, and what
the number is for. So a figure does not depend on the batch size, on the order of the images or on the number of
processes, and a training step can be repeated exactly. The generator is numpy's counter-based Philox; numbers are drawn
on the CPU in float32 and moved, so that every device sees the same ones.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
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


def _generators(seed: int, index: Sequence[int], draw: Sequence[int], stream: str) -> Iterator[np.random.Generator]:
    """``generator`` of each example in turn, which is one whose state is set: making a new one takes four times as
    long."""
    one = generator(seed, 0, 0, stream)
    state = one.bit_generator.state
    for i, d in zip(index, draw, strict=True):
        state["state"]["key"] = np.array([seed, i], dtype=np.uint64)
        state["state"]["counter"] = np.array([0, 0, d, STREAMS[stream]], dtype=np.uint64)
        one.bit_generator.state = state
        yield one


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "nelbo-draws")


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

    def _fill(self, values: np.ndarray, stream: str, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        """``values`` (B, ...) with what is drawn for each example: many numbers by torch's number of threads, and not
        more than 8, while which a GPU waits."""

        def rows(start: int, stop: int) -> None:
            generators = _generators(self.seed, self.index[start:stop], self.draw[start:stop], stream)
            for row, one in enumerate(generators, start):
                values[row] = draw(one)

        threads = min(torch.get_num_threads(), 8, values.size // 2**14)
        if threads > 1:
            cuts = [len(values) * i // threads for i in range(threads + 1)]
            list(_pool(threads).map(rows, cuts, cuts[1:]))
        else:
            rows(0, len(values))
        return torch.from_numpy(values).to(self.device)

    def _each(self, stream: str, shape: Sequence[int], draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        return self._fill(np.empty((len(self.index), *shape), dtype=np.float32), stream, draw)

    def keys(self, stream: str, count: int) -> Tensor:
        """``count`` keys an example for generators on a device: any whole numbers of 64 bits, (B, count), int64."""
        values = np.empty((len(self.index), count), dtype=np.int64)
        return self._fill(values, stream, lambda g: g.bit_generator.random_raw(count).view(np.int64))

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
