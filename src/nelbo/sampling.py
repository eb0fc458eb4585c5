"""Samples on disk: batches of any number, the trajectory of the first few, pictures beside arrays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo import pictures, samplers
from nelbo.model import DiffusionModel

__all__ = ["sample_to_files"]

MOMENTS = 10


def sample_to_files(
    model: DiffusionModel,
    stem: Path,
    *,
    count: int,
    steps: int,
    clip: bool = False,
    categorical: bool = False,
    seed: int = 0,
    batch: int = 256,
    shown: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """STEM.npz, STEM.png and, for the first ``shown`` images, STEM-trajectory.png of x_hat; their paths."""
    shown = min(shown, count, batch)
    moments = np.unique(np.linspace(0, steps - 1, min(MOMENTS, steps)).astype(int))
    trajectory: list[np.ndarray] = []

    def seen(i: int, z: Tensor, x_hat: Tensor) -> None:
        if shown and i in moments and len(trajectory) < len(moments):
            levels = torch.floor((x_hat[:shown] + 1) * model.levels / 2).clamp(0, model.levels - 1)
            trajectory.append(levels.to(torch.uint8).cpu().numpy())

    images = []
    if progress is not None:
        progress(0)
    for first in range(0, count, batch):
        size = min(batch, count - first)
        drawn = samplers.sample(
            model, size, steps=steps, clip=clip, categorical=categorical, seed=seed, first=first, seen=seen
        )
        images.append(drawn.cpu().numpy())
        if progress is not None:
            progress(first + size)
    kept = np.stack(trajectory) if trajectory else None
    return pictures.save_samples(stem, np.concatenate(images), model.levels, kept, 1 - (moments + 1) / steps)
