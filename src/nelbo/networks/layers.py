r"""Layers of the public VDM and MuLAN networks, for images (B, C, H, W).

    (1)  time embedding of n features:  sin, cos(1000 t exp(-j ln(10000)/(n/2 - 1))),  j = 0 .. n/2 - 1, sines first
    (2)  Fourier features:  sin, cos(2^f 2 pi z) for each exponent f                       (VDM appendix C)
    (3)  residual block:    h = conv_1(swish(norm_1(x))) + project(condition)
                            x' + conv_2(dropout(swish(norm_2(h))))
    (4)  dropout of an example with a key of two words k, k' of 32 bits: entries 2 j and 2 j + 1 are dropped where the
         low and the high 16 bits of h_3 are below 2^16 p,
         h_1 = j G xor k,  h_2 = (h_1 xor h_1 / 2^16) (k' or 1),  h_3 = (h_2 xor h_2 / 2^15) M      modulo 2^32

Kernels start from a truncated normal of variance 1/fan-in (LeCun), biases at 0, and the last layer of each residual
branch at 0.
"""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.draws import Draws

__all__ = [
    "AttentionBlock",
    "Dropout",
    "ResidualBlock",
    "fourier_features",
    "initialise",
    "key_dropout",
    "norm",
    "time_embedding",
    "zero",
]

Layer = TypeVar("Layer", bound=nn.Module)
GOLDEN, MIX = -0x61C88647, 0x2C1B3C6D  # of equation (4): odd numbers of 32 bits


def time_embedding(t: Tensor, features: int) -> Tensor:
    """Equation (1): t of any shape (*) in [0, 1] -> (*, features)."""
    half = features // 2
    frequencies = torch.exp(torch.arange(half, dtype=t.dtype, device=t.device) * (-math.log(10000) / (half - 1)))
    phase = 1000 * t[..., None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], -1)


def fourier_features(z: Tensor, exponents: tuple[float, ...]) -> Tensor:
    """Equation (2): (B, C, H, W) -> (B, 2 C len(exponents), H, W), all sines first, a channel's exponents together."""
    scale = torch.tensor([2.0**f * 2 * math.pi for f in exponents], dtype=z.dtype, device=z.device)
    phase = (z[:, :, None] * scale[:, None, None]).flatten(1, 2)
    return torch.cat([phase.sin(), phase.cos()], 1)


def norm(channels: int, groups: int, eps: float = 1e-6) -> nn.GroupNorm:
    """Group normalisation, of groups of adjacent channels; flax's eps is 1e-6."""
    return nn.GroupNorm(groups, channels, eps=eps)


def zero(layer: Layer) -> Layer:
    """The layer, marked so that ``initialise`` sets its kernel to 0."""
    layer.starts_at_zero = True  # type: ignore[assignment]
    return layer


def initialise(module: nn.Module) -> None:
    """flax's defaults for every convolution and dense layer below ``module``: LeCun normal kernels, zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fan_in = layer.weight[0].numel()
            if getattr(layer, "starts_at_zero", False):
                nn.init.zeros_(layer.weight)
            else:
                # The standard deviation of a normal cut at two of its own is 0.8796 of it.
                std = 1 / math.sqrt(fan_in) / 0.87962566103423978
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _mixed(h: Tensor, second: Tensor) -> Tensor:
    """h_3 of equation (4), in the place of h_1."""
    shifted = h >> 16
    h.bitwise_xor_(shifted).mul_(second | 1)
    return h.bitwise_xor_(torch.bitwise_right_shift(h, 15, out=shifted)).mul_(MIX)


def _mask(keys: Tensor, p: float, like: Tensor, scale: float) -> Tensor:
    """Equation (4): ``scale`` where an entry of ``like`` (B, ...) stays, 0 where it is dropped; keys (B,) int64."""
    entries = like[:1].numel()
    first, second = (keys << 32 >> 32).int()[:, None], (keys >> 32).int()[:, None]
    if torch.compiler.is_compiling():  # an entry by itself, whatever lies beside it in memory: h is never written
        i = torch.arange(entries, dtype=torch.int32, device=like.device)
        h = _mixed((i >> 1) * GOLDEN ^ first, second)
        bits = torch.where((i & 1).bool(), h >> 16, h << 16 >> 16).view(like.shape)
        return (bits >= _dropped(p) - 2**15).to(like.dtype) * scale
    h = _mixed(torch.arange(-(-entries // 2), dtype=torch.int32, device=like.device).mul_(GOLDEN) ^ first, second)
    bits = h.view(torch.int16)[:, :entries].view(like.shape)  # uniform in -2^15 .. 2^15 - 1
    if like.element_size() == 2:  # the scale's own 16 bits or none, without a conversion of every entry
        word = torch.tensor(scale, dtype=like.dtype).view(torch.int16).item()
        kept = torch.ge(bits, _dropped(p) - 2**15, out=torch.empty_like(bits, memory_format=torch.contiguous_format))
        return kept.mul_(word).view(like.dtype)
    kept = torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.ge(bits, _dropped(p) - 2**15, out=kept).mul_(scale)


def _dropped(p: float) -> int:
    """Of 2^16 entries, how many are dropped."""
    return min(round(p * 2**16), 2**16 - 1)


class Dropout(nn.Dropout):
    """Dropout whose mask is a function of each example's key: the same on every device, in any batch, and when a
    forward pass is run again. ``keys`` (B,) int64 are set by ``key_dropout``; without them torch's generator draws one.

    p is rounded to a multiple of 2^-16, and kept entries are scaled by the rounded p: the mean is exact.
    """

    keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * self.mask(x, 1 / (1 - _dropped(self.p) / 2**16))

    def mask(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """``scale`` where an entry of x (B, ...) stays, 0 where it is dropped."""
        if self.keys is None:
            key = torch.empty(1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
            return _mask(key, self.p, x[None], scale)[0]
        if len(self.keys) != len(x):
            raise ValueError(f"dropout has the keys of {len(self.keys)} examples, got {len(x)}")
        return _mask(self.keys, self.p, x, scale)


def key_dropout(model: nn.Module, draws: Draws | None) -> None:
    """Give every ``Dropout`` below ``model`` a key of its own for each example of ``draws``, for the forward passes
    that follow; None takes the keys away."""
    layers = [layer for layer in model.modules() if isinstance(layer, Dropout) and layer.p]
    keys = None if draws is None or not layers else draws.keys("dropout", len(layers)).T.contiguous()
    for i, layer in enumerate(layers):
        layer.keys = None if keys is None else keys[i]


class _AddedProduct(torch.autograd.Function):
    """h + K x at every pixel: (B, O, N), (O, I), (B, I, H, W) -> (B, O, N). torch's own gradient of x, a view of a
    product, cannot take up the gradient by x's other way in its place, and that of K turns the larger of two tensors
    around."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(kernel, x)
        return torch.baddbmm(h, kernel.expand(len(x), -1, -1), x.flatten(2))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        kernel, x = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_kernel = of_x = None
        if ctx.needs_input_grad[1]:
            of_kernel = (x.flatten(2) @ gradient.mT).sum(0).T
        if ctx.needs_input_grad[2]:
            turned = kernel.T.contiguous().expand(len(x), -1, -1)
            if torch.is_grad_enabled():  # a derivative of the derivative is wanted
                of_x = (turned @ gradient).view_as(x)
            else:
                of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
                torch.bmm(turned, gradient, out=of_x.flatten(2))
        return gradient, of_kernel, of_x


