r"""Integers and reals: grey levels v = 0 .. L - 1, their values x, and the decoder p(v|z_0).

(1)  x(v) = 2 (v + 1/2)/L - 1                              levels at the centres of L bins of [-1, 1]
(2)  log p(v|z_0) = log softmax_v( -1/2 (z_0/alpha_0 - x(v))^2 exp(-gamma_0) )      per entry (VDM section 3.3)
(3)  bits/dim = nats / (C H W log 2)

A model may see data of another scale, s x: DDPM's 2 v/(L - 1) - 1 is s = L/(L - 1), and half a bin is s/L everywhere.
A Gaussian of the network's own, with mean m and standard deviation d, gives a grey level its part over the bin of v,
the outer bins open (DDPM eq. 13):

    (9)  p(v) = Phi((s x + s/L - m)/d) - Phi((s x - s/L - m)/d),      Phi(+inf) at v = L - 1, Phi(-inf) at v = 0

A density p(z) of reals becomes a likelihood of whole numbers by a draw z_0 = alpha x + ... of q(z_0|v), whose
log-density is subtracted:

    (4)  -log p(v) <= E_q[ log q(z_0|v) - log p(z_0) - log p(v|z_0) ]

Truncated normal    z_0 = alpha x + sigma u,  u ~ N(0, 1) within +-tau,  tau = alpha/(L sigma): inside the bin of v, so
                    that p(v|z_0) = 1 (i-DODE section 4.2). With Z = erf(tau/sqrt 2), per entry
    (5)             log q = -u^2/2 - log(2 pi)/2 - log sigma - log Z
    (6)             E log q = -(1 + log(2 pi))/2 - log sigma - log Z + tau exp(-tau^2/2)/(sqrt(2 pi) Z)
Uniform             z_0 = alpha (2 (v + u)/L - 1),  u ~ U(0, 1): the bin itself,  log q = log(L/(2 alpha)). It belongs
                    to a time of more noise than t = 0, where the bin is about as wide as what the flow was trained on:
    (7)             gamma = -11.8 + 2 log(256/L)                                       (an empirical choice, i-DODE)
Variational         z_0 = alpha x + sigma eps,  eps ~ N(0, 1), with the decoder (2)
    (8)             log q = -eps^2/2 - log(2 pi)/2 - log sigma,      E log q = -(1 + log(2 pi))/2 - log sigma

Everything follows from the alpha and sigma of the time at which the density is taken, one per image or per pixel, and
from L.
"""

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DEQUANTIZATIONS",
    "Dequantization",
    "Dequantized",
    "as_tensor",
    "bin_log_likelihood",
    "bits_per_dim",
    "check_images",
    "decode",
    "encode",
    "level_log_probs",
    "log_likelihood",
]


