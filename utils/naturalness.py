"""Metrics without a reference: how far the statistics of a picture are from those of natural ones.

Both look at 8-bit luma that was divided by its local contrast (Ruderman 1994), on two scales, and fit distributions to
it and to products of neighbours. These fits count signs, so that where a picture is flat, rounding decides: what is
computed in float32 and what in float64 follows pyiqa, whose values papers print.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from diffbir.utils.cli import UserError
from diffbir.utils.metrics import WEIGHTS

NIQE_WEIGHTS = WEIGHTS / "niqe" / "niqe.safetensors"
BRISQUE_WEIGHTS = WEIGHTS / "brisque.safetensors"
GREY = (0.299, 0.587, 0.114)  # full range, 0 to 255


class NIQE(nn.Module):
    """Natural image quality evaluator (Mittal et al. 2013): lower is more natural.

    The distance between the Gaussian of 36 statistics over blocks of 96 x 96 pixels and that of pristine photos. What
    is left at the right and at the bottom is not seen; small pictures have few blocks and uncertain values.

    Args:
        weights: safetensors file with `mean` (36,) and `cov` (36, 36) of pristine photos.
    """

    variant = "NIQE, parameters of the authors, blocks of 96, luma 0 to 255"
    block = 96

    def __init__(self, weights: str | Path = NIQE_WEIGHTS) -> None:
        super().__init__()
        for name, value in load_file(weights).items():
            self.register_buffer(name, value.double(), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,).

        Raises:
            ValueError: fewer than two blocks of 96 x 96 pixels fit in.
        """
        rows, columns = (side // self.block for side in x.shape[-2:])
        if rows * columns < 2:
            raise ValueError(
                f"Images of {x.shape[-2]} x {x.shape[-1]} are too small: NIQE needs two blocks of 96 x 96."
            )
        grey = _grey(x).double()[..., : rows * self.block, : columns * self.block]
        features = []
        for side in (self.block, self.block // 2):
            blocks = _normalised(grey, "replicate").unfold(2, side, side).unfold(3, side, side)
            blocks = blocks.reshape(len(x), rows * columns, side, side)
            features.append(self.statistics(blocks))
            grey = _halved(grey)
        return torch.stack([self.distance(f) for f in torch.cat(features, dim=-1)])

    @staticmethod
    def statistics(blocks: Tensor) -> Tensor:
        """(..., h, w) -> (..., 18)."""
        alpha, left, right = _asymmetric(blocks)
        width = _width(alpha)
        found = [alpha, width * (left + right) / 2]
        for product in _neighbours(blocks, ((0, 1), (1, 0), (1, 1), (1, -1))):
            alpha, left, right = _asymmetric(product)
            width = _width(alpha)
            found += [alpha, _mean(alpha, width * left, width * right), width * left, width * right]
        return torch.stack(found, dim=-1)

    def distance(self, features: Tensor) -> Tensor:
        """(N, 36), a row for each block, to the pristine Gaussian; flat blocks, which have no shape, don't count."""
        features = features[features.isfinite().all(dim=-1)].to(self.mean.device)
        if len(features) < 2:
            return self.mean.new_tensor(float("nan"))
        difference = self.mean - features.mean(dim=0)
        return (difference @ torch.linalg.pinv((self.cov + features.T.cov()) / 2) @ difference).sqrt()


class BRISQUE(nn.Module):
    """Blind spatial quality evaluator (Mittal et al. 2012): about 0 to 100, lower is better.

    A support vector machine of the authors on 36 statistics.

    Args:
        weights: safetensors file with `vectors` (N, 36), their `coefficients` (N,), `gamma` and `rho`, and `low` and
            `high` (36,), the range of each statistic.

    Raises:
        UserError: `weights` does not exist.
    """

    variant = "BRISQUE, the authors' model of LIVE (rho -153.591), luma 0 to 255"
    min_side = 16

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        weights = Path(weights or BRISQUE_WEIGHTS)
        if not weights.is_file():
            raise UserError(
                f"weights not found: {weights}; make them with: python scripts/convert_weights.py --brisque"
            )
        for name, value in load_file(weights).items():
            self.register_buffer(name, value.double(), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,).

        Raises:
            ValueError: a side is below 16.
        """
        if min(x.shape[-2:]) < self.min_side:
            raise ValueError(f"Images of {x.shape[-2]} x {x.shape[-1]} are too small: each side needs 16 pixels.")
        grey, features = _grey(x), []
        for _ in range(2):
            features.append(self.statistics(_normalised(grey, "constant")[:, 0].double()))
            grey = _halved(grey)
        features = torch.cat(features, dim=-1).to(self.low.device)
        scaled = 2 * (features - self.low) / (self.high - self.low) - 1
        return torch.exp(-self.gamma * torch.cdist(scaled, self.vectors).square()) @ self.coefficients - self.rho

    @staticmethod
    def statistics(x: Tensor) -> Tensor:
        """(B, h, w) -> (B, 18)."""
        alpha, variance = _symmetric(x)
        found = [alpha, variance]
        for product in _neighbours(x, ((0, 1), (1, 0), (1, 1), (-1, 1))):
            alpha, left, right = _asymmetric(product)
            width = _width(alpha)
            found += [alpha, _mean(alpha, width * left, width * right), left**2, right**2]
        return torch.stack(found, dim=-1)


def _grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 1, H, W), whole numbers from 0 to 255, float32."""
    x = x.cpu() if x.device.type == "mps" else x  # which has no float64, in which statistics are computed
    return ((x.float().movedim(1, -1) @ torch.tensor(GREY, device=x.device)) * 255).round()[:, None]


def _normalised(grey: Tensor, border: str) -> Tensor:
    """Mean-subtracted, contrast-normalised: window of 7 x 7 pixels, sigma 7 / 6; (B, 1, H, W) to the same."""
    distance = torch.arange(-3.0, 4.0, dtype=torch.float64) ** 2
    window = torch.exp(-(distance + distance[:, None]) / (2 * (7 / 6) ** 2))
    # Rounded to float32 as in the implementations that papers use: it no longer adds up to 1 then, and where a picture
    # is flat, what remains has the same sign everywhere instead of that of rounding errors. The fits count signs.
    window = (window / window.sum()).float().to(grey).view(1, 1, 7, 7)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (3, 3, 3, 3), mode=border), window)

    mean = blur(grey)
    deviation = ((blur(grey**2) - mean**2).abs() + torch.finfo(grey.dtype).eps).sqrt()
    return (grey - mean) / (deviation + 1)


