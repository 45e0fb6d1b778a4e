"""Layers that several networks share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of x doubled by nearest neighbours, at 4/9 of its cost: (B, C, H, W) -> (B, D, 2 H, 2 W).

    Of the three rows that a kernel sees, two are the same: an output row of even number sees w0 on the row above and
    w1 + w2 on its own, one of odd number w0 + w1 and w2 on the row below. So each of the four phases is a 2x2
    convolution of x itself.
    """

    def halves(w: Tensor, dim: int) -> list[Tensor]:
        w0, w1, w2 = w.unbind(dim)
        return [torch.stack([w0, w1 + w2], dim), torch.stack([w0 + w1, w2], dim)]

    H, W = x.shape[-2:]
    x, rows = F.pad(x, (1, 1, 1, 1)), []
    for i, w_i in enumerate(halves(conv.weight, 2)):
        shifted = [x[..., i : i + H + 1, j : j + W + 1] for j in (0, 1)]
        phases = [F.conv2d(x_j, w, conv.bias) for x_j, w in zip(shifted, halves(w_i, 3), strict=True)]
        rows.append(torch.stack([y.permute(0, 2, 3, 1) for y in phases], 3))  # (B, H, W, 2, D), channels last
    return torch.stack(rows, 2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class Upsample(nn.Module):
    """Doubles the size by nearest neighbours, then a convolution: (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
