"""JPEG compression of (H, W, 3) float32 RGB images in [0, 1] by a real codec (4:2:0)."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from diffbir.dataset.degradations.levels import to_levels


def jpeg(image: NDArray, quality: int) -> NDArray:
    """Compresses and decompresses; quality 1-100 (libjpeg)."""
    bgr = cv2.cvtColor(to_levels(image).astype(np.uint8), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    x = cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB).astype(np.float32)
    x /= 255
    return x


@dataclass(frozen=True)
class Jpeg:
    """Compresses at a given quality."""

    quality: int

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return jpeg(image, self.quality)


@dataclass(frozen=True)
class RandomJpeg:
    """JPEG of a quality drawn uniformly from an inclusive range.

    Args:
        quality: lowest and highest.
        prob: probability of compressing at all.
    """

    quality: Sequence[int]
    prob: float = 1.0

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        codec = self.draw(rng)
        return codec(image, rng) if codec else image

    def draw(self, rng: np.random.Generator) -> Jpeg | None:
        if self.prob < 1 and rng.random() >= self.prob:
            return None
        return Jpeg(int(rng.integers(self.quality[0], self.quality[1], endpoint=True)))
