"""Colour: alignment, which gives a sample the colours of stage 1, luma, and differences as they are seen.

Images are float32 NCHW RGB in [0, 1].
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffbir.utils import choices

# Linear sRGB to CIE XYZ, and the white of D65.
XYZ = torch.tensor([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = torch.tensor([0.95047, 1.0, 1.08883])
KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


def low_frequencies(x: Tensor, levels: int = 5) -> Tensor:
    """What remains after `levels` a-trous blurs with dilation 2^i, borders replicated."""
    channels = x.shape[1]
    kernel = KERNEL.to(x).expand(channels, 1, 3, 3)
    for i in range(levels):
        r = 2**i
        x = F.conv2d(F.pad(x, (r, r, r, r), mode="replicate"), kernel, groups=channels, dilation=r)
    return x


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """High frequencies of `content` and low frequencies of `style`; both (B, C, H, W)."""
    return content - low_frequencies(content) + low_frequencies(style)


def adain(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """Gives every channel of `content` the mean and standard deviation of `style` (Huang and Belongie 2017)."""
    std_c, mean_c = torch.std_mean(content, dim=(2, 3), keepdim=True)
    std_s, mean_s = torch.std_mean(style, dim=(2, 3), keepdim=True)
    return (content - mean_c) * (std_s**2 + eps).sqrt() / (std_c**2 + eps).sqrt() + mean_s


def luma(x: Tensor) -> Tensor:
    """Y of ITU-R BT.601 as MATLAB's `rgb2ycbcr`, [16, 235] / 255, not rounded: (B, 3, H, W) -> (B, 1, H, W)."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=x.dtype, device=x.device).view(3, 1, 1)
    return ((x * weights).sum(dim=1, keepdim=True) + 16) / 255


def lab(x: Tensor) -> Tensor:
    """CIE L*a*b* of sRGB pictures under D65 (IEC 61966-2-1), 2 degree observer: (B, 3, H, W) -> (B, 3, H, W)."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij, bjhw -> bihw", XYZ.to(x), linear) / WHITE.to(x).view(3, 1, 1)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    fx, fy, fz = f.unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)


def ciede2000(x: Tensor, y: Tensor) -> Tensor:
    """The colour difference CIEDE2000 of two colours L*a*b*, with all weights 1: (B, 3, H, W) each -> (B, H, W).

    Symbols are those of Sharma, Wu and Dalal 2005 (https://doi.org/10.1002/col.20070); a difference of 1 is just seen.
    """
    (L1, a1, b1), (L2, a2, b2) = x.unbind(1), y.unbind(1)
    C_bar = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    G = 0.5 * (1 - (C_bar**7 / (C_bar**7 + 25.0**7)).sqrt())
    a1, a2 = (1 + G) * a1, (1 + G) * a2
    C1, C2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = (torch.atan2(b, a) % (2 * math.pi) for a, b in ((a1, b1), (a2, b2)))

    grey = C1 * C2 == 0  # has no hue
    dL, dC, dh = L2 - L1, C2 - C1, h2 - h1
    dh = dh - 2 * math.pi * (dh / (2 * math.pi)).round()  # the shorter way round
    dH = 2 * (C1 * C2).sqrt() * (torch.where(grey, 0, dh) / 2).sin()

    L, C = (L1 + L2) / 2, (C1 + C2) / 2
    h = torch.where((h1 - h2).abs() > math.pi, (h1 + h2 + 2 * math.pi) / 2, (h1 + h2) / 2)
    h = torch.where(grey, h1 + h2, h)
    degree = math.pi / 180
    T = 1 - 0.17 * (h - 30 * degree).cos() + 0.24 * (2 * h).cos()
    T = T + 0.32 * (3 * h + 6 * degree).cos() - 0.20 * (4 * h - 63 * degree).cos()
    theta = 30 * degree * (-(((h / degree) % 360 - 275) / 25).square()).exp()
    R_T = -2 * (C**7 / (C**7 + 25.0**7)).sqrt() * (2 * theta).sin()
    S_L = 1 + 0.015 * (L - 50).square() / (20 + (L - 50).square()).sqrt()
    S_C, S_H = 1 + 0.045 * C, 1 + 0.015 * C * T
    by_l, by_c, by_h = dL / S_L, dC / S_C, dH / S_H
    return (by_l**2 + by_c**2 + by_h**2 + R_T * by_c * by_h).clamp(min=0).sqrt()


def colour_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean CIEDE2000 over the pixels of pictures: (B, 3, H, W) each -> (B,)."""
    return ciede2000(lab(x), lab(y)).mean(dim=(1, 2))


def unchanged(content: Tensor, style: Tensor) -> Tensor:
    return content


ALIGNMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(choices.ALIGNMENTS, (wavelet, adain, unchanged), strict=True)
)
