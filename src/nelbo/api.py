"""What a notebook needs: models by name, by file, or from a network at hand; and one draw of the bound."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nelbo import likelihood, pixels, times
from nelbo.compose import build_model, table_model
from nelbo.config import Config
from nelbo.draws import Draws
from nelbo.errors import UserError
from nelbo.model import DiffusionModel, Reverse
from nelbo.objectives import Terms
from nelbo.presets import preset
from nelbo.resolve import find_shared, resolve
from nelbo.schedules import gammas_of_betas

__all__ = ["build", "ddpm", "elbo", "from_pretrained", "load"]


def load(
    source: Path | str,
    checkpoint: str | int = "best",
    weights: str | None = None,
    device: Any = "cpu",
    levels: int | None = None,
    revision: str | None = None,
) -> DiffusionModel:
    """The trained model of a run, of a shared folder or of a diffusers pipeline's, or of a hub id of either's, in
    evaluation mode.

    ``weights``: ema or raw, by default a run's ema or what is shared; ``levels``: the grey levels that a pipeline's
    model is to be asked about, 256 by default (others have their own); ``revision`` of a hub id: branch, tag or commit.
    """
    found = resolve(source, checkpoint, weights, revision=revision)
    return found.load(found.levels or levels or 256, device)


def from_pretrained(source: Path | str, *, device: Any = "cpu", revision: str | None = None) -> DiffusionModel:
    """The model that ``save_pretrained`` wrote to a folder, or that a hub id has, in evaluation mode. UserError where
    it is truncated, changed, of a newer format, or something else; ``revision``: branch, tag or commit on the hub."""
    shared = find_shared(source, revision)
    if shared is None:
        raise UserError(
            f"{source} is no model that nelbo shared: it has no config.json of library nelbo; nelbo.load takes runs "
            "and pipelines too"
        )
    return shared.model(device)


def build(name: str | Config, shape: tuple[int, int, int] | None = None, levels: int | None = None) -> DiffusionModel:
    """An untrained model of a preset (or configuration), for its data set's images or the shape and levels given."""
    config = preset(name) if isinstance(name, str) else name
    classes: int | None = config.latent.size
    if shape is None or levels is None:
        from nelbo.data import load as load_data

        data = load_data(config.data.source)
        shape, levels, classes = shape or data.shape, levels or data.levels, data.classes or None
    return build_model(config, shape, levels, classes)


class _Plain(nn.Module):
    """(x_t, n) -> output as (z, n, estimate) -> output, in the precision of its parameters, or float32."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self.dtype = next((p.dtype for p in self.parameters()), torch.float32)

    def forward(self, z: torch.Tensor, n: torch.Tensor, estimate: torch.Tensor | None = None) -> torch.Tensor:
        return self.network(z.to(self.dtype), n.to(self.dtype))


def ddpm(
    network: Callable[..., Any],
    betas: Sequence[float] | Any,
    shape: tuple[int, int, int],
    levels: int = 256,
    *,
    parameterization: str = "noise",
    variance: str = "fixed-small",
    clip: bool = True,
) -> DiffusionModel:
    """A DDPM of your own: ``network``, (x_t (B, C, H, W), timesteps (B,) float from 0 to T - 1) -> output, trained on
    these ``betas`` (T,) and images from -1 to 1.

    ``parameterization`` of the output: noise, data or velocity; ``variance`` of the reverse steps: fixed-small,
    fixed-large, or learned (2 C output channels); ``clip`` x_hat. ValueError where betas are not strictly in (0, 1).
    """
    gammas = gammas_of_betas(torch.as_tensor(betas, dtype=torch.float64).numpy())
    return table_model(_Plain(network), gammas, shape, levels, parameterization, Reverse(variance, clip, "gaussian"))


def elbo(model: DiffusionModel, images: Any, labels: Any = None, *, steps: int = 0, seed: int = 0) -> Terms:
    """One draw of the bound's terms for uint8 images (B, C, H, W): Terms, (B,) nats each, differentiable.

    Times are stratified over the batch. ``seed`` and an image's place in the batch key the draw.
    """
    images = pixels.as_tensor(images).to(model.device)
    pixels.check_images(images, model.shape, model.levels)
    n = len(images)
    shift = Draws(seed, [0], 0, model.device).uniform("time")
    t = times.stratified(shift, torch.arange(n, device=model.device), n)
    labels = None if labels is None else torch.as_tensor(labels, device=model.device)
    return likelihood.draw_terms(model, images, t, Draws(seed, range(n), 0, model.device), labels=labels, steps=steps)
