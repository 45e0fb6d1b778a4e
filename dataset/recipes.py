"""Degradation models: each turns a clean (H, W, 3) float32 RGB image in [0, 1] into a degraded one of the same size.

All randomness comes from the generator passed in, all parameters from YAML (configs/dataset/).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataset.jpeg import RandomJpeg
from dataset.kernels import RandomBlur, RandomSinc
from dataset.noise import RandomNoise
from dataset.resize import RandomResize, resize


def round_to_8_bits(image: NDArray) -> NDArray:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.float32) / np.float32(255)


@dataclass(frozen=True)
class FirstOrder:
    """y = JPEG(downsample(x * k) + n), brought back to size (CodeFormer, https://arxiv.org/abs/2206.11253, section 4).

    Args:
        downsample: range of the factor that the image is shrunk by.
    """

    blur: RandomBlur
    downsample: Sequence[float]
    noise: RandomNoise
    jpeg: RandomJpeg

    def __call__(self, hq: NDArray, rng: np.random.Generator) -> NDArray:
        height, width = hq.shape[:2]
        factor = rng.uniform(*self.downsample)
        x = self.blur(hq, rng)
        x = resize(x, int(height / factor), int(width / factor), "bilinear")
        x = self.noise(x, rng)
        x = self.jpeg(x, rng)
        return round_to_8_bits(resize(x, height, width, "bilinear"))


@dataclass(frozen=True)
class SecondOrder:
    """Blur, resize, noise and JPEG twice, with sinc ringing (Real-ESRGAN, https://arxiv.org/abs/2107.10833, figure 2).

    Args:
        scale: factors that the final low-quality size is below the original; each image draws one.
    """

    blur_1: RandomBlur
    resize_1: RandomResize
    noise_1: RandomNoise
    jpeg_1: RandomJpeg
    blur_2: RandomBlur
    resize_2: RandomResize
    noise_2: RandomNoise
    jpeg_2: RandomJpeg
    sinc: RandomSinc
    scale: Sequence[float] = (4,)

    def __call__(self, hq: NDArray, rng: np.random.Generator) -> NDArray:
        height, width = hq.shape[:2]
        scale = float(rng.choice(self.scale))
        low = (round(height / scale), round(width / scale))

        x = self.blur_1(hq, rng)
        x = self.resize_1(x, rng)
        x = self.noise_1(x, rng)
        x = self.jpeg_1(x, rng)

        x = self.blur_2(x, rng)
        x = self.resize_2(x, rng, base=low)
        x = self.noise_2(x, rng)
        # Both orders occur on the web: an image is shrunk and then compressed, or the other way round.
        if rng.random() < 0.5:
            x = self.sinc(resize(x, *low, self.resize_2.random_mode(rng)), rng)
            x = self.jpeg_2(x, rng)
        else:
            x = self.jpeg_2(x, rng)
            x = self.sinc(resize(x, *low, self.resize_2.random_mode(rng)), rng)
        return round_to_8_bits(resize(np.clip(x, 0, 1), height, width, "bicubic"))


@dataclass(frozen=True)
class Mixture:
    """Each image goes through one recipe, drawn at random.

    Args:
        recipes: degradations, `(hq, rng) -> lq`.
        probs: probability of each; they add up to 1.
    """

    recipes: Sequence[Callable[[NDArray, np.random.Generator], NDArray]]
    probs: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.recipes) != len(self.probs):
            raise ValueError(f"{len(self.recipes)} recipes but {len(self.probs)} probs; one of each")

    def __call__(self, hq: NDArray, rng: np.random.Generator) -> NDArray:
        return self.recipes[rng.choice(len(self.recipes), p=self.probs)](hq, rng)