def as_tensor(images: Any) -> Tensor:
    """Images as a tensor that shares their memory; those of a mapped file too, which are only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(images)


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
    """log p(images|z_0) in nats, (B,).

    On a CPU the normaliser's sum runs over the levels near z_0/alpha_0 only: the k-th from the nearest one weighs at
    most exp(-k (k - 1) w^2/2) of it, w = 2 exp(-gamma_0/2)/L. Left out is what weighs below exp(-40), less than
    float64's rounding.
    """
    inverse = torch.exp(-gamma_0 / 2)
    z = z_0 / alpha_0

    def logit(x: Tensor) -> Tensor:
        return -0.5 * ((z[..., None] - x) * inverse[..., None]) ** 2

    if z_0.device.type == "cpu":
        width = 2 / levels * float(inverse.detach().min())
        reach = math.ceil(math.sqrt(0.25 + 80 / width**2) - 0.5) if width > 16 / levels else levels
    else:
        reach = levels  # without a number from the device, which would have to be waited for
    if 2 * reach + 1 < levels:
        nearest = ((z.detach() + 1) * (levels / 2) - 0.5).round().clamp(0, levels - 1)
        near = nearest[..., None] + torch.arange(-reach, reach + 1, dtype=z.dtype)
        logits = logit(encode(near, levels, z.dtype)).masked_fill((near < 0) | (near > levels - 1), -math.inf)
    else:
        logits = logit(encode(torch.arange(levels, device=z.device), levels, z.dtype))
    own = logit(encode(images, levels, z.dtype)[..., None])[..., 0]
    most = logits.detach().amax(-1)  # taken off both first: own is nearly always the largest, and so cancels exactly
    return (own - most - torch.logsumexp(logits - most[..., None], -1)).flatten(1).sum(1)


def bin_log_likelihood(
    images: Tensor, mean: Tensor, log_variance: Tensor, levels: int, data_scale: float = 1.0
) -> Tensor:
    """Equation (9): log p(images) in nats, (B,) float64, by a Gaussian per entry; mean and log_variance broadcast."""
    x = data_scale * encode(images, levels, torch.float64)
    inverse, half = torch.exp(-0.5 * log_variance.double()), data_scale / levels
    above, below = ((x + side - mean.double()) * inverse for side in (half, -half))
    # log(Phi(a) - Phi(b)), taken in the tail that both ends lie in: Phi(a) - Phi(b) = Phi(-b) - Phi(-a).
    flip = above + below > 0
    upper, lower = torch.where(flip, -below, above), torch.where(flip, -above, below)
    log_upper = torch.special.log_ndtr(upper)
    inside = log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))
    lowest, highest = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    found = torch.where(images == 0, lowest, torch.where(images == levels - 1, highest, inside))
    return found.flatten(1).sum(1)


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


@dataclass(frozen=True)
class Dequantized:
    """A draw of q(z_0|v): z_0 (B, C, H, W), log_q (B,) nats, its expectation entropy_form (B,), and decoder (B,), the
    log p(v|z_0) that goes with it (0 where z_0 lies in the bin of v)."""

    z: Tensor
    log_q: Tensor
    entropy_form: Tensor
    decoder: Tensor


class Dequantization(ABC):
    """q(z_0|v). ``noise`` names the kind of random numbers: "uniform" in [0, 1) or "normal". Stateless."""

    noise = "uniform"

    def start(self, levels: int) -> float | None:
        """The gamma (its mean over pixels) at which the density is taken; None for that of t = 0."""
        return None

    @abstractmethod
    def draw(self, images: Tensor, alpha: Tensor, sigma: Tensor, levels: int, noise: Tensor) -> Dequantized:
        """z_0 for whole numbers (B, C, H, W), from alpha and sigma broadcastable to them and noise of their shape.

        The precision is that of ``noise``; densities are summed in float64.
        """


def _sum(values: Tensor, like: Tensor) -> Tensor:
    return values.double().expand(like.shape).flatten(1).sum(1)


class TruncatedNormal(Dequantization):
    """Equations (5) and (6)."""

    def draw(self, images: Tensor, alpha: Tensor, sigma: Tensor, levels: int, noise: Tensor) -> Dequantized:
        a, s = alpha.double(), sigma.double()
        tau = a / (levels * s)
        mass = torch.erf(tau / math.sqrt(2))
        u = math.sqrt(2) * torch.erfinv((2 * noise.double() - 1) * mass)
        u = torch.minimum(torch.maximum(u, -tau), tau)
        constant = -math.log(2 * math.pi) / 2 - s.log() - mass.log()
        mean = constant - 0.5 + tau * torch.exp(-(tau**2) / 2) / (math.sqrt(2 * math.pi) * mass)
        z = a * encode(images, levels, torch.float64) + s * u
        log_q = _sum(constant - u**2 / 2, u)
        return Dequantized(z.to(noise.dtype), log_q, _sum(mean, u), torch.zeros_like(log_q))


class Uniform(Dequantization):
    """The bin, all of it; equation (7)."""

    def start(self, levels: int) -> float | None:
        return -11.8 + 2 * math.log(256 / levels)

    def draw(self, images: Tensor, alpha: Tensor, sigma: Tensor, levels: int, noise: Tensor) -> Dequantized:
        u, a = noise.double(), alpha.double()
        z = a * (2 * (images + u) / levels - 1)
        log_q = _sum(torch.log(levels / (2 * a)), u)
        return Dequantized(z.to(noise.dtype), log_q, log_q, torch.zeros_like(log_q))


class Variational(Dequantization):
    """A Gaussian and the model's decoder; equation (8)."""

    noise = "normal"

    def draw(self, images: Tensor, alpha: Tensor, sigma: Tensor, levels: int, noise: Tensor) -> Dequantized:
        eps, s = noise.double(), sigma.double()
        constant = -math.log(2 * math.pi) / 2 - s.log()
        over_alpha = encode(images, levels, torch.float64) + s / alpha.double() * eps
        gamma = 2 * torch.log(s / alpha.double()).expand_as(over_alpha)
        decoder = log_likelihood(images, over_alpha, torch.ones_like(gamma), gamma, levels)
        z = (alpha.double() * over_alpha).to(noise.dtype)
        return Dequantized(z, _sum(constant - eps**2 / 2, eps), _sum(constant - 0.5, eps), decoder)


DEQUANTIZATIONS: dict[str, type[Dequantization]] = {
    "truncated-normal": TruncatedNormal,
    "uniform": Uniform,
    "variational": Variational,
}