def _halved(x: Tensor) -> Tensor:
    """MATLAB's `imresize(x, 0.5)`: bicubic with antialiasing, borders mirrored, odd sides rounded up."""
    h, w = x.shape[-2:]
    margin = 8  # more than half the window of 8 pixels, and even

    def mirrored(x: Tensor, dim: int) -> Tensor:
        size = x.shape[dim]
        order = torch.arange(-margin, size + margin + size % 2, device=x.device) % (2 * size)
        return x.index_select(dim, torch.where(order < size, order, 2 * size - 1 - order))

    x = mirrored(mirrored(x, 2), 3)
    small = F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bicubic", antialias=True)
    m = margin // 2
    return small[..., m : m + -(-h // 2), m : m + -(-w // 2)]


def _neighbours(x: Tensor, shifts: tuple[tuple[int, int], ...]):
    """Products of every pixel with its neighbour in each direction, wrapped around."""
    return (x * torch.roll(x, shift, dims=(-2, -1)) for shift in shifts)


def _shapes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes that are looked up, and E|v|^2 / E v^2 of the generalised Gaussian with each, which rises with it."""
    shapes = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64, device=x.device)
    ratios = (2 * torch.lgamma(2 / shapes) - torch.lgamma(1 / shapes) - torch.lgamma(3 / shapes)).exp()
    return shapes, ratios


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the entry of an ascending table that is nearest to each value."""
    above = torch.searchsorted(table, values.contiguous()).clamp(1, len(table) - 1)
    return torch.where(values - table[above - 1] <= table[above] - values, above - 1, above)


def _symmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised Gaussian of (..., h, w) by moments: shape and variance, (...)."""
    shapes, ratios = _shapes(x)
    variance = x.square().mean(dim=(-2, -1))
    inverse = variance / x.abs().mean(dim=(-2, -1)) ** 2  # as the authors look it up: its nearest is another by a hair
    return shapes.flip(0)[_nearest(inverse, 1 / ratios.flip(0))], variance


def _asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric generalised Gaussian of (..., h, w) by moments: shape, and root mean squares left and right of 0."""
    shapes, ratios = _shapes(x)
    squares, dims = x.square(), (-2, -1)
    left = ((squares * (x < 0)).sum(dims) / (x < 0).sum(dims)).sqrt()
    right = ((squares * (x > 0)).sum(dims) / (x > 0).sum(dims)).sqrt()
    g = left / right
    ratio = x.abs().mean(dims) ** 2 / squares.mean(dims) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
    alpha = shapes[_nearest(ratio.nan_to_num(), ratios)]
    return torch.where(ratio.isfinite(), alpha, torch.nan), left, right


def _width(alpha: Tensor) -> Tensor:
    """Scale of a generalised Gaussian over its standard deviation."""
    return (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha)).exp().sqrt()


def _mean(alpha: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Mean of the asymmetric generalised Gaussian with these scales."""
    return (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
