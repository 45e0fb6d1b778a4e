"""Recipes on the accelerator: a batch of images, each with parameters of its own."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from diffbir.dataset.degradations.blur import Blur
from diffbir.dataset.degradations.camera import CameraNoise
from diffbir.dataset.degradations.jpeg import Jpeg
from diffbir.dataset.degradations.jpeg_torch import jpeg_batch
from diffbir.dataset.degradations.noise import CorrelatedNoise, GaussianNoise, PoissonNoise
from diffbir.dataset.degradations.recipes import Clip, Recipe
from diffbir.dataset.degradations.resize import TORCH, Resize, Subsample

GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Batched:
    """Applies a recipe to a batch: same steps, same distribution as for single images.

    Every image draws its parameters from its own NumPy generator, through the recipe itself. Steps then run in torch
    on the batch's device, images of the same size that are due the same kind of step together. The noise is torch's,
    from one generator per image, so a seed gives the same result on the same kind of device whatever else is in the
    batch (to rounding), but other noise than the recipe called for a single image.
    """

    recipe: Recipe

    def __call__(self, hq: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        """hq: (B, 3, H, W) float32 in [0, 1]; rngs: B generators. Returns lq like hq, of 8-bit values."""
        if len(hq) != len(rngs):
            raise ValueError(f"{len(hq)} images but {len(rngs)} generators; one of each")
        generators = [Generator(hq.device).manual_seed(int(rng.integers(2**63))) for rng in rngs]
        streams = [self.recipe.steps(tuple(hq.shape[-2:]), rng) for rng in rngs]
        images = list(hq.split(1))
        # In half precision a JPEG's coefficients would be far off.
        with torch.autocast(hq.device.type, enabled=False):
            for steps in zip_longest(*streams):
                groups = defaultdict(list)
                for i, step in enumerate(steps):
                    if step is not None:
                        same = step if isinstance(step, (Resize, Subsample)) else type(step)
                        groups[same, images[i].shape].append(i)
                for members in groups.values():
                    x = torch.cat([images[i] for i in members])
                    drawn = [steps[i] for i in members]
                    x = BATCHED[type(drawn[0])](x, drawn, [generators[i] for i in members])
                    for i, image in zip(members, x.split(1), strict=True):
                        images[i] = image
        return (torch.cat(images).clamp(0, 1) * 255).round() / 255


# Each of the following does to (B, 3, H, W) what the step of that name does to one image; it takes B steps and B
# generators.


def blur(x: Tensor, steps: Sequence[Blur], generators: Sequence[Generator]) -> Tensor:
    """By FFT, kernels padded with zeros to the largest: its cost does not grow with the kernel."""
    kernels = [step.kernel.astype(np.float32) for step in steps]
    size = max(len(k) for k in kernels)
    stacked = np.stack([np.pad(k, (size - len(k)) // 2) for k in kernels])
    height, width = x.shape[-2:]
    padded = reflect(reflect(x, size // 2, -1), size // 2, -2)
    fft_size = [-(-n // 32) * 32 for n in padded.shape[-2:]]  # of small factors only
    kernel = torch.from_numpy(stacked)[:, None].to(x.device)
    spectrum = torch.fft.rfft2(padded, fft_size) * torch.fft.rfft2(kernel, fft_size).conj()
    return torch.fft.irfft2(spectrum, fft_size)[..., :height, :width].contiguous()


def reflect(x: Tensor, margin: int, dim: int) -> Tensor:
    """Pads by reflection about the border pixels, as often as it takes (`F.pad` demands margin < size)."""
    n = x.shape[dim]
    i = torch.arange(-margin, n + margin, device=x.device) % max(2 * n - 2, 1)
    return x.index_select(dim, torch.minimum(i, 2 * n - 2 - i))


def resize(x: Tensor, steps: Sequence[Resize], generators: Sequence[Generator]) -> Tensor:
    """All to the same size in the same mode."""
    size, mode = (max(steps[0].height, 1), max(steps[0].width, 1)), steps[0].mode
    if mode == "area":
        enlarge = any(new > old for new, old in zip(size, x.shape[-2:], strict=True))
        rows, columns = (area_weights(old, new, enlarge).to(x) for old, new in zip(x.shape[-2:], size, strict=True))
        return rows @ x @ columns.T
    if mode in TORCH:
        return F.interpolate(x, size, **TORCH[mode])
    return F.interpolate(x, size, mode=mode, align_corners=None if mode == "nearest" else False)


def area_weights(old: int, new: int, enlarge: bool) -> Tensor:
    """(new, old) weights of OpenCV's area mode along one axis.

    Shrinking averages what a new pixel covers. When either axis grows, both interpolate, but only across the border of
    two old pixels, in proportion to what the new one covers of each.
    """
    left = torch.arange(new, dtype=torch.float64)[:, None] * old / new
    pixel = torch.arange(old, dtype=torch.float64)
    if not enlarge:
        covered = torch.minimum(left + old / new, pixel + 1) - torch.maximum(left, pixel)
        return covered.clamp(min=0) * new / old
    first = left.floor()
    second = torch.arange(1, new + 1, dtype=torch.float64)[:, None] - (first + 1) * new / old
    second = torch.where(second <= 0, 0, second - second.floor())
    return (pixel == first) * (1 - second) + (pixel == (first + 1).clamp(max=old - 1)) * second


def subsample(x: Tensor, steps: Sequence[Subsample], generators: Sequence[Generator]) -> Tensor:
    """All by the same factor."""
    return x[..., :: steps[0].factor, :: steps[0].factor].contiguous()


def normal(x: Tensor, generators: Sequence[Generator]) -> Tensor:
    """N(0, 1) of x's shape, each image from its own generator."""
    return torch.stack([torch.randn(x.shape[1:], generator=g, device=x.device) for g in generators])


