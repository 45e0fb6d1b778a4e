"""JPEG (baseline, 4:2:0) without the entropy coding, which loses nothing: batched, differentiable, on any device."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Annex K of the JPEG standard (ITU-T T.81): quality 50, rows of rising vertical frequency.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# JFIF: full range, Cb and Cr about 0 here.
TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))
# Orthonormal DCT-II, rows of rising frequency.
DCT = [[math.cos((2 * x + 1) * u * math.pi / 16) * (0.5 if u else 0.125**0.5) for x in range(8)] for u in range(8)]


def jpeg_batch(images: Tensor, quality: Tensor, published: bool = False) -> Tensor:
    """Compresses and decompresses every image at its own quality; rounding passes gradients straight through.

    By default it follows libjpeg (8-bit values in between, whole-numbered tables, chroma interpolated on the way back)
    and differs from a codec by less than a grey level on average.

    Args:
        images: (B, 3, H, W) RGB in [0, 1]; what is outside is clipped.
        quality: (B,), 1 to 100.
        published: computes what the differentiable JPEG of Real-ESRGAN's training code computes: only coefficients are
            rounded, tables are not, the luma table lies transposed, chroma is repeated. Tables are kept at 1 or more.
    """
    height, width = images.shape[-2:]
    to_ycc, to_rgb = images.new_tensor(TO_YCC), images.new_tensor(TO_RGB)
    to_8_bits = (lambda x: x) if published else round_straight_through

    x = to_8_bits(images.clamp(0, 1) * 255)
    x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
    x = to_8_bits(torch.einsum("ij,bjhw->bihw", to_ycc, x))
    luma, chroma = x[:, :1] - 128, to_8_bits(F.avg_pool2d(x[:, 1:], 2))

    luma = to_8_bits(quantise(luma, tables(LUMA, quality, published, transposed=published)) + 128)
    chroma = to_8_bits(quantise(chroma, tables(CHROMA, quality, published)))
    if not published:
        luma, chroma = luma.clamp(0, 255), chroma.clamp(-128, 127)
    chroma = F.interpolate(chroma, scale_factor=2, mode="nearest" if published else "bilinear")

    x = torch.einsum("ij,bjhw->bihw", to_rgb, torch.cat([luma, chroma], dim=1))
    return to_8_bits(x.clamp(0, 255))[..., :height, :width] / 255


def tables(base: tuple, quality: Tensor, published: bool, transposed: bool = False) -> Tensor:
    """Quantisation tables, (B, 1, 1, 1, 8, 8), by libjpeg's scaling: 5000 / q % below quality 50, else 200 - 2 q %."""
    quality = quality.to(torch.float32)[:, None, None]
    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)
    table = quality.new_tensor(base)
    table = table.T if transposed else table
    if published:
        scaled = (table * percent / 100).clamp(min=1)
    else:
        scaled = ((table * percent.floor() + 50) / 100).floor().clamp(1, 255)
    return scaled[:, None, None, None]


def quantise(plane: Tensor, table: Tensor) -> Tensor:
    """Rounds the DCT coefficients of the 8x8 blocks of (B, C, H, W) to multiples of `table`."""
    batch, channels, height, width = plane.shape
    dct = plane.new_tensor(DCT)
    blocks = plane.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = round_straight_through(dct @ blocks @ dct.T / table) * table
    return (dct.T @ coefficients @ dct).transpose(3, 4).reshape(plane.shape)


def round_straight_through(x: Tensor) -> Tensor:
    """round(x) whose gradient is that of x."""
    return x + (x.round() - x).detach()
