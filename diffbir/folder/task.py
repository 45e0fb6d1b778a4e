"""Which stage 1 suits a picture, for `--task auto`.

The rule: a picture is for `denoise` where its noise is at least NOISE levels of 255, or its JPEG blocks stand out by
BLOCKS; any other is for `sr`, whose stage 1 is the one that sharpens. Faces aren't looked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DENOISE, SR = "denoise", "sr"
NOISE = 4.0  # of luma: independent noise of 6 levels in each channel
BLOCKS = 1.5  # JPEG of quality 90 reaches 1.35, of 50 1.7 and more; photos without blocks 1.25
LUMA = (0.299, 0.587, 0.114)
TILE = 16  # pixels of the side of the areas of which the quietest tell the noise
QUIET = 0.2  # share of areas without texture that is counted on
CROP = 1536  # pixels of the side of the part that is looked at


def choose_task(images: Tensor) -> str:
    """(B, 3, H, W) RGB in [0, 1] -> the task that suits the first."""
    y = luma(images[:1])
    return DENOISE if noise(y) >= NOISE or blocks(y) >= BLOCKS else SR


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 1, h, w) in [0, 255], the middle of large pictures."""
    height, width = images.shape[-2:]
    top, left = max(0, height - CROP) // 2, max(0, width - CROP) // 2
    part = images[..., top : top + CROP, left : left + CROP]
    return (part * part.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True) * 255


def noise(y: Tensor) -> float:
    """Standard deviation of white noise in levels: of diagonal differences (the finest Haar band) in quiet areas.

    After Donoho & Johnstone 1994, with areas in place of the median over all, which texture raises.
    """
    if min(y.shape[-2:]) < 2:
        return 0.0
    detail = (y[..., 1:, 1:] - y[..., 1:, :-1] - y[..., :-1, 1:] + y[..., :-1, :-1]) / 2
    size = [min(TILE, n) for n in detail.shape[-2:]]
    mean = F.avg_pool2d(detail.abs(), size)  # of a normal variable: sigma sqrt(2 / pi)
    return mean.flatten().quantile(QUIET).item() * (torch.pi / 2) ** 0.5


def blocks(y: Tensor) -> float:
    """How much larger steps are between blocks of 8 pixels than within them, at the phase where they are largest.

    1 is not at all; a step is what a line through the pixels beside it doesn't explain.
    """
    ratios = [_blocks(x) for x in (y, y.transpose(-1, -2))]
    return sum(ratios) / 2


def _blocks(y: Tensor) -> float:
    if y.shape[-1] < 35:  # too few blocks to tell
        return 1.0
    d = y.diff(dim=-1)
    step = (d[..., 1:-1] - (d[..., :-2] + d[..., 2:]) / 2).abs().mean(dim=(0, 1, 2))
    phases = torch.stack([step[i::8].median() for i in range(8)])
    top = phases.max()
    others = (phases.sum() - top) / 7
    return (top / others).item() if others > 1e-3 else 1.0
