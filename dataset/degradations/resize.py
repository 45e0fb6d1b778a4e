"""Resizing of (H, W, C) float32 images."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MODES = {
    "area": cv2.INTER_AREA,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST,
}


def resize(image: NDArray, height: int, width: int, mode: str) -> NDArray:
    """Resizes without anti-aliasing (except 'area'), pixel centres aligned; at least one pixel each way."""
    return cv2.resize(image, (max(width, 1), max(height, 1)), interpolation=MODES[mode])


@dataclass(frozen=True)
class Resize:
    """Resizes to a given size, pixels."""

    height: int
    width: int
    mode: str

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return resize(image, self.height, self.width, self.mode)


@dataclass(frozen=True)
class RandomResize:
    """Resizes up, down or not at all, by a random factor and mode.

    Args:
        probs: probabilities of up, down, keep.
        factor: range of the factor; up draws from [1, high], down from [low, 1].
        modes: interpolation modes to draw from (see `MODES`).
    """

    probs: Sequence[float]
    factor: Sequence[float]
    modes: Sequence[str] = ("area", "bilinear", "bicubic")

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
        return self.modes[rng.integers(len(self.modes))]
