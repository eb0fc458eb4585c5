"""What a notebook needs: models by name, and one draw of the bound."""

from typing import Any

import torch

from nelbo import likelihood, pixels, times
from nelbo.checkpoints import load_model as load
from nelbo.compose import build_model
from nelbo.config import Config
from nelbo.draws import Draws
from nelbo.model import DiffusionModel
from nelbo.objectives import Terms
from nelbo.presets import preset

__all__ = ["build", "elbo", "load"]


def build(name: str | Config, shape: tuple[int, int, int] | None = None, levels: int | None = None) -> DiffusionModel:
    """An untrained model of a preset (or configuration), for its data set's images or the shape and levels given."""
    config = preset(name) if isinstance(name, str) else name
    classes: int | None = config.latent.size
    if shape is None or levels is None:
        from nelbo.data import load as load_data

        data = load_data(config.data.source)
        shape, levels, classes = shape or data.shape, levels or data.levels, data.classes or None
    return build_model(config, shape, levels, classes)


def elbo(model: DiffusionModel, images: Any, labels: Any = None, *, steps: int = 0, seed: int = 0) -> Terms:
    """One draw of the bound's terms for uint8 images (B, C, H, W): Terms, (B,) nats each, differentiable.

    Times are stratified over the batch. ``seed`` and an image's place in the batch key the draw.
    """
    images = torch.as_tensor(images, device=model.device)
    pixels.check_images(images, model.shape, model.levels)
    n = len(images)
    shift = Draws(seed, [0], 0, model.device).uniform("time")
    t = times.stratified(shift, torch.arange(n, device=model.device), n)
    labels = None if labels is None else torch.as_tensor(labels, device=model.device)
    return likelihood.draw_terms(model, images, t, Draws(seed, range(n), 0, model.device), labels=labels, steps=steps)
