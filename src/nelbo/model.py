"""DiffusionModel: network, schedule, path, parameterization and latent put together. No loss and no sampler."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nelbo import pixels
from nelbo.draws import Draws
from nelbo.latents import Latent, LatentDraw
from nelbo.networks.layers import Dropout
from nelbo.parameterizations import Parameterization
from nelbo.paths import Path
from nelbo.schedules import Schedule

__all__ = ["DiffusionModel", "Reverse"]


@dataclass(frozen=True)
class Reverse:
    """What the generative model does between and at its noise levels (objectives.py, equations 10 to 12).

    ``variance`` of p(z_s|z_t): fixed-small, that of q(z_s|z_t,x); fixed-large, that of q(z_t|z_s) on the VP path;
    learned, between the two. ``clip``: x_hat is kept within [-1, 1]. ``decoder``: levels, a softmax over grey levels
    around z_0; gaussian, the network's own Gaussian integrated over the bin.
    """

    variance: str = "fixed-small"
    clip: bool = False
    decoder: str = "levels"


class DiffusionModel(nn.Module):
    """A forward process and a denoiser for images of one shape.

    Parameters: ``network``, a callable (z, gamma, conditioning) -> output; ``schedule``; ``path``;
    ``parameterization``; ``shape`` (C, H, W) and ``levels`` of the images; ``latent`` with its ``encoder``
    (x -> parameters) or None; ``network_sees_latent`` and ``schedule_sees_latent``; ``flag``: whether the network has a
    column for augmented images; ``prior_scale``, the standard deviation s of p(z_1) = N(0, s^2 I);
    ``schedule_reads_image``: MuLAN's ablation c = x_0, where the schedule is given x itself (objectives.py, eq. 7);
    ``data_scale``: x is so many times pixels.encode (DDPM's x reaches -1 and 1: L/(L - 1)); ``reverse``, what p(z_s|
    z_t) and the decoder are; ``self_condition``: the network gets an estimate of x, its own.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        schedule: Schedule,
        path: Path,
        parameterization: Parameterization,
        shape: tuple[int, int, int],
        levels: int,
        latent: Latent | None = None,
        encoder: nn.Module | None = None,
        network_sees_latent: bool = True,
        schedule_sees_latent: bool = True,
        flag: bool = False,
        prior_scale: float = 1.0,
        schedule_reads_image: bool = False,
        data_scale: float = 1.0,
        reverse: Reverse | None = None,
        self_condition: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.path, self.parameterization = network, schedule, path, parameterization
        self.shape, self.levels = tuple(shape), levels
        self.latent, self.encoder = latent, encoder
        self.network_sees_latent, self.schedule_sees_latent = network_sees_latent, schedule_sees_latent
        self.flag, self.prior_scale, self.schedule_reads_image = flag, prior_scale, schedule_reads_image
        self.data_scale, self.reverse, self.self_condition = data_scale, reverse or Reverse(), self_condition
        self.learned_variance = (
            self.reverse.variance == "learned"
        )  # of the network: a reverse of another kind may follow
        self.coin = Dropout(0.5)  # whether an example is given its estimate in training: a choice of its own
        self.autocast: torch.dtype | None = None

    @property
    def dimensions(self) -> int:
        """C H W."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def device(self) -> Any:
        """Where the parameters are."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def encode(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """The parameters of q(c|x) for encoded images x (B, C, H, W); the labels themselves for a label latent."""
        if self.encoder is None:
            if labels is None:
                raise ValueError("a label latent needs the labels of the images")
            return (labels,)
        with self._precision(x):
            parameters = self.encoder(x)
        return tuple(p.to(x.dtype) for p in parameters)

    def infer(self, x: Tensor, noise: Tensor | None, labels: Tensor | None = None, step: int = 0) -> LatentDraw | None:
        """A draw of q(c|x) for encoded images x (B, C, H, W) from recorded noise; None without a latent."""
        if self.latent is None:
            return None
        return self.latent.posterior(self.encode(x, labels), noise if noise is not None else x.new_zeros(0), step)

    def curve(self, c: Tensor | None, interior_gradient: Callable[[Tensor], Tensor] = lambda u: u) -> Any:
        """The schedule given c: t (B,) -> (gamma, gamma')."""
        return self.schedule.given(c if self.schedule_sees_latent else None, interior_gradient)

    def reals(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x of whole-number images (B, C, H, W)."""
        return self.data_scale * pixels.encode(images, self.levels, dtype)

    def forward(self, z: Tensor, gamma: Tensor, c: Tensor | None = None, flag: Tensor | None = None) -> Tensor:
        """The network's raw output for z (B, C, H, W) at gamma; ``flag`` (B,) is 1 where an image was augmented."""
        return self.outputs(z, gamma, c, flag)[0]

    def outputs(
        self, z: Tensor, gamma: Tensor, c: Tensor | None = None, flag: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The network's output, and where the variance is learned the v of it (objectives.py, eq. 10), shaped as z."""
        columns = [c] if c is not None and self.network_sees_latent else []
        if self.flag:
            columns.append((z.new_zeros(len(z)) if flag is None else flag.to(z.dtype))[:, None])
        conditioning = torch.cat(columns, 1) if columns else None
        if self.self_condition:
            out = self._conditioned_on_itself(z, gamma, conditioning)
        else:
            with self._precision(z):
                out = self.network(z, gamma, conditioning)
        if self.learned_variance:
            return out[:, : self.shape[0]], out[:, self.shape[0] :]
        return out, None

    def _conditioned_on_itself(self, z: Tensor, gamma: Tensor, conditioning: Tensor | None) -> Tensor:
        """The network with its own estimate of x from a first pass (Chen et al. 2023): in training for half of the
        examples, without gradient, and nothing for the others; otherwise always, so that out is a function of z."""
        with torch.no_grad() if self.training else contextlib.nullcontext(), self._precision(z):
            first = self.network(z, gamma, conditioning, torch.zeros_like(z))[:, : self.shape[0]]
        estimate, _ = self.parameterization.solve(self.path, gamma, z, first)
        if self.training:
            estimate = estimate * self.coin.mask(estimate[:, :1, :1, :1])
        with self._precision(z):
            return self.network(z, gamma, conditioning, estimate.to(z.dtype))

    def _precision(self, x: Tensor) -> Any:
        return torch.autocast(x.device.type, self.autocast) if self.autocast else contextlib.nullcontext()

    def level_gamma(self, t: Tensor) -> Tensor:
        """gamma of the straight line between the schedule's fixed ends: what the network is told where the schedule
        itself reads the image. t (B,) -> (B, 1, 1, 1)."""
        gamma_0, gamma_1 = self.schedule.gamma_0, self.schedule.gamma_1
        return gamma_0 + (gamma_1 - gamma_0) * t.reshape(-1, 1, 1, 1)

    def predict(
        self, z: Tensor, gamma: Tensor, c: Tensor | None = None, flag: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_hat, eps_hat), each shaped as z."""
        return self.parameterization.solve(self.path, gamma, z, self(z, gamma, c, flag))

    def draw_prior(self, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """z_1 ~ N(0, s^2 I) and c ~ p(c)."""
        z_1 = self.prior_scale * draws.normal("prior", self.shape)
        return z_1, None if self.latent is None else self.latent.prior(draws)
