"""Noise as a camera leaves it, on (H, W, 3) float32 images in [0, 1]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diffbir.dataset.degradations.noise import normal


@dataclass(frozen=True)
class CameraNoise:
    """Noise as a camera leaves it: made on the raw image, then shaped by demosaicing, white balance and gamma.

    The picture is taken back to linear raw values (after Brooks et al. 2019, "Unprocessing Images for Learned Raw
    Denoising", https://arxiv.org/abs/1811.11127: tone curve, gamma, colour matrix and gains inverted), gets noise of
    variance shot * value + read on an RGGB mosaic, and is developed again. Simplifications: the colour matrix mixes
    all channels alike, demosaicing is bilinear, and there is no denoising, sharpening or local tone mapping.

    Args:
        gains: white balance of red, green, blue times the overall gain, >= 1.
        crosstalk: part of each raw channel that the mean of all channels makes up, in [0, 1).
        shot: variance of the photon noise per raw value (full scale 1).
        read: variance of the read-out noise.
    """

    gains: tuple[float, float, float]
    crosstalk: float
    shot: float
    read: float

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        noise = torch.from_numpy(normal(image.shape, rng))
        noisy = self.apply(torch.from_numpy(image).movedim(-1, -3), noise.movedim(-1, -3))
        return np.ascontiguousarray(noisy.movedim(-3, -1).numpy())

    def apply(self, image: Tensor, normal: Tensor) -> Tensor:
        """image: (..., 3, H, W) in [0, 1]; normal: N(0, 1) of that shape. Used on either device."""
        raw = self.unprocess(image)
        raw = raw + (self.shot * raw + self.read).sqrt() * normal
        return self.process(demosaic(raw)).clamp(0, 1)

    def unprocess(self, image: Tensor) -> Tensor:
        """sRGB to raw, (..., 3, H, W)."""
        x = (0.5 - ((1 - 2 * image.clamp(0, 1)).asin() / 3).sin()).clamp(0, 1)  # inverse of 3 x^2 - 2 x^3
        x = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        return (x + self.crosstalk * (x.mean(-3, keepdim=True) - x)) / self._gains(x)

    def process(self, raw: Tensor) -> Tensor:
        """Raw to sRGB, the inverse of `unprocess`; what exceeds the range is clipped as a camera does."""
        x = (raw * self._gains(raw)).clamp(0, 1)
        mean = x.mean(-3, keepdim=True)
        x = (mean + (x - mean) / (1 - self.crosstalk)).clamp(0, 1)
        x = torch.where(x <= 0.0031308, x * 12.92, 1.055 * x ** (1 / 2.4) - 0.055)
        return 3 * x**2 - 2 * x**3

    def _gains(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.gains)[:, None, None]


def demosaic(raw: Tensor) -> Tensor:
    """Keeps one colour per pixel (RGGB) and interpolates the others bilinearly; (..., 3, H, W).

    A colour that no neighbour has (only in images one pixel high or wide) keeps its value.
    """
    height, width = raw.shape[-2:]
    mask = raw.new_zeros(3, height, width)
    mask[0, ::2, ::2] = mask[1, ::2, 1::2] = mask[1, 1::2, ::2] = mask[2, 1::2, 1::2] = 1
    kernel = raw.new_tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None]
    total = F.conv2d((raw * mask).reshape(-1, 1, height, width), kernel, padding=1).reshape(raw.shape)
    weight = F.conv2d(mask[:, None], kernel, padding=1)[:, 0]
    filled = torch.where(weight > 0, total / weight.clamp(min=1), raw)
    return torch.where(mask > 0, raw, filled)


@dataclass(frozen=True)
class RandomCameraNoise:
    """Camera noise of a random camera and exposure; the defaults of gains and noise follow Brooks et al.

    Args:
        red, blue: ranges of the white balance's gains (green: 1).
        gain: range of the overall gain.
        crosstalk: range of the mixing of colours.
        shot: range of the shot noise's variance, drawn on a logarithmic scale; the read noise follows from it.
        prob: probability of any noise.
    """

    red: Sequence[float] = (1.9, 2.4)
    blue: Sequence[float] = (1.5, 1.9)
    gain: Sequence[float] = (1.0, 1.6)
    crosstalk: Sequence[float] = (0.1, 0.4)
    shot: Sequence[float] = (1e-4, 1.2e-2)
    prob: float = 1.0

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        noise = self.draw(rng)
        return noise(image, rng) if noise else image

    def draw(self, rng: np.random.Generator) -> CameraNoise | None:
        if rng.random() >= self.prob:
            return None
        gain = rng.uniform(*self.gain)
        gains = (gain * rng.uniform(*self.red), gain, gain * rng.uniform(*self.blue))
        log_shot = rng.uniform(*np.log(self.shot))
        # The line and its spread that the paper fits to the noise of the Darmstadt data set's cameras.
        log_read = rng.normal(2.18 * log_shot + 1.20, 0.26)
        return CameraNoise(gains, rng.uniform(*self.crosstalk), math.exp(log_shot), math.exp(log_read))
