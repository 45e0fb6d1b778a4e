"""Sharpening of the clean target, which teaches a model to restore crisper than photos are."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class UnsharpMask:
    """Adds what a Gaussian blur takes away, where that is much (as Real-ESRGAN, https://arxiv.org/abs/2107.10833).

    The blurred map of where the difference exceeds the threshold blends the sharpened image in, so flat regions and
    their noise stay as they are.

    Args:
        size: odd side of the Gaussian, pixels; its sigma is OpenCV's for that size, 0.15 size + 0.35 (8 for 51).
        weight: how much of the difference is added.
        threshold: on a scale of 255.
    """

    size: int = 51
    weight: float = 0.5
    threshold: float = 10.0

    def __call__(self, image: NDArray) -> NDArray:
        """image: (H, W, 3) float32 in [0, 1]; so is the result."""
        difference = image - self._blur(image)
        soft = self._blur((np.abs(difference) * 255 > self.threshold).astype(np.float32))
        sharp = np.clip(image + self.weight * difference, 0, 1)
        return image + soft * (sharp - image)

    def _blur(self, image: NDArray) -> NDArray:
        return cv2.GaussianBlur(image, (self.size, self.size), 0, borderType=cv2.BORDER_REFLECT_101)
