"""Blurring (H, W, 3) float32 images with random kernels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from diffbir.dataset.degradations.kernels import KINDS, gaussian, plateau, sinc


def filter2d(image: NDArray, kernel: NDArray) -> NDArray:
    """Correlates every channel of (H, W, C) float32 with `kernel`, borders reflected, in the cheapest of three ways."""
    kernel = trim(kernel)
    columns, weights, rows = np.linalg.svd(kernel)
    if weights[1:].sum() < 1e-9 * weights[0]:  # the kernel is an outer product, as an isotropic Gaussian is
        return cv2.sepFilter2D(image, -1, weights[0] * rows[0], columns[:, 0], borderType=cv2.BORDER_REFLECT_101)
    if len(kernel) <= 11:  # OpenCV's own choice between sums and FFT, but its FFT takes nearly twice as long
        return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    return fft_filter(image, kernel)


def trim(kernel: NDArray) -> NDArray:
    """Cuts off a border whose weights are too small to matter for float32 images in [0, 1]: below 1e-6 in sum."""
    centre = len(kernel) // 2
    ring = np.abs(np.indices(kernel.shape) - centre).max(0)
    outside = np.bincount(ring.ravel(), np.abs(kernel).ravel())[::-1].cumsum()[::-1]
    margin = np.count_nonzero(outside[1:] < 1e-6)
    return kernel[margin : len(kernel) - margin, margin : len(kernel) - margin]


def fft_filter(image: NDArray, kernel: NDArray) -> NDArray:
    """As `filter2d`; its cost does not grow with the kernel."""
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, *(len(kernel) // 2,) * 4, cv2.BORDER_REFLECT_101)
    size = [cv2.getOptimalDFTSize(n) for n in padded.shape[:2]]
    rows = torch.fft.rfft(torch.from_numpy(kernel.astype(np.float32)), size[1])
    transfer = torch.fft.fft(rows, size[0], dim=0).conj()
    channels = []
    for channel in cv2.split(padded):  # one by one they fit the cache
        spectrum = torch.fft.rfft2(torch.from_numpy(channel), size).mul_(transfer)
        channels.append(torch.fft.irfft2(spectrum, size)[:height, :width].numpy())
    return cv2.merge(channels)


@dataclass(frozen=True)
class Blur:
    """Filters with `kernel`, (size, size)."""

    kernel: NDArray

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return filter2d(image, self.kernel)


@dataclass(frozen=True)
class RandomBlur:
    """Blurs with a random kernel.

    Args:
        sizes: range of the odd kernel side, inclusive.
        kinds: probability of each kernel kind (see `KINDS`); they sum to 1.
        sigma: range of the standard deviations, pixels.
        beta_generalized: range of the generalised Gaussian's shape.
        beta_plateau: range of the plateau's shape.
        sinc_prob: probability of a sinc filter in place of the above.
        prob: probability of blurring at all.
    """

    sizes: Sequence[int]
    kinds: Mapping[str, float]
    sigma: Sequence[float]
    beta_generalized: Sequence[float] = (0.5, 4.0)
    beta_plateau: Sequence[float] = (1.0, 2.0)
    sinc_prob: float = 0.0
    prob: float = 1.0

    def __post_init__(self):
        if set(self.kinds) - set(KINDS) or abs(sum(self.kinds.values()) - 1) > 1e-6:
            raise ValueError(f"kinds must be probabilities of {', '.join(KINDS)} that sum to 1, not {dict(self.kinds)}")

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        blur = self.draw(rng)
        return blur(image, rng) if blur else image

    def draw(self, rng: np.random.Generator) -> Blur | None:
        return Blur(self.kernel(rng)) if rng.random() < self.prob else None

    def kernel(self, rng: np.random.Generator) -> NDArray:
        size = random_odd(self.sizes, rng)
        if rng.random() < self.sinc_prob:
            return sinc(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
        kind = rng.choice(list(self.kinds), p=list(self.kinds.values()))
        sigma_x = sigma_y = rng.uniform(*self.sigma)
        theta = 0.0
        if not kind.endswith("_iso") and kind != "iso":
            sigma_y, theta = rng.uniform(*self.sigma), rng.uniform(-math.pi, math.pi)
        if kind.startswith("generalized"):
            return gaussian(size, sigma_x, sigma_y, theta, random_beta(self.beta_generalized, rng))
        if kind.startswith("plateau"):
            return plateau(size, sigma_x, sigma_y, theta, random_beta(self.beta_plateau, rng))
        return gaussian(size, sigma_x, sigma_y, theta)


@dataclass(frozen=True)
class ScaledBlur:
    """Blurs with a Gaussian that may be the wider the more an image is shrunk (BSRGAN's published code, `add_blur`).

    Args:
        sizes: range of the odd kernel side, inclusive.
        iso_prob: probability of an isotropic kernel.
        sigma: (a, b); the standard deviation of an isotropic kernel is uniform in [0, a + b scale], pixels.
        variance: (a, b); along each axis of an anisotropic kernel the variance is uniform in [0, a + b scale].
    """

    sizes: Sequence[int]
    iso_prob: float
    sigma: Sequence[float]
    variance: Sequence[float]

    def draw(self, scale: float, rng: np.random.Generator) -> Blur:
        size = random_odd(self.sizes, rng)
        if rng.random() < self.iso_prob:
            sigma_x = sigma_y = (self.sigma[0] + self.sigma[1] * scale) * rng.random()
        else:
            sigma_x, sigma_y = np.sqrt((self.variance[0] + self.variance[1] * scale) * rng.random(2))
        narrowest = 0.05  # already no blur; 0 would divide by it
        return Blur(gaussian(size, max(sigma_x, narrowest), max(sigma_y, narrowest), rng.uniform(0, math.pi)))


@dataclass(frozen=True)
class RandomSinc:
    """The last sinc filter of the second-order model: ringing and overshoot as sharpening and codecs leave them."""

    sizes: Sequence[int]
    prob: float

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        blur = self.draw(rng)
        return blur(image, rng) if blur else image

    def draw(self, rng: np.random.Generator) -> Blur | None:
        if rng.random() >= self.prob:
            return None
        return Blur(sinc(random_odd(self.sizes, rng), rng.uniform(math.pi / 3, math.pi)))


def random_odd(bounds: Sequence[int], rng: np.random.Generator) -> int:
    low, high = bounds
    return low + 2 * int(rng.integers((high - low) // 2, endpoint=True))


def random_beta(bounds: Sequence[float], rng: np.random.Generator) -> float:
    """Below and above 1 (heavier and lighter tails than the Gaussian's) with equal probability."""
    low, high = bounds
    return rng.uniform(min(low, 1.0), 1.0) if rng.random() < 0.5 else rng.uniform(max(low, 1.0), high)
