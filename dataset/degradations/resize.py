"""Resizing of (H, W, C) float32 images."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

OPENCV = {
    "area": cv2.INTER_AREA,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST,
}
# What these are to `torch.nn.functional.interpolate`. Of 'adaptive', a new pixel is the mean of all pixels that it
# touches, however little of them it covers; 'antialiased' is bicubic as Matlab and Pillow shrink.
TORCH = {
    "adaptive": {"mode": "area"},
    "antialiased": {"mode": "bicubic", "align_corners": False, "antialias": True},
}
MODES = (*OPENCV, *TORCH)


def resize(image: NDArray, height: int, width: int, mode: str) -> NDArray:
    """Resizes to at least one pixel each way, pixel centres aligned.

    Args:
        mode: of `MODES`; 'bilinear', 'bicubic' and 'nearest' shrink without anti-aliasing.
    """
    size = max(height, 1), max(width, 1)
    if mode in OPENCV:
        return cv2.resize(image, size[::-1], interpolation=OPENCV[mode])
    x = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], size, **TORCH[mode])
    return np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Resize:
    """Resizes to a given size, pixels."""

    height: int
    width: int
    mode: str

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return resize(image, self.height, self.width, self.mode)


@dataclass(frozen=True)
class Subsample:
    """Keeps every `factor`-th pixel each way, from the first on."""

    factor: int

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return np.ascontiguousarray(image[:: self.factor, :: self.factor])


@dataclass(frozen=True)
class RandomResize:
    """Resizes up, down or not at all, by a random factor and mode.

    Args:
        probs: probabilities of up, down, keep.
        factor: range of the factor; up draws from [1, high], down from [low, 1].
        modes: interpolation modes to draw from (see `MODES`).
        published: takes 'area' for what the training code of Real-ESRGAN calls so, PyTorch's adaptive average, which is
            34 to 36 dB away from OpenCV's.
    """

    probs: Sequence[float]
    factor: Sequence[float]
    modes: Sequence[str] = ("area", "bilinear", "bicubic")
    published: bool = False

    def __post_init__(self):
        if unknown := set(self.modes) - set(MODES):
            raise ValueError(f"modes must be among {', '.join(MODES)}, not {', '.join(sorted(unknown))}")

    def __call__(self, image: NDArray, rng: np.random.Generator, base: tuple[float, float] | None = None) -> NDArray:
        """base: (height, width) that the factor is relative to; the image's own size if None."""
        return self.draw(base or image.shape[:2], rng)(image, rng)

    def draw(self, base: Sequence[float], rng: np.random.Generator) -> Resize:
        """base: (height, width) that the factor is relative to."""
        direction = rng.choice(3, p=self.probs)
        factor = (rng.uniform(1, self.factor[1]), rng.uniform(self.factor[0], 1), 1.0)[direction]
        height, width = base
        return Resize(round(height * factor), round(width * factor), self.random_mode(rng))

    def random_mode(self, rng: np.random.Generator) -> str:
        mode = self.modes[rng.integers(len(self.modes))]
        return "adaptive" if mode == "area" and self.published else mode
