"""Degradation models: each turns a clean (H, W, 3) float32 RGB image in [0, 1] into a degraded one of the same size.

All randomness comes from the generator passed in, all parameters from YAML (configs/dataset/). A recipe is a stream of
steps, each with its parameters drawn: called, it applies them to one image as they come; `degradations.batched.Batched`
applies those of a whole batch on an accelerator.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffbir.dataset.degradations.blur import Blur, RandomBlur, RandomSinc, ScaledBlur
from diffbir.dataset.degradations.camera import RandomCameraNoise
from diffbir.dataset.degradations.jpeg import RandomJpeg
from diffbir.dataset.degradations.kernels import shifted_gaussian
from diffbir.dataset.degradations.levels import round_to_8_bits
from diffbir.dataset.degradations.noise import RandomNoise
from diffbir.dataset.degradations.resize import RandomResize, Resize, Subsample

Step = Callable[[NDArray, np.random.Generator], NDArray]


@dataclass(frozen=True)
class Clip:
    """Clips to [0, 1]."""

    def __call__(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        return np.clip(image, 0, 1)


class Recipe(ABC):
    """A degradation, `(hq, rng) -> lq`."""

    @abstractmethod
    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        """Draws what happens to one image of (height, width); None stands for a stage that is skipped.

        Parameters are drawn when a step is asked for, so that noise may take its values from `rng` in between.
        """

    def __call__(self, hq: NDArray, rng: np.random.Generator) -> NDArray:
        x = hq
        for step in self.steps(hq.shape[:2], rng):
            x = x if step is None else step(x, rng)
        return round_to_8_bits(x)


@dataclass(frozen=True)
class Classical(Recipe):
    """y = downsample(x * k) + n, brought back to size bicubically.

    Args:
        scale: factors that the image is shrunk by; each image draws one.
        modes: ways of shrinking (see `dataset.degradations.resize.MODES`); each image draws one.
    """

    blur: RandomBlur
    scale: Sequence[float]
    noise: RandomNoise
    modes: Sequence[str] = ("bicubic",)

    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        scale = float(rng.choice(self.scale))
        yield self.blur.draw(rng)
        yield Resize(round(size[0] / scale), round(size[1] / scale), str(rng.choice(self.modes)))
        yield self.noise.draw(rng)
        yield Resize(*size, "bicubic")


@dataclass(frozen=True)
class FirstOrder(Recipe):
    """y = JPEG(downsample(x * k) + n), brought back to size (CodeFormer, https://arxiv.org/abs/2206.11253, section 4).

    Args:
        downsample: range of the factor that the image is shrunk by.
    """

    blur: RandomBlur
    downsample: Sequence[float]
    noise: RandomNoise
    jpeg: RandomJpeg

    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        factor = rng.uniform(*self.downsample)
        yield self.blur.draw(rng)
        yield Resize(int(size[0] / factor), int(size[1] / factor), "bilinear")
        yield self.noise.draw(rng)
        yield self.jpeg.draw(rng)
        yield Resize(*size, "bilinear")


@dataclass(frozen=True)
class SecondOrder(Recipe):
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

    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        scale = float(rng.choice(self.scale))
        low = (round(size[0] / scale), round(size[1] / scale))

        yield self.blur_1.draw(rng)
        yield self.resize_1.draw(size, rng)
        yield self.noise_1.draw(rng)
        yield self.jpeg_1.draw(rng)

        yield self.blur_2.draw(rng)
        yield self.resize_2.draw(low, rng)
        yield self.noise_2.draw(rng)
        # Both orders occur on the web: an image is shrunk and then compressed, or the other way round.
        compressed_last = rng.random() < 0.5
        if not compressed_last:
            yield self.jpeg_2.draw(rng)
        yield Resize(*low, self.resize_2.random_mode(rng))
        yield self.sinc.draw(rng)
        if compressed_last:
            yield self.jpeg_2.draw(rng)
        yield Clip()
        yield Resize(*size, "bicubic")


@dataclass(frozen=True)
class BSRGAN(Recipe):
    """Two blurs, two downsamplings, noise, JPEG and camera noise in random order, then JPEG (Zhang et al. 2021,
    "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", https://arxiv.org/abs/2103.14006).

    It follows the published code (`degradation_bsrgan`). What comes first of the two downsamplings makes the image
    smaller, often smaller than the low-quality size, which the other one brings it to.

    Args:
        blur: drawn twice.
        scale: factors that the low-quality size is below the original, whole numbers; each image draws one.
        jpeg, camera: those of the random order; `last_jpeg` closes it.
        modes: ways of resizing (see `dataset.degradations.resize.MODES`); each resize draws one.
        halve_prob: probability, at scale 4, of halving the image beforehand (every other time with anti-aliasing) and
            going on with scale 2. The clean image stays as it is, and the low-quality size too.
        resize_prob: probability that the first downsampling is a resize by 1 / U(1, 2 scale); otherwise it is a
            Gaussian blur on the grid of the pixels that are kept, every scale-th.
        sigma: (a, b); the standard deviation of that blur is uniform in [a, b scale], pixels.
    """

    blur: ScaledBlur
    scale: Sequence[int]
    noise: RandomNoise
    jpeg: RandomJpeg
    camera: RandomCameraNoise
    last_jpeg: RandomJpeg
    modes: Sequence[str] = ("bilinear", "bicubic", "area")
    halve_prob: float = 0.25
    resize_prob: float = 0.75
    sigma: Sequence[float] = (0.1, 0.6)

    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        scale, (height, width) = int(rng.choice(self.scale)), size
        if scale == 4 and rng.random() < self.halve_prob:
            scale, height, width = 2, max(height // 2, 1), max(width // 2, 1)
            yield Resize(height, width, "antialiased" if rng.random() < 0.5 else self._mode(rng))
            yield Clip()
        downsamplings = iter((self._shrink(height, width, scale, rng), self._fit(height // scale, width // scale, rng)))
        for stage in rng.permutation(("blur", "blur", "downsample", "downsample", "noise", "jpeg", "camera")):
            if stage == "downsample":
                yield from next(downsamplings)
            elif stage == "blur":
                yield self.blur.draw(scale, rng)
            else:
                yield getattr(self, stage).draw(rng)
        yield self.last_jpeg.draw(rng)
        yield Resize(*size, "bicubic")

    def _shrink(self, height: int, width: int, scale: int, rng: np.random.Generator) -> Iterator[Step]:
        if rng.random() < self.resize_prob:
            factor = rng.uniform(1, 2 * scale)
            yield Resize(int(height / factor), int(width / factor), self._mode(rng))
        else:
            yield Blur(shifted_gaussian(25, rng.uniform(self.sigma[0], self.sigma[1] * scale), (scale - 1) / 2))
            yield Subsample(scale)
        yield Clip()

    def _fit(self, height: int, width: int, rng: np.random.Generator) -> Iterator[Step]:
        yield Resize(height, width, self._mode(rng))
        yield Clip()

    def _mode(self, rng: np.random.Generator) -> str:
        return str(rng.choice(self.modes))


@dataclass(frozen=True)
class Mixture(Recipe):
    """Each image goes through one recipe, drawn at random.

    Args:
        recipes: degradations.
        probs: probability of each; they add up to 1.
    """

    recipes: Sequence[Recipe]
    probs: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.recipes) != len(self.probs):
            raise ValueError(f"{len(self.recipes)} recipes but {len(self.probs)} probs; one of each")

    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        yield from self.recipes[rng.choice(len(self.recipes), p=self.probs)].steps(size, rng)
