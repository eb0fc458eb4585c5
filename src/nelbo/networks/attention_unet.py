r"""The U-Net of the package denoising-diffusion-pytorch: attention at every resolution, RMS normalisation, timesteps.

    (1)  embedding of n, c features:  sin, cos(n theta^(-j/(c/2 - 1))),  j = 0 .. c/2 - 1, sines first
    (2)  normalisation at each pixel: N(x) = g sqrt(C) x/|x|, over its C channels
    (3)  residual block:    h = dropout(swish((1 + a) N_1(conv_1(x)) + b)),  a, b = project(swish(time))
                            x' = shortcut(x) + swish(N_2(conv_2(h)))
    (4)  full attention:    x + out(softmax(q k^T/sqrt E) v),  q, k, v = qkv(N(x)), 4 learned keys and values beside
    (5)  linear attention:  x + N_out(out(K^T v softmax_E(q)/sqrt E)),  K = softmax of k over pixels and learned keys

(5) is evaluated with n = N(x) in place of v, from which v = V n is a linear map, as is what follows: with (V, O) the
weights of v and out,

    (6)  O (K^T n V^T)^T q = q^T (K^T n) V^T O^T

so that neither v nor the product of all pixels with it is formed. Halving the resolution is a 2x2 kernel with stride 2;
doubling it, nearest neighbours and a 3x3 kernel w, is the transposed convolution with stride 2 whose 4x4 kernel is

    (7)  A w A^T,   A = [0 0 1; 0 1 1; 1 1 0; 1 0 0]

at 4/9 of the operations. Inside, images are (B, H, W, C), kernels (out, H, W, in).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.networks.layers import Dropout

__all__ = ["AttentionUNet"]

MEMORY = 4  # learned keys and values of every attention
FEW = 512  # pixels of a batch up to which a kernel's gradient is a matrix product


def _wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _normalised(x: Tensor, gain: Tensor, shift: Tensor | None, rest: Tensor | None, swish: bool) -> Tensor:
    """gain x/|x| + shift, then swish on request, plus rest; in terms of torch's own functions."""
    y = _wide(x)
    y = y / torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp(min=1e-12) * gain
    y = y if shift is None else y + shift
    y = (F.silu(y) if swish else y).to(x.dtype)
    return y if rest is None else y + rest


class _Normalise(torch.autograd.Function):
    """``_normalised`` for x and rest (B, H, W, C), gain and shift (B or 1, 1, 1, C), in few passes over memory: what is
    kept for the backward pass is x, and what can be computed from it is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor | None, rest: Tensor | None, swish: bool) -> Tensor:
        y = _wide(x)
        inverse = torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=y.dtype).clamp_(min=1e-12).reciprocal_()
        ctx.save_for_backward(x, gain, shift, inverse)
        ctx.swish, ctx.rest = swish, rest is not None
        y = torch.mul(y, inverse, out=None if y is x else y)
        y = y.mul_(gain) if shift is None else torch.addcmul(shift, y, gain, out=y)
        if swish:
            torch.ops.aten.silu_(y)
        y = y.to(x.dtype)
        return y if rest is None else y.add_(rest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, inverse = ctx.saved_tensors
        of_rest = gradient if ctx.rest else None
        if torch.is_grad_enabled():  # a derivative of the derivative is wanted
            inputs = (x, gain, shift)
            y = _normalised(x, gain, shift, None, ctx.swish)
            wanted = [v for v in inputs if v is not None and v.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            return *(next(found) if v is not None and v.requires_grad else None for v in inputs), of_rest, None
        unit = _wide(x)
        unit = torch.mul(unit, inverse, out=None if unit is x else unit)
        gradient = _wide(gradient)
        if ctx.swish:
            y = unit * gain if shift is None else torch.addcmul(shift, unit, gain)
            gradient = torch.ops.aten.silu_backward.grad_input(gradient, y, grad_input=y)
        of_shift = None if shift is None else gradient.sum_to_size(shift.shape)
        product = gradient * unit
        of_gain = product.sum_to_size(gain.shape)
        along = product.mul_(gain).sum(-1, keepdim=True)
        of_x = torch.mul(gradient, gain, out=product).addcmul_(unit, along, value=-1).mul_(inverse)
        return of_x.to(x.dtype), of_gain, of_shift, of_rest, None


class _Across(torch.autograd.Function):
    """a^T b over pixels: (B, N, C), (B, N, E) -> (B, C, E). torch's own gradient of a comes transposed in memory, which
    every later step pays for."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.mT @ b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return b @ gradient.mT, a @ gradient


