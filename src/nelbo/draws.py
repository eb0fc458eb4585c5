"""Randomness that belongs to an example, not to its batch.

Every random number is a function of (seed, index, draw, stream): the image's index, which draw of that image, and what
the number is for. So a figure does not depend on the batch size, on the order of the images or on the number of
processes, and a training step can be repeated exactly. The generator is numpy's counter-based Philox; numbers are drawn
on the CPU in float32 and moved, so that every device sees the same ones.
"""

from collections.abc import Callable, Iterator, Sequence
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


# kind -> f(generator, shape of an example, further numbers)
KINDS: dict[str, Callable[..., np.ndarray]] = {
    "keys": lambda g, shape: g.bit_generator.random_raw(shape).view(np.int64),
    "normal": lambda g, shape: g.standard_normal(shape, dtype=np.float32),
    "uniform": lambda g, shape: g.random(shape, dtype=np.float32),
    "gumbel": lambda g, shape: g.gumbel(size=shape),
    "gamma": lambda g, shape, concentration: g.gamma(concentration, size=shape),
}


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
        self.asked: list[tuple[Any, ...]] = []  # the requests so far: kind, stream, shape, further numbers
        self._made: dict[tuple[Any, ...], np.ndarray] = {}

    def prepare(self, asked: Sequence[tuple[Any, ...]]) -> None:
        """Draw now what others were ``asked``, and these will be too: a device may be at work meanwhile."""
        self._made = {request: self._make(*request) for request in asked}

    def _make(self, kind: str, stream: str, shape: Sequence[int], *numbers: float) -> np.ndarray:
        values = np.empty((len(self.index), *shape), dtype=np.int64 if kind == "keys" else np.float32)
        for row, one in enumerate(_generators(self.seed, self.index, self.draw, stream)):
            values[row] = KINDS[kind](one, shape, *numbers)
        return values

    def _take(self, kind: str, stream: str, shape: Sequence[int], *numbers: float) -> Tensor:
        request: tuple[Any, ...] = (kind, stream, tuple(shape), *numbers)
        self.asked.append(request)
        values = self._made.pop(request, None)
        return torch.from_numpy(self._make(*request) if values is None else values).to(self.device)

    def keys(self, stream: str, count: int) -> Tensor:
        """``count`` keys an example for generators on a device: any whole numbers of 64 bits, (B, count), int64."""
        return self._take("keys", stream, (count,))

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers."""
        return self._take("normal", stream, shape)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return self._take("uniform", stream, shape)

    def gumbel(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard Gumbel numbers, -log(-log u)."""
        return self._take("gumbel", stream, shape)

    def gamma(self, stream: str, concentration: float, shape: Sequence[int]) -> Tensor:
        """Gamma numbers of scale 1."""
        return self._take("gamma", stream, shape, concentration)
