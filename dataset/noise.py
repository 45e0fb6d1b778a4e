"""Sensor noise on (H, W, 3) float32 images in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


def gaussian_noise(image: NDArray, sigma: float, grey: bool, rng: np.random.Generator) -> NDArray:
    """Adds N(0, (sigma / 255)^2); grey: the same value in all channels."""
    shape = (*image.shape[:2], 1) if grey else image.shape
    return image + rng.standard_normal(shape, dtype=np.float32) * np.float32(sigma / 255)


def poisson_noise(image: NDArray, scale: float, grey: bool, rng: np.random.Generator) -> NDArray:
    """Adds `scale` times the deviation of a photon count whose full scale is the image's number of grey levels.

    The number of levels, rounded up to a power of two, stands for the exposure (Real-ESRGAN's convention).
    """
    source = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if grey else image
    source = np.clip(np.rint(source * 255), 0, 255)
    levels = np.count_nonzero(np.bincount(source.astype(np.uint8).ravel(), minlength=256))
    photons = 2 ** np.ceil(np.log2(max(levels, 2)))
    source = source / 255
    return image + ((rng.poisson(source * photons) / photons - source) * scale).astype(np.float32)


@dataclass(frozen=True)
class RandomNoise:
    """Gaussian or Poisson noise of random strength.

    Args:
        sigma: range of the Gaussian's standard deviation, on a scale of 255.
        poisson_scale: range of the Poisson noise's scale.
        gaussian_prob: probability of Gaussian rather than Poisson noise.
        grey_prob: probability of noise without colour.
    """

    sigma: Sequence[float]
    poisson_scale: Sequence[float] = (0.0, 0.0)
    gaussian_prob: float = 1.0
    grey_prob: float = 0.0

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        grey = rng.random() < self.grey_prob
        if rng.random() < self.gaussian_prob:
            noisy = gaussian_noise(image, rng.uniform(*self.sigma), grey, rng)
        else:
            noisy = poisson_noise(image, rng.uniform(*self.poisson_scale), grey, rng)
        return np.clip(noisy, 0, 1)
