from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from scipy import stats
from skimage import data
from torch import Generator, Tensor
from torch.testing import assert_close

from diffbir.dataset.degradations.batched import BATCHED, Batched, reflect
from diffbir.dataset.degradations.blur import Blur
from diffbir.dataset.degradations.camera import CameraNoise
from diffbir.dataset.degradations.jpeg import Jpeg
from diffbir.dataset.degradations.kernels import gaussian, sinc
from diffbir.dataset.degradations.noise import CorrelatedNoise, GaussianNoise, PoissonNoise
from diffbir.dataset.degradations.recipes import Clip, Recipe, Step
from diffbir.dataset.degradations.resize import Resize, Subsample
from diffbir.utils.config import instantiate, load_config

NAMES = ("classical", "codeformer", "codeformer_face", "realesrgan", "bsrgan", "mini")
# A right implementation fails a statistical test below with this probability, over all seeds; the seeds are fixed.
ERROR = 1e-4


def recipe(name: str) -> Any:
    return instantiate(load_config(f"configs/dataset/{name}.yaml").degradation, "degradation")


def rngs(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


def generators(n: int) -> list[Generator]:
    return [Generator().manual_seed(i) for i in range(n)]


def to_tensor(image: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]


def to_array(x: Tensor) -> NDArray:
    return x[0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def photo() -> NDArray:
    """(64, 96, 3) float32 in [0, 1]."""
    return data.astronaut()[60:124, 180:276].astype(np.float32) / 255


# Steps without noise compute what they compute for single images


@pytest.mark.parametrize("size", [(64, 96), (1, 1), (5, 30), (33, 47)])
def test_blur_filters_every_image_with_its_own_kernel(photo, size):
    image = np.ascontiguousarray(photo[: size[0], : size[1]])
    steps = [Blur(gaussian(21, 4, 1, 0.7)), Blur(sinc(7, 1.5)), Blur(np.pad([[0.0, 0, 1]], ((1, 1), (0, 0))))]
    blurred = BATCHED[Blur](to_tensor(image).expand(3, -1, -1, -1), steps, generators(3))
    for i, step in enumerate(steps):
        assert_allclose(to_array(blurred[i : i + 1]), step(image, None), rtol=0, atol=3e-6)


@pytest.mark.parametrize("n, margin", [(1, 3), (2, 5), (5, 4), (5, 20), (40, 10)])
def test_reflection_is_numpys(n, margin):
    x = torch.arange(float(n))
    assert reflect(x, margin, 0).tolist() == np.pad(x.numpy(), margin, mode="reflect").tolist()


@pytest.mark.parametrize("mode", ["area", "adaptive", "bilinear", "bicubic", "antialiased", "nearest"])
@pytest.mark.parametrize(
    "size",
    [(64, 96), (16, 24), (23, 41), (63, 95), (100, 150), (128, 192), (64, 50), (70, 40), (65, 96), (1, 1), (0, 7)],
)
def test_resize_agrees_with_that_of_single_images(photo, mode, size):
    step = Resize(*size, mode)
    resized = BATCHED[Resize](to_tensor(photo).expand(2, -1, -1, -1), [step, step], generators(2))
    assert_allclose(to_array(resized[1:]), step(photo, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 100])
def test_subsampling_keeps_the_same_pixels(photo, factor):
    kept = BATCHED[Subsample](to_tensor(photo).expand(2, -1, -1, -1), [Subsample(factor)] * 2, generators(2))
    assert_allclose(to_array(kept[1:]), Subsample(factor)(photo, None), rtol=0, atol=0)


def test_jpeg_uses_the_quality_of_each_step(photo):
    compressed = BATCHED[Jpeg](to_tensor(photo).expand(2, -1, -1, -1), [Jpeg(20), Jpeg(90)], generators(2))
    for i, quality in enumerate((20, 90)):
        assert np.abs(to_array(compressed[i : i + 1]) - Jpeg(quality)(photo, None)).mean() < 1 / 255


# Noise has the distribution that it has for single images


@pytest.mark.parametrize(
    "step",
    [
        GaussianNoise(15.0, False),
        GaussianNoise(15.0, True),
        CorrelatedNoise(np.array([[10.0, 5, 0], [0, 8, 0], [3, 0, 12]])),
        PoissonNoise(0.3, False),
        PoissonNoise(0.3, True),
        CameraNoise((2.0, 1.2, 1.7), 0.2, 0.001, 1e-5),
    ],
    ids=lambda step: f"{type(step).__name__} {getattr(step, 'grey', '')}",
)
def test_noise_has_the_same_moments_as_on_single_images(step):
    """Sample covariances of two runs of n pixels each differ by at most z deviations: 6 entries, 3 means, 2 colours.

    Neighbouring pixels of camera noise are correlated; only every fourth pixel each way is compared.
    """
    image = np.full((400, 400, 3), (0.3, 0.5, 0.6), np.float32)
    image[200:] = (0.6, 0.4, 0.45)
    single = step(image, np.random.default_rng(0)) - image
    other, again = (BATCHED[type(step)](to_tensor(image).expand(2, -1, -1, -1), [step] * 2, generators(2))).split(1)
    assert not torch.equal(other, again)
    z = stats.norm.isf(ERROR / 18 / 2)
    for rows in (slice(0, 200, 4), slice(200, None, 4)):
        a = single[rows, ::4].reshape(-1, 3).astype(np.float64)
        b = (to_array(other) - image)[rows, ::4].reshape(-1, 3).astype(np.float64)
        c_a, c_b, n = np.cov(a.T), np.cov(b.T), len(a)
        deviation = np.sqrt(2 * (np.outer(np.diag(c_a), np.diag(c_a)) + c_a**2) / n)
        assert (np.abs(c_a - c_b) < z * deviation).all()
        assert (np.abs(a.mean(0) - b.mean(0)) < z * np.sqrt(2 * np.diag(c_a) / n)).all()


@pytest.mark.parametrize("levels, photons", [(2, 2), (5, 8), (16, 16), (17, 32), (120, 128)])
def test_poisson_noise_counts_the_grey_levels_of_each_image(levels, photons):
    """var = scale^2 * value / photons, whatever else is in the batch.

    The mean square over n pixels has a relative deviation of about (2 / n)^0.5, more for rare photons.
    """
    values = torch.arange(1.0, levels + 1) / 255
    x = values.repeat_interleave(120000 // levels).reshape(1, 1, 1, -1).expand(1, 3, -1, -1)
    x = x + (120 - levels) / 255  # all of about the same brightness, far from white
    pair = torch.cat([x, torch.full_like(x, 0.5)])
    noisy = BATCHED[PoissonNoise](pair, [PoissonNoise(0.02, False)] * 2, generators(2))
    expected = x.double().mean() / photons * 0.02**2
    assert_close(((noisy[:1] - x).double() ** 2).mean(), expected, rtol=12 * (2 / x.numel()) ** 0.5, atol=0)


# Whole recipes


class Fixed(Recipe):
    """One list of steps per image, by the number that its generator gives."""

    def __init__(self, *plans: list[Step | None]):
        self.plans = plans

    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        yield from self.plans[rng.bit_generator.seed_seq.entropy]


def test_without_noise_the_batch_is_the_single_images(photo):
    """Steps of different kinds, sizes, orders and numbers side by side."""
    blur, back = Blur(gaussian(13, 2, 2)), Resize(64, 96, "bicubic")
    fixed = Fixed(
        [blur, Resize(30, 40, "area"), Clip(), back],
        [None, Resize(16, 24, "bilinear"), Blur(sinc(9, 1.3)), Clip(), back],
        [Resize(30, 40, "area"), blur, None, back],
        [],
    )
    lq = Batched(fixed)(to_tensor(photo).expand(4, -1, -1, -1), rngs(0, 1, 2, 3))
    for i in range(4):
        # A value near the middle of two levels may round either way.
        difference = np.abs(to_array(lq[i : i + 1]) - fixed(photo, rngs(i)[0]))
        assert difference.max() < 1.01 / 255
        assert (difference > 1e-6).mean() < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_8_bit_values_of_its_own_parameters(name, photo):
    hq = to_tensor(photo).repeat(6, 1, 1, 1)
    before = hq.clone()
    lq = Batched(recipe(name))(hq, rngs(*range(6)))
    assert lq.shape == hq.shape and lq.dtype == torch.float32
    assert lq.min() >= 0 and lq.max() <= 1
    assert_close(lq * 255, (lq * 255).round(), rtol=0, atol=1e-4)
    assert len({image.numpy().tobytes() for image in lq}) == 6
    assert torch.equal(hq, before)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_on_its_generator_and_not_on_its_neighbours(name, photo):
    hq = to_tensor(photo)
    degrade = Batched(recipe(name))
    lq = degrade(hq.repeat(4, 1, 1, 1), rngs(0, 1, 2, 3))
    assert torch.equal(degrade(hq.repeat(4, 1, 1, 1), rngs(0, 1, 2, 3)), lq)
    for i in (1, 3):
        # Rounding differs with the size of the transforms and may move a value to the next level, or a coefficient
        # of a JPEG to its next multiple.
        assert (degrade(hq, rngs(i)) - lq[i : i + 1]).abs().mean() < 0.05 / 255


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_single_images_are_degraded_alike(name, photo):
    """Mean error of 60 images each way, by Kolmogorov and Smirnov: the distributions may not be told apart."""
    degrade, image, n = recipe(name), np.ascontiguousarray(photo[:48, :48]), 60
    singles = [np.abs(degrade(image, rng) - image).mean() for rng in rngs(*range(n))]
    hq = to_tensor(image).repeat(n, 1, 1, 1)
    batch = (Batched(degrade)(hq, rngs(*range(n, 2 * n))) - hq).abs().mean((1, 2, 3)).tolist()
    assert stats.ks_2samp(singles, batch).pvalue > ERROR


@pytest.mark.parametrize("size", [(1, 1), (9, 70)])
@pytest.mark.parametrize("name", NAMES)
def test_small_images_pass(name, size):
    hq = torch.rand(8, 3, *size, generator=Generator().manual_seed(0))
    lq = Batched(recipe(name))(hq, rngs(*range(8)))
    assert lq.shape == hq.shape
    assert lq.isfinite().all()


def test_every_step_of_every_recipe_has_its_batched_counterpart():
    recipes = [recipe(name) for name in NAMES]
    kinds = {type(s) for r in recipes for rng in rngs(*range(40)) for s in r.steps((64, 64), rng)}
    assert kinds - {type(None)} == set(BATCHED)


def test_half_precision_around_it_changes_nothing(photo):
    hq, degrade = to_tensor(photo).repeat(2, 1, 1, 1), Batched(recipe("realesrgan"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lq = degrade(hq, rngs(0, 1))
    assert torch.equal(lq, degrade(hq, rngs(0, 1)))


def test_one_generator_per_image_is_asked_for(photo):
    with pytest.raises(ValueError, match="2 images but 1 generators"):
        Batched(recipe("classical"))(to_tensor(photo).repeat(2, 1, 1, 1), rngs(0))
