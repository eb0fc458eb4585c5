"""Samples on disk: batches of any number, the trajectory of the first few, pictures beside arrays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nelbo import pictures, samplers
from nelbo.errors import UserError
from nelbo.model import DiffusionModel

__all__ = ["sample_to_files"]

MOMENTS = 10


def sample_to_files(
    model: DiffusionModel,
    stem: Path,
    *,
    count: int,
    method: str = "ancestral",
    steps: int = 256,
    clip: bool = False,
    rtol: float = 3e-4,
    atol: float = 3e-4,
    categorical: bool = False,
    seed: int = 0,
    batch: int = 256,
    shown: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """STEM.npz, STEM.png and, for the first ``shown`` images of ancestral sampling, STEM-trajectory.png of x_hat; their
    paths. ``steps`` and ``clip`` belong to the method ancestral, ``rtol`` and ``atol`` to ode."""
    shown = min(shown, count, batch) if method == "ancestral" else 0
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
        if method == "ode":
            drawn, flow = samplers.sample_ode(
                model, size, rtol=rtol, atol=atol, categorical=categorical, seed=seed, first=first
            )
            if not flow.solution.success:
                raise UserError(flow.solution.advice)
        else:
            drawn = samplers.sample(
                model, size, steps=steps, clip=clip, categorical=categorical, seed=seed, first=first, seen=seen
            )
        images.append(drawn.cpu().numpy())
        if progress is not None:
            progress(first + size)
    kept = np.stack(trajectory) if trajectory else None
    return pictures.save_samples(stem, np.concatenate(images), model.levels, kept, 1 - (moments + 1) / steps)
