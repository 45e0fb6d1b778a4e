"""Sensor noise on (H, W, 3) float32 images in [0, 1]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from diffbir.dataset.degradations.levels import to_levels


def clip(x: NDArray) -> NDArray:
    """To [0, 1], in place."""
    return np.clip(x, 0, 1, out=x)


def normal(shape: Sequence[int], rng: np.random.Generator) -> NDArray:
    """N(0, 1), float32; torch draws it in less than half of NumPy's time, from a generator that `rng` seeds."""
    return torch.randn(shape, generator=Generator().manual_seed(int(rng.integers(2**63)))).numpy()


def gaussian_noise(image: NDArray, sigma: float, grey: bool, rng: np.random.Generator) -> NDArray:
    """Adds N(0, (sigma / 255)^2); grey: the same value in all channels."""
    noise = normal((*image.shape[:2], 1) if grey else image.shape, rng)
    noise *= sigma / 255
    return np.add(image, noise, out=None if grey else noise)


def correlated_noise(image: NDArray, mix: NDArray, rng: np.random.Generator) -> NDArray:
    """Adds N(0, mix mix^T / 255^2) to every pixel; mix is (3, 3)."""
    return image + normal(image.shape, rng) @ (mix.T / 255).astype(np.float32)


def poisson_noise(image: NDArray, scale: float, grey: bool, rng: np.random.Generator) -> NDArray:
    """Adds `scale` times the deviation of a photon count whose full scale is the image's number of grey levels.

    The number of levels, rounded up to a power of two, stands for the exposure (Real-ESRGAN's convention).
    """
    source = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] if grey else image
    levels = to_levels(source).astype(np.uint8)
    used = np.count_nonzero(cv2.calcHist([levels.reshape(1, -1)], [0], None, [256], [0, 256]))
    photons = 2 ** math.ceil(math.log2(max(used, 2)))
    noise = photon_counts(levels, photons, rng).astype(np.float32)
    noise /= photons
    noise -= levels / np.float32(255)
    noise *= scale
    return np.add(image, noise, out=None if grey else noise)


BITS = 13  # of a uniform number, by which nearly all photon counts are looked up


def photon_counts(levels: NDArray[np.uint8], photons: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """Poisson counts with means photons * levels / 255, by inversion; several times as fast as NumPy's, as exact."""
    guide, cumulative = poisson_tables(photons)
    u = rng.integers(2**16, size=levels.size, dtype=np.uint16)
    place = levels.ravel().astype(np.intp)
    place <<= BITS
    place |= u >> (16 - BITS)
    counts = guide.take(place)
    (rest,) = np.nonzero(counts < 0)
    level = levels.ravel()[rest].astype(np.intp)
    found = np.searchsorted(cumulative, level + (u[rest] + rng.random(len(rest))) / 2**16)
    counts[rest] = found - level * (len(cumulative) // 256)
    return counts.reshape(levels.shape)


@lru_cache(maxsize=8)
def poisson_tables(photons: int) -> tuple[NDArray, NDArray]:
    """What `photon_counts` looks up.

    Returns:
        guide: (256 * 2^BITS,) int16; for every level the count that the uniform numbers of each of 2^BITS intervals
            mean, or -1 where they mean several.
        cumulative: (256 * K,) float64, ascending; level + P(count <= k) for k < K, so that one search finds any count.
    """
    level = np.arange(256)[:, None]
    mean = level / 255 * photons
    ratios = mean / np.arange(1, 2 * photons + 64)  # of successive probabilities; less than 1e-30 lies beyond
    probs = np.exp(-mean) * np.cumprod(np.hstack([np.ones_like(mean), ratios]), axis=1)
    cumulative = np.minimum(np.cumsum(probs, axis=1), 1)
    cumulative[:, -1] = 1
    flat = (level + cumulative).ravel()
    first = np.searchsorted(flat, level + np.arange(2**BITS + 1) / 2**BITS) - level * cumulative.shape[1]
    guide = np.where(first[:, :-1] == first[:, 1:], first[:, :-1], -1)
    return guide.astype(np.int16).ravel(), flat


@dataclass(frozen=True)
class GaussianNoise:
    """Adds Gaussian noise and clips."""

    sigma: float
    grey: bool

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return clip(gaussian_noise(image, self.sigma, self.grey, rng))


@dataclass(frozen=True)
class CorrelatedNoise:
    """Adds Gaussian noise whose channels are correlated and clips."""

    mix: NDArray  # (3, 3)

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return clip(correlated_noise(image, self.mix, rng))


@dataclass(frozen=True)
class PoissonNoise:
    """Adds Poisson noise and clips."""

    scale: float
    grey: bool

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return clip(poisson_noise(image, self.scale, self.grey, rng))


@dataclass(frozen=True)
class RandomNoise:
    """Gaussian or Poisson noise of random strength.

    Args:
        sigma: range of the Gaussian's standard deviation, on a scale of 255.
        poisson_scale: range of the Poisson noise's scale.
        gaussian_prob: probability of Gaussian rather than Poisson noise.
        grey_prob: probability of noise without colour.
        correlated_prob: probability that Gaussian noise has a random covariance of its channels instead, of the highest
            sigma (see `random_mix`).
    """

    sigma: Sequence[float]
    poisson_scale: Sequence[float] = (0.0, 0.0)
    gaussian_prob: float = 1.0
    grey_prob: float = 0.0
    correlated_prob: float = 0.0

    def __post_init__(self):
        if self.grey_prob + self.correlated_prob > 1:
            raise ValueError(f"grey_prob + correlated_prob is {self.grey_prob + self.correlated_prob}, more than 1")

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return self.draw(rng)(image, rng)

    def draw(self, rng: np.random.Generator) -> GaussianNoise | CorrelatedNoise | PoissonNoise:
        colour = rng.random()
        grey = colour < self.grey_prob
        if rng.random() >= self.gaussian_prob:
            return PoissonNoise(rng.uniform(*self.poisson_scale), grey)
        sigma = rng.uniform(*self.sigma)
        if colour < 1 - self.correlated_prob:
            return GaussianNoise(sigma, grey)
        return CorrelatedNoise(self.sigma[1] * random_mix(rng))


def random_mix(rng: np.random.Generator) -> NDArray:
    """A (3, 3) matrix that correlates channels as BSRGAN's published code does (`add_Gaussian_noise`).

    The covariance has variances uniform in [0, 1] along axes that are the singular vectors of a uniform random matrix,
    and then the magnitudes of its entries: channels rise and fall together. Where that leaves no covariance, its
    negative eigenvalues count as positive, as they do in NumPy's `multivariate_normal`.
    """
    axes, _, _ = np.linalg.svd(rng.random((3, 3)))
    covariance = np.abs((axes.T * rng.random(3)) @ axes)
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.abs(values))