class Normalisation(nn.Module):
    """Equation (2), and what follows it in a block: FiLM's a and b, each (B, 1, 1, C), and swish."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(
        self,
        x: Tensor,
        film: tuple[Tensor, Tensor] | None = None,
        rest: Tensor | None = None,
        swish: bool = False,
    ) -> Tensor:
        gain = (self.scale * math.sqrt(len(self.scale))).reshape(1, 1, 1, -1)
        shift = None
        if film is not None:
            gain, shift = gain * (1 + film[0]), film[1]
        return _Normalise.apply(x, gain, shift, rest, swish)


def _windows(x: Tensor, size: int, stride: int) -> Tensor:
    """Windows of (B, H, W, C), with a rim of zeros one pixel wide, as the rows of a matrix: (B H' W', size^2 C)."""
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    batch, height, width, channels = x.shape
    rows, columns = (height - size) // stride + 1, (width - size) // stride + 1
    image, row, column, _ = x.stride()
    steps = (image, stride * row, stride * column, row, column, 1)
    windows = x.as_strided((batch, rows, columns, size, size, channels), steps)
    return windows.reshape(batch * rows * columns, size * size * channels)


def _convolved(x: Tensor, kernel: Tensor, bias: Tensor, transposed: bool) -> Tensor:
    if transposed:
        y = F.conv_transpose2d(x.permute(0, 3, 1, 2), kernel.permute(0, 3, 1, 2), bias, stride=2, padding=1)
    else:
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel.permute(0, 3, 1, 2), bias, padding=1)
    return y.permute(0, 2, 3, 1)


class _FewPixels(torch.autograd.Function):
    """A convolution, 3x3 or transposed 4x4, whose kernel's gradient is one matrix product. On a CPU that is up to twice
    as fast where there are few pixels and many channels: torch's own spends its time on the layout of the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, kernel, bias)
        ctx.transposed = transposed
        return _convolved(x, kernel, bias, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = _convolved(x, kernel, bias, ctx.transposed)
            wanted = [v for v in (x, kernel, bias) if v.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            return *(next(found) if v.requires_grad else None for v in (x, kernel, bias)), None
        gradient = gradient.contiguous()
        of_x = of_kernel = None
        if ctx.needs_input_grad[0]:
            stride, rest = (2, True) if ctx.transposed else (1, False)
            settings = [stride] * 2, [1, 1], [1, 1], rest, [0, 0], 1, [True, False, False]
            views = (v.permute(0, 3, 1, 2) for v in (gradient, x, kernel))
            of_x = torch.ops.aten.convolution_backward(*views, None, *settings)[0].permute(0, 2, 3, 1)
        if ctx.needs_input_grad[1]:
            rows, image, size = (x, gradient, (4, 2)) if ctx.transposed else (gradient, x, (3, 1))
            of_kernel = (rows.flatten(0, 2).T @ _windows(image, *size)).reshape(kernel.shape)
        return of_x, of_kernel, gradient.sum((0, 1, 2)), None


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor, transposed: bool = False) -> Tensor:
    """(B, H, W, C) with a 3x3 kernel (out, 3, 3, in), or transposed with stride 2 and a 4x4 one (in, 4, 4, out)."""
    if x.device.type != "cpu" or x.shape[:3].numel() > FEW or not torch.is_grad_enabled():
        return _convolved(x, kernel, bias, transposed)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return _FewPixels.apply(x.to(dtype), kernel.to(dtype), bias.to(dtype), transposed)


class Convolution(nn.Module):
    """(B, H, W, inputs) -> (B, H', W', outputs), zeros beyond the edges; kernel (outputs, size, size, inputs)."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs * size * size)  # torch's own start for convolutions
        self.weight = nn.Parameter(torch.empty(outputs, size, size, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.size == 3:
            return _convolve(x, self.weight, self.bias)
        kernel = self.weight.permute(0, 3, 1, 2)
        y = F.conv2d(x.permute(0, 3, 1, 2), kernel, self.bias, self.stride, (self.size - 1) // 2)
        return y.permute(0, 2, 3, 1)


class Doubling(nn.Module):
    """Twice the height and width, and a 3x3 convolution: equation (7). The kernel is (inputs, 3, 3, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(9 * inputs)
        self.weight = nn.Parameter(torch.empty(inputs, 3, 3, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        kernel: Tensor = self.weight
        for dim in (1, 2):
            a, b, c = kernel.unbind(dim)
            kernel = torch.stack((c, b + c, a + b, a), dim)
        return _convolve(x, kernel, self.bias, transposed=True)


class ResidualBlock(nn.Module):
    """Equation (3); ``time`` (B, features) is swish of the embedding."""

    def __init__(self, inputs: int, outputs: int, time: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(time, 2 * outputs)
        self.conv_1 = Convolution(inputs, outputs, 3)
        self.norm_1 = Normalisation(outputs)
        self.dropout = Dropout(dropout)
        self.conv_2 = Convolution(outputs, outputs, 3)
        self.norm_2 = Normalisation(outputs)
        self.shortcut = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a, b = self.project(time)[:, None, None].chunk(2, -1)
        h = self.dropout(self.norm_1(self.conv_1(x), (a, b), swish=True))
        return self.norm_2(self.conv_2(h), rest=self.shortcut(x), swish=True)


class Attention(nn.Module):
    """What both attentions hold. ``memory`` is (2, heads, 4, E): keys and values that every image has."""

    def __init__(self, channels: int, heads: int, features: int) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        self.norm = Normalisation(channels)
        self.memory = nn.Parameter(torch.randn(2, heads, MEMORY, features))
        self.qkv = nn.Linear(channels, 3 * heads * features, bias=False)
        self.out = nn.Linear(heads * features, channels)
        for layer in (self.qkv, self.out):
            nn.init.kaiming_uniform_(layer.weight, math.sqrt(5))


class FullAttention(Attention):
    """Equation (4)."""

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, height * width, 3, self.heads, self.features)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        k, v = (
            torch.cat((m.to(p.dtype).expand(batch, -1, -1, -1), p), 2) for m, p in zip(self.memory, (k, v), strict=True)
        )
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # layers.attend says why
            h = torch.softmax((q * self.features**-0.5) @ k.transpose(-1, -2), -1).to(v.dtype) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.transpose(1, 2).reshape(batch, height, width, -1))


class LinearAttention(Attention):
    """Equation (5) by equation (6)."""

    def __init__(self, channels: int, heads: int, features: int) -> None:
        super().__init__(channels, heads, features)
        self.norm_out = Normalisation(channels)

    def forward(self, x: Tensor) -> Tensor:
        (batch, _, _, channels), heads, features = x.shape, self.heads, self.features
        n = self.norm(x).flatten(1, 2)
        of_q, of_k, of_v = self.qkv.weight.split(heads * features)
        q = F.linear(n, of_q).unflatten(-1, (heads, features))
        q = torch.ops.aten._softmax(q, -1, False).flatten(2)  # in float32 inside; autocast would write that to memory
        k, memory = F.linear(n, of_k), self.memory
        top = torch.maximum(k.detach().amax(1), memory[0].detach().amax(1).flatten())[:, None]  # (B, 1, heads E)
        weights = _wide(k).sub_(top).exp_()
        # (B, heads, 4, E): weights of the learned keys
        extra = torch.exp(memory[0] - top.reshape(batch, heads, 1, features))
        total = weights.sum(1, dtype=extra.dtype).reshape(batch, heads, features) + extra.sum(2)
        context = _Across.apply(n, weights.to(n.dtype))  # (B, C, heads E)
        context = context.reshape(batch, channels, heads, features).permute(0, 2, 3, 1)
        values = context @ of_v.reshape(heads, features, channels).mT
        values = (values + extra.mT @ memory[1]) / (total[..., None] * math.sqrt(features))
        mixed = values @ self.out.weight.reshape(channels, heads, features).permute(1, 2, 0)
        y = torch.baddbmm(self.out.bias.to(n.dtype), q, mixed.flatten(1, 2).to(n.dtype))
        return self.norm_out(y.reshape(x.shape), rest=x)


class Level(nn.Module):
    """Two residual blocks, attention, and the way to the next level."""

    def __init__(
        self, inputs: Sequence[int], channels: int, time: int, dropout: float, attention: Attention, resize: nn.Module
    ) -> None:
        super().__init__()
        self.block_1, self.block_2 = (ResidualBlock(n, channels, time, dropout) for n in inputs)
        self.attention, self.resize = attention, resize


class Middle(nn.Module):
    """Block, full attention, block."""

    def __init__(self, channels: int, time: int, dropout: float, heads: int, features: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, time, dropout)
        self.attention = FullAttention(channels, heads, features)
        self.block_2 = ResidualBlock(channels, channels, time, dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x, time)), time)


class AttentionUNet(nn.Module):
    """(x (B, C, H, W), n (B,) timesteps, estimate of x or None) -> (B, outputs, H, W).

    ``channels`` times each of ``multipliers`` at halved resolutions, ``first`` of the first convolution; ``full``:
    which resolutions have full attention, by default the last; ``heads`` and ``features`` of a head, one or one for
    each resolution; ``theta``, the base of equation (1). H and W must be multiples of 2^(resolutions - 1).
    """

    def __init__(
        self,
        image_channels: int,
        outputs: int,
        channels: int,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        *,
        first: int | None = None,
        self_condition: bool = False,
        full: Sequence[bool] | None = None,
        heads: Sequence[int] | int = 4,
        features: Sequence[int] | int = 32,
        dropout: float = 0.0,
        theta: float = 10000.0,
    ) -> None:
        super().__init__()
        levels = len(multipliers)
        self.channels, self.self_condition, self.theta = channels, self_condition, theta
        width = 4 * channels
        self.dense_0, self.dense_1 = nn.Linear(channels, width), nn.Linear(width, width)
        sizes = [first or channels, *(channels * m for m in multipliers)]
        self.conv_in = Convolution(image_channels * (1 + self_condition), sizes[0], 7)
        full = [False] * (levels - 1) + [True] if full is None else full
        heads, features = ([v] * levels if isinstance(v, int) else list(v) for v in (heads, features))

        def attention(i: int, channels: int) -> Attention:
            return (FullAttention if full[i] else LinearAttention)(channels, heads[i], features[i])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(pairwise(sizes)):
            last = i == levels - 1
            halve = Convolution(a, b, 3) if last else Convolution(a, b, 2, stride=2)
            self.down.append(Level((a, a), a, width, dropout, attention(i, a), halve))
            double = Convolution(b, a, 3) if i == 0 else Doubling(b, a)
            self.up.insert(0, Level((a + b, a + b), b, width, dropout, attention(i, b), double))
        self.middle = Middle(sizes[-1], width, dropout, heads[-1], features[-1])
        self.block_out = ResidualBlock(2 * sizes[0], sizes[0], width, dropout)
        self.conv_out = Convolution(sizes[0], outputs, 1)

    def time(self, n: Tensor) -> Tensor:
        half = self.channels // 2
        place = torch.arange(half, dtype=n.dtype, device=n.device)
        phase = n[:, None] * torch.exp(place * (-math.log(self.theta) / (half - 1)))  # rounded as in the package
        h = torch.cat((phase.sin(), phase.cos()), -1)
        return F.silu(self.dense_1(F.gelu(self.dense_0(h))))

    def forward(self, x: Tensor, n: Tensor, estimate: Tensor | None = None) -> Tensor:
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if estimate is None else estimate, x), 1)
        with torch.autocast(x.device.type, enabled=False):
            time = self.time(n)
        h = first = self.conv_in(x.permute(0, 2, 3, 1).contiguous())
        skips = []
        level: Any
        for level in self.down:
            h = level.block_1(h, time)
            skips.append(h)
            h = level.attention(level.block_2(h, time))
            skips.append(h)
            h = level.resize(h)
        h = self.middle(h, time)
        for level in self.up:
            h = level.block_1(torch.cat((h, skips.pop()), -1), time)
            h = level.attention(level.block_2(torch.cat((h, skips.pop()), -1), time))
            h = level.resize(h)
        h = self.block_out(torch.cat((h, first), -1), time)
        return self.conv_out(h).permute(0, 3, 1, 2).to(x.dtype)