def column(x: Tensor, values: Sequence[float]) -> Tensor:
    """(B, 1, 1, 1) of one value per image."""
    return x.new_tensor(values)[:, None, None, None]


def grey(x: Tensor) -> Tensor:
    return (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)


def gaussian_noise(x: Tensor, steps: Sequence[GaussianNoise], generators: Sequence[Generator]) -> Tensor:
    noise = normal(x, generators)
    noise = torch.where(column(x, [step.grey for step in steps]) > 0, noise[:, :1], noise)
    return (x + noise * column(x, [step.sigma / 255 for step in steps])).clamp(0, 1)


def correlated_noise(x: Tensor, steps: Sequence[CorrelatedNoise], generators: Sequence[Generator]) -> Tensor:
    mix = x.new_tensor(np.stack([step.mix for step in steps]) / 255)
    return (x + torch.einsum("bij,bjhw->bihw", mix, normal(x, generators))).clamp(0, 1)


def poisson_noise(x: Tensor, steps: Sequence[PoissonNoise], generators: Sequence[Generator]) -> Tensor:
    return torch.cat([poisson(x[i : i + 1], s, g) for i, (s, g) in enumerate(zip(steps, generators, strict=True))])


def poisson(x: Tensor, step: PoissonNoise, generator: Generator) -> Tensor:
    source = ((grey(x) if step.grey else x) * 255).round().clamp(0, 255)
    # All on the device: asking for the number of levels would wait for it.
    levels = torch.zeros(256, device=x.device).index_fill(0, source.long().flatten(), 1).sum()
    powers = 2.0 ** torch.arange(1, 9, device=x.device)
    photons = powers[torch.searchsorted(powers, levels)]
    source = source / 255
    noise = torch.poisson(source * photons, generator=generator) / photons - source
    return (x + noise * step.scale).clamp(0, 1)


def camera_noise(x: Tensor, steps: Sequence[CameraNoise], generators: Sequence[Generator]) -> Tensor:
    return torch.stack([step.apply(*pair) for step, *pair in zip(steps, x, normal(x, generators), strict=True)])


def jpeg(x: Tensor, steps: Sequence[Jpeg], generators: Sequence[Generator]) -> Tensor:
    return jpeg_batch(x, torch.tensor([step.quality for step in steps], device=x.device))


def clip(x: Tensor, steps: Sequence[Clip], generators: Sequence[Generator]) -> Tensor:
    return x.clamp(0, 1)


BATCHED = {
    Blur: blur,
    Resize: resize,
    Subsample: subsample,
    GaussianNoise: gaussian_noise,
    CorrelatedNoise: correlated_noise,
    PoissonNoise: poisson_noise,
    CameraNoise: camera_noise,
    Jpeg: jpeg,
    Clip: clip,
}