def add_product(h: Tensor, kernel: Tensor, x: Tensor) -> Tensor:
    """h + K x at every pixel, in h's precision: (B, O, H, W), (O, I), (B, I, H, W) -> (B, O, H, W)."""
    if h.device.type != "cpu":
        return h + F.linear(x.permute(0, 2, 3, 1), kernel).permute(0, 3, 1, 2)
    return _AddedProduct.apply(h.flatten(2), kernel.to(h.dtype), x.to(h.dtype)).view_as(h)


class Shortcut(nn.Conv2d):
    """A 1x1 convolution and, ``beside`` another, its sum with that. On a CPU this is one matrix product an image, which
    is a tenth faster, forward and backward, and adds to what is there; its bias goes with the other's, whose gradient
    costs nothing."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def beside(self, x: Tensor, other: nn.Conv2d, h: Tensor) -> Tensor:
        """This of x (B, inputs, H, W) plus ``other`` of h."""
        if x.device.type != "cpu":
            return self(x) + other(h)
        assert self.bias is not None and other.bias is not None
        h = F.conv2d(h, other.weight, self.bias + other.bias, other.stride, other.padding)
        return add_product(h, self.weight.flatten(1), x)


def float32_vectors(condition: Tensor) -> Any:
    """A context without autocast where ``condition`` is one vector an image, (B, E): its products are small, and take
    longer in 16 bits."""
    device = condition.device.type
    return torch.autocast(device, enabled=condition.ndim > 2 and torch.is_autocast_enabled(device))


class ResidualBlock(nn.Module):
    """Equation (3). The condition is (B, E), or (B, E, H, W) where every pixel has its own."""

    def __init__(
        self, inputs: int, outputs: int, condition: int, groups: int, dropout: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm_1 = norm(inputs, groups, eps)
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.project = zero(nn.Linear(condition, outputs, bias=False))
        self.norm_2 = norm(outputs, groups, eps)
        self.dropout = Dropout(dropout)
        self.conv_2 = zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = Shortcut(inputs, outputs) if inputs != outputs else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        if condition.ndim == 4:
            h = add_product(h, self.project.weight, condition)
        else:
            with float32_vectors(condition):
                shift = self.project(condition)[:, :, None, None]
            h += shift.to(h.dtype)  # in place, here and below: the backward pass needs no output of a convolution
        h = self.dropout(F.silu(self.norm_2(h)))
        if self.shortcut is not None:
            return self.shortcut.beside(x, self.conv_2, h)
        h = self.conv_2(h)
        h += x
        return h


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over all positions of each head: (B, heads, positions, E) each."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # There torch's fused kernel takes about three times as long as the two products by themselves.
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class AttentionBlock(nn.Module):
    """Attention over all positions on a residual branch: ``features`` a head, by default one head of all channels."""

    def __init__(self, channels: int, groups: int, features: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.features = features or channels
        self.norm = norm(channels, groups, eps)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2).contiguous()  # (B, positions, channels)
        q, k, v = (p.unflatten(-1, (-1, self.features)).transpose(1, 2) for p in (self.q(h), self.k(h), self.v(h)))
        h = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).reshape(x.shape)
