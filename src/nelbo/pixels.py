r"""Integers and reals: grey levels v = 0 .. L - 1, their values x, and the decoder p(v|z_0).

(1)  x(v) = 2 (v + 1/2)/L - 1                              levels at the centres of L bins of [-1, 1]
(2)  log p(v|z_0) = log softmax_v( -1/2 (z_0/alpha_0 - x(v))^2 exp(-gamma_0) )      per entry (VDM section 3.3)
(3)  bits/dim = nats / (C H W log 2)
"""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["bits_per_dim", "check_images", "decode", "encode", "level_log_probs", "log_likelihood"]


def check_images(images: Tensor, shape: tuple[int, ...], levels: int) -> None:
    """ValueError unless images are whole numbers (n >= 1, *shape) in 0 .. levels - 1."""
    if images.ndim != 4 or tuple(images.shape[1:]) != tuple(shape) or not len(images):
        raise ValueError(f"images must be (n, {', '.join(map(str, shape))}) with n >= 1, got {tuple(images.shape)}")
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise ValueError(f"images must be whole numbers, as uint8, got {images.dtype}")
    if int(images.min()) < 0 or int(images.max()) >= levels:
        least, most = int(images.min()), int(images.max())
        raise ValueError(f"images must lie in 0 .. {levels - 1} for {levels} levels, got {least} .. {most}")


def encode(images: Tensor, levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equation (1): whole numbers (B, C, H, W) below ``levels`` -> reals in (-1, 1)."""
    return 2 * (images.to(dtype) + 0.5) / levels - 1


def level_log_probs(z_0: Tensor, alpha_0: Tensor, gamma_0: Tensor, levels: int) -> Tensor:
    """Equation (2) for every level: (B, C, H, W) -> (B, C, H, W, L), log-probabilities."""
    values = encode(torch.arange(levels, device=z_0.device), levels, z_0.dtype)
    scaled = ((z_0 / alpha_0)[..., None] - values) * torch.exp(-gamma_0 / 2)[..., None]
    return torch.log_softmax(-0.5 * scaled**2, -1)


def log_likelihood(images: Tensor, z_0: Tensor, alpha_0: Tensor, gamma_0: Tensor, levels: int) -> Tensor:
    """log p(images|z_0) in nats, (B,)."""
    log_probs = level_log_probs(z_0, alpha_0, gamma_0, levels)
    return log_probs.gather(-1, images.long()[..., None]).flatten(1).sum(1)


def decode(z_0: Tensor, alpha_0: Tensor, gamma_0: Tensor, levels: int, uniform: Tensor | None = None) -> Tensor:
    """The most probable levels, uint8 shaped as z_0; with ``uniform`` in [0, 1) of that shape, a draw of p(v|z_0)."""
    log_probs = level_log_probs(z_0, alpha_0, gamma_0, levels)
    if uniform is None:
        return log_probs.argmax(-1).to(torch.uint8)
    below = log_probs.exp().cumsum(-1) <= uniform[..., None]
    return below.sum(-1).clamp(max=levels - 1).to(torch.uint8)


def bits_per_dim(nats: Any, dimensions: int) -> Any:
    """Equation (3): a number, a tensor or an array of nats per image."""
    return nats / (dimensions * math.log(2))
