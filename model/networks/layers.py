"""Layers that several networks share."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of LeakyReLU
ACTIVATIONS = {"": lambda x: x, "gelu": F.gelu, "leaky_relu": lambda x: F.leaky_relu(x, SLOPE)}


def reflect_index(n: int, before: int, after: int) -> Tensor:
    """Indices that extend an axis of length n by reflection about its ends, however long the extension."""
    i = torch.arange(-before, n + after)
    period = max(2 * (n - 1), 1)
    i = i.remainder(period)
    return torch.minimum(i, period - i) if n > 1 else torch.zeros_like(i)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extends (B, C, H, W) at the bottom and right by reflection until H and W are multiples of `multiple`.

    Unlike `F.pad`, this also works where the extension is longer than the image.
    """
    H, W = x.shape[-2:]
    extra_h, extra_w = -H % multiple, -W % multiple
    if extra_h < H and extra_w < W:
        return F.pad(x, (0, extra_w, 0, extra_h), mode="reflect") if extra_h or extra_w else x
    x = x.index_select(-2, reflect_index(H, 0, extra_h).to(x.device))
    return x.index_select(-1, reflect_index(W, 0, extra_w).to(x.device))


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding, cosines before sines: (B,) -> (B, dim), float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def repeat_to(x: Tensor, n: int) -> Tensor:
    """Repeats a batch (B, ...) until it has n entries, a multiple of B: [a, b] -> [a, b, a, b, ...]."""
    return x if len(x) == n else x.repeat(n // len(x), *[1] * (x.ndim - 1))


def zero_module(module: nn.Module) -> nn.Module:
    """Sets every parameter to zero, so that a new path starts without effect."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def silu(x: Tensor, own: bool = True) -> Tensor:
    """x sigmoid(x), in the place of x where no gradient is computed: a pass over memory less.

    Args:
        own: whether nobody else reads x.
    """
    return F.silu(x, inplace=own and not torch.is_grad_enabled())


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the place of x where no gradient is computed; nobody else may read x then."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


class SiLU(nn.Module):
    """`silu` after a layer whose result nobody else reads."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


def activated(layer: nn.Module, x: Tensor, activation: str) -> Tensor:
    """The activation, one of `ACTIVATIONS`, of a layer's result; packed layers apply it while that is in the cache."""
    if hasattr(layer, "activated"):
        return layer.activated(x, activation)
    return ACTIVATIONS[activation](layer(x))


def phases(weight: Tensor) -> list[list[Tensor]]:
    """Kernels (D, C, 3, 3) of a doubled image -> those of the image itself, (D, C, 2, 2), by row and column phase.

    Of the three rows that a kernel sees of an image doubled by nearest neighbours, two are the same: an output row of
    even number sees w0 on the row above and w1 + w2 on its own, one of odd number w0 + w1 and w2 on the row below.
    """

    def halves(w: Tensor, dim: int) -> list[Tensor]:
        w0, w1, w2 = w.unbind(dim)
        return [torch.stack([w0, w1 + w2], dim), torch.stack([w0 + w1, w2], dim)]

    return [halves(w, 3) for w in halves(weight, 2)]


def interleave(outputs: Iterator[Tensor]) -> Tensor:
    """What the four kernels of `phases` gave for an image padded by one, row by row -> the convolved doubled image.

    Args:
        outputs: (B, D, H + 1, W + 1) each, computed one after the other as they are needed.

    Returns:
        (B, D, 2 H, 2 W), channels last.
    """
    for number, output in enumerate(outputs):
        i, j = divmod(number, 2)
        if number == 0:
            B, D, H, W = output.shape[0], output.shape[1], output.shape[2] - 1, output.shape[3] - 1
            y = output.new_empty(B, H, 2, W, 2, D)
        y[:, :, i, :, j] = output[..., i : i + H, j : j + W].permute(0, 2, 3, 1)
    return y.view(B, 2 * H, 2 * W, D).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by one: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, padding: int | tuple[int, int] = 1) -> Tensor:
        """`padding` (0, 1) is for x that has a row of its neighbours above and below."""
        return F.conv2d(x, self.weight, self.bias, padding=padding)


class DoublingConv2d(Conv3x3):
    """A 3x3 convolution of x doubled by nearest neighbours, at 4/9 of its cost: (B, C, H, W) -> (B, D, 2 H, 2 W).

    Each of the four phases of the result is a 2x2 convolution of x itself; see `phases`.
    """

    def forward(self, x: Tensor, padding: int | tuple[int, int] = 1) -> Tensor:
        """`padding`: see `Conv3x3`."""
        kernels = (w for row in phases(self.weight) for w in row)
        return interleave(F.conv2d(x, w, self.bias, padding=padding) for w in kernels)


class Upsample(nn.Module):
    """Doubles the size by nearest neighbours, then a convolution: (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = DoublingConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
