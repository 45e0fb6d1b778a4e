"""Colour: alignment, which gives a sample the colours of stage 1, and luma (images float32 NCHW RGB in [0, 1])."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffbir.utils import choices

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


def unchanged(content: Tensor, style: Tensor) -> Tensor:
    return content


ALIGNMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(choices.ALIGNMENTS, (wavelet, adain, unchanged), strict=True)
)
