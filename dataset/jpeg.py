"""JPEG compression of (H, W, 3) float32 RGB images in [0, 1] by a real codec (4:2:0)."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


def jpeg(image: NDArray, quality: int) -> NDArray:
    """Compresses and decompresses; quality 1-100 (libjpeg)."""
    bgr = np.rint(np.clip(image[..., ::-1], 0, 1) * 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255


@dataclass(frozen=True)
class RandomJpeg:
    """JPEG of a quality drawn uniformly from an inclusive range."""

    quality: Sequence[int]

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return jpeg(image, int(rng.integers(self.quality[0], self.quality[1], endpoint=True)))
