import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image
from scipy import interpolate, linalg, stats
from skimage import data

from diffbir.dataset.degradations.blur import Blur, RandomBlur
from diffbir.dataset.degradations.camera import CameraNoise, RandomCameraNoise, demosaic
from diffbir.dataset.degradations.jpeg import Jpeg, RandomJpeg, jpeg
from diffbir.dataset.degradations.kernels import shifted_gaussian
from diffbir.dataset.degradations.noise import (
    CorrelatedNoise,
    GaussianNoise,
    RandomNoise,
    correlated_noise,
    gaussian_noise,
    photon_counts,
    poisson_noise,
    random_mix,
)
from diffbir.dataset.degradations.recipes import (
    BSRGAN,
    Classical,
    Clip,
    FirstOrder,
    Mixture,
    SecondOrder,
    Step,
    round_to_8_bits,
)
from diffbir.dataset.degradations.resize import RandomResize, Resize, Subsample, resize
from diffbir.utils.config import instantiate, load_config

RECIPES = ("classical", "codeformer", "codeformer_face", "realesrgan", "bsrgan")
# A right implementation fails a statistical test below with this probability, over all seeds; the seeds are fixed.
ERROR = 1e-4


def recipe(name: str) -> Any:
    return instantiate(load_config(f"configs/dataset/{name}.yaml").degradation, "degradation")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def photo() -> NDArray:
    """(96, 128, 3) float32 in [0, 1]."""
    return data.astronaut()[40:136, 160:288].astype(np.float32) / 255


# Noise


def assert_deviation(samples: NDArray, sigma: float) -> None:
    """Mean 0 and the given deviation, within what n independent normal samples allow."""
    z = stats.norm.isf(ERROR / 2)
    assert abs(samples.mean()) < z * sigma / samples.size**0.5
    assert abs(samples.std() / sigma - 1) < z / (2 * samples.size) ** 0.5


@pytest.mark.parametrize("sigma", [1.0, 15.0, 30.0])
@pytest.mark.parametrize("grey", [False, True])
def test_gaussian_noise_has_the_stated_deviation_on_a_scale_of_255(sigma, grey):
    image = np.full((512, 512, 3), 0.5, np.float32)
    noise = gaussian_noise(image, sigma, grey, rng()) - image
    assert noise.dtype == np.float32
    for channel in range(3):
        assert_deviation(noise[..., channel].astype(np.float64), sigma / 255)


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_grey_noise_is_the_same_in_all_channels_and_coloured_noise_is_not(kind):
    image = np.full((128, 128, 3), (0.2, 0.4, 0.6), np.float32)

    def noise(grey: bool) -> NDArray:
        if kind == "gaussian":
            return gaussian_noise(image, 20, grey, rng()) - image
        return poisson_noise(image, 0.1, grey, rng()) - image

    grey, coloured = noise(True), noise(False)
    assert_allclose(grey[..., 1:], grey[..., :1].repeat(2, axis=2), rtol=0, atol=1e-6)
    assert grey.std() > 0.01
    correlation = np.corrcoef(coloured.reshape(-1, 3).T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < stats.norm.isf(ERROR / 6) / 128


@pytest.mark.parametrize("levels, photons", [(1, 2), (2, 2), (5, 8), (16, 16), (17, 32), (256, 256)])
def test_poisson_noise_has_the_variance_of_a_photon_count(levels, photons):
    """var = scale^2 * value / photons, photons being the number of grey levels rounded up to a power of two."""
    values = np.linspace(255 // levels, 255, levels).round() if levels < 256 else np.arange(256)
    image = np.tile(values[:, None, None] / 255, (1, 4000 if levels < 256 else 500, 3)).astype(np.float32)
    scale = 0.5
    noise = (poisson_noise(image, scale, False, rng()) - image).astype(np.float64) / scale
    for channel in range(3):
        assert_allclose(noise[..., channel].mean(), 0, atol=5 * (0.5 / photons / noise[..., 0].size) ** 0.5)
        # The mean square over all pixels has a relative deviation of about (2 / n)^0.5, a bit more for rare photons.
        expected = (values / 255).mean() / photons
        assert_allclose((noise[..., channel] ** 2).mean(), expected, rtol=8 * (2 / noise[..., 0].size) ** 0.5)


@pytest.mark.parametrize("photons", [2, 16, 256])
@pytest.mark.parametrize("level", [0, 1, 100, 255])
def test_photon_counts_are_poisson_distributed(photons, level):
    """By chi-square over all counts of which at least five are expected, the rest together."""
    n, mean = 200_000, level / 255 * photons
    counts = photon_counts(np.full(n, level, np.uint8), photons, rng())
    if level == 0:
        assert not counts.any()
        return
    expected = n * stats.poisson.pmf(np.arange(3 * photons + 20), mean)
    seen = np.bincount(counts, minlength=len(expected))
    common = expected >= 5
    observed = [*seen[common], n - seen[common].sum()]
    assert stats.chisquare(observed, [*expected[common], n - expected[common].sum()]).pvalue > ERROR


def test_poisson_noise_grows_with_brightness():
    """Of one image whose levels stay the same, so the photons do: variances in proportion to the values."""
    values = np.array([0, 51, 102, 204]) / 255  # four levels, four photons
    image = np.tile(values[:, None, None], (1, 20000, 3)).astype(np.float32)
    noise = (poisson_noise(image, 1.0, False, rng()) - image).astype(np.float64)
    assert_allclose(noise.var(axis=(1, 2)), values / 4, rtol=0.04)
    assert_allclose(noise[0], 0, atol=1e-7)


def test_grey_poisson_noise_follows_the_luma():
    colour = np.array([230, 51, 26]) / 255
    image = np.tile(colour, (200, 200, 1)).astype(np.float32)
    noise = (poisson_noise(image, 1.0, True, rng()) - image).astype(np.float64)
    luma = round(colour @ [0.299, 0.587, 0.114] * 255) / 255
    assert_allclose(noise[..., 0].var(), luma / 2, rtol=8 * (2 / 200**2) ** 0.5)


def test_random_noise_draws_its_kinds_and_strengths_as_stated(photo):
    """Poisson noise on black is none, so that a black corner tells the kinds apart."""
    image = photo[:48, :48] * 0.5 + 0.25
    image[:4, :4] = 0
    noise = RandomNoise(sigma=(5, 10), poisson_scale=(0.5, 1), gaussian_prob=0.7, grey_prob=0.4)
    gauss = grey = 0
    generator, n = rng(), 500
    for _ in range(n):
        added = noise(image, generator) - image
        gauss += bool(added[:4, :4].any())
        grey += bool(np.ptp(added[10:], axis=2).max() < 1e-5)
    assert stats.binomtest(gauss, n, 0.7).pvalue > ERROR
    assert stats.binomtest(grey, n, 0.4).pvalue > ERROR


def test_random_noise_stays_in_range_and_keeps_the_type(photo):
    noisy = RandomNoise(sigma=(100, 100))(photo, rng())
    assert noisy.dtype == np.float32
    assert (noisy.min(), noisy.max()) == (0, 1)


def test_correlated_noise_has_the_covariance_of_its_mixing_matrix():
    """Each entry of a sample covariance of n normal vectors deviates by ((c_ii c_jj + c_ij^2) / n)^0.5."""
    mix = np.array([[20.0, 5, 0], [-3, 10, 4], [0, 2, 15]])
    image = np.full((400, 400, 3), 0.5, np.float32)
    noise = (correlated_noise(image, mix, rng()) - image).astype(np.float64).reshape(-1, 3) * 255
    expected = mix @ mix.T
    deviation = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / len(noise))
    assert (np.abs(np.cov(noise.T) - expected) < stats.norm.isf(ERROR / 12) * deviation).all()


def test_random_noise_draws_correlated_noise_as_often_as_stated_and_of_the_highest_level():
    """Uniform variances have mean 1/2, so the trace of the covariance is 3/2 sigma^2 on average, whatever was drawn."""
    noise = RandomNoise(sigma=(0, 10), grey_prob=0.4, correlated_prob=0.2)
    generator, n = rng(), 4000
    drawn = [noise.draw(generator) for _ in range(n)]
    correlated = [step.mix for step in drawn if isinstance(step, CorrelatedNoise)]
    grey = sum(isinstance(step, GaussianNoise) and step.grey for step in drawn)
    expected = [0.2 * n, 0.4 * n, 0.4 * n]
    assert stats.chisquare([len(correlated), grey, n - len(correlated) - grey], expected).pvalue > ERROR
    traces = np.array([np.trace(covariance_of(mix)) for mix in correlated]) / 100
    # Of a covariance whose entries lost their signs, negative eigenvalues add to the trace; that is rare and little.
    assert abs(traces.mean() - 1.5) < stats.norm.isf(ERROR / 2) * (3 / 12 / len(traces)) ** 0.5 + 0.02
    assert stats.kstest(traces, lambda x: sum_of_three_uniforms(x)).pvalue > ERROR


def covariance_of(mix: NDArray) -> NDArray:
    return mix @ mix.T


def sum_of_three_uniforms(x: NDArray) -> NDArray:
    """Distribution function (Irwin and Hall)."""
    x = np.clip(x, 0, 3)
    return (x**3 - 3 * np.clip(x - 1, 0, None) ** 3 + 3 * np.clip(x - 2, 0, None) ** 3) / 6


def test_correlated_noise_has_the_covariance_of_the_published_code():
    """`np.random.multivariate_normal` of |U^T D U|, U of the same draws: covariances within what 4e5 samples allow."""
    for seed in range(4):
        generator = rng(seed)
        u = linalg.orth(generator.random((3, 3)))
        published = np.abs(u.T @ np.diag(generator.random(3)) @ u)
        samples = rng(9).multivariate_normal(np.zeros(3), published, 400_000, check_valid="ignore", method="svd")
        mix = random_mix(rng(seed))
        assert_allclose(covariance_of(mix), np.cov(samples.T), rtol=0, atol=6 * (2 / 400_000) ** 0.5)
        assert covariance_of(mix).min() > -0.05


def test_probabilities_of_noise_that_exceed_one_are_refused():
    with pytest.raises(ValueError, match="more than 1"):
        RandomNoise(sigma=(1, 2), grey_prob=0.6, correlated_prob=0.5)


# Camera noise

CAMERA = CameraNoise(gains=(2.4, 1.2, 1.9), crosstalk=0.3, shot=0.01, read=1e-4)


def test_developing_undoes_unprocessing(photo):
    x = torch.from_numpy(photo).movedim(-1, 0)
    torch.testing.assert_close(CAMERA.process(CAMERA.unprocess(x)), x, rtol=0, atol=2e-5)


def test_unprocessing_a_grey_follows_the_formulas():
    """Tone curve and gamma inverted by hand for one value; grey has no crosstalk, so channels differ by gains alone."""
    linear = 0.18
    srgb = 1.055 * linear ** (1 / 2.4) - 0.055
    raw = CAMERA.unprocess(torch.full((3, 1, 1), 3 * srgb**2 - 2 * srgb**3))
    assert_allclose(raw.flatten().numpy() * CAMERA.gains, linear, rtol=1e-5)


def test_camera_noise_has_the_shot_and_read_variance_on_the_raw_image():
    """Noise small enough for the development to be linear, at pixels where the mosaic has the colour itself."""
    camera = CameraNoise((1.0, 1.0, 1.0), crosstalk=0.0, shot=4e-6, read=1e-6)
    for value in (0.3, 0.6):
        image = np.full((512, 512, 3), value, np.float32)
        x = torch.from_numpy(image[:2, :2]).movedim(-1, 0)
        raw = camera.unprocess(x)
        slope = (camera.process(raw + 1e-3) - camera.process(raw - 1e-3))[0, 0, 0] / 2e-3
        noise = (camera(image, rng()) - image)[::2, ::2, 0].astype(np.float64)
        assert_deviation(noise, float(slope * (4e-6 * raw[0, 0, 0] + 1e-6) ** 0.5))


def test_demosaicing_keeps_measured_values_and_averages_the_nearest():
    """Of linear ramps the averages are exact, away from the border."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    ramps = torch.stack([x + 2 * y, 3 * x - y, 5 - x])
    torch.testing.assert_close(demosaic(ramps)[:, 1:-1, 1:-1], ramps[:, 1:-1, 1:-1])
    raw = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    full = demosaic(raw)
    assert full[0, 2, 2] == raw[0, 2, 2] and full[1, 2, 3] == raw[1, 2, 3] and full[2, 3, 3] == raw[2, 3, 3]
    torch.testing.assert_close(full[0, 2, 3], (raw[0, 2, 2] + raw[0, 2, 4]) / 2)
    torch.testing.assert_close(full[1, 2, 2], (raw[1, 1, 2] + raw[1, 3, 2] + raw[1, 2, 1] + raw[1, 2, 3]) / 4)
    torch.testing.assert_close(full[2, 2, 2], raw[2, 1:4:2, 1:4:2].mean())


def test_camera_noise_is_coarser_than_a_pixel_and_stays_in_range(photo):
    grey = np.full((256, 256, 3), 0.5, np.float32)
    red = (CAMERA(grey, rng()) - 0.5)[..., 0]
    assert np.corrcoef(red[:, 1:].ravel(), red[:, :-1].ravel())[0, 1] > 0.3
    noisy = CAMERA(photo, rng())
    assert noisy.dtype == np.float32
    assert 0 <= noisy.min() <= noisy.max() <= 1


def test_random_cameras_fill_their_ranges():
    cameras = RandomCameraNoise(prob=0.25)
    generator, n = rng(), 4000
    drawn = [camera for camera in (cameras.draw(generator) for _ in range(n)) if camera]
    assert stats.binomtest(len(drawn), n, 0.25).pvalue > ERROR
    red, green, blue = np.array([camera.gains for camera in drawn]).T
    log_shot = np.log([camera.shot for camera in drawn])
    for values, low, high in [
        (red / green, 1.9, 2.4),
        (green, 1.0, 1.6),
        (blue / green, 1.5, 1.9),
        ([camera.crosstalk for camera in drawn], 0.1, 0.4),
        (log_shot, np.log(1e-4), np.log(1.2e-2)),
    ]:
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > ERROR
    residual = np.log([camera.read for camera in drawn]) - (2.18 * log_shot + 1.2)
    assert stats.kstest(residual, stats.norm(0, 0.26).cdf).pvalue > ERROR


# Resizing


@pytest.mark.parametrize("size", [(48, 64), (57, 201), (13, 300), (96, 128), (1, 1)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resize_agrees_with_torch_without_antialiasing(photo, mode, size):
    """Both align pixel centres and take a = -0.75 for bicubic."""
    x = torch.from_numpy(photo).permute(2, 0, 1)[None]
    expected = F.interpolate(x, size, mode=mode, align_corners=False, antialias=False)[0].permute(1, 2, 0)
    resized = resize(photo, *size, mode)
    assert resized.dtype == np.float32
    assert_allclose(resized, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 64), (57, 201), (13, 300), (96, 128), (1, 1)])
@pytest.mark.parametrize(
    "mode, of_torch",
    [("adaptive", {"mode": "area"}), ("antialiased", {"mode": "bicubic", "align_corners": False, "antialias": True})],
)
def test_some_modes_are_those_of_torch(photo, mode, of_torch, size):
    x = torch.from_numpy(photo).permute(2, 0, 1)[None]
    expected = F.interpolate(x, size, **of_torch)[0].permute(1, 2, 0)
    resized = resize(photo, *size, mode)
    assert resized.dtype == np.float32 and resized.flags.c_contiguous
    assert_allclose(resized, expected.numpy(), rtol=0, atol=1e-6)


def test_the_adaptive_average_is_of_all_pixels_that_are_touched():
    """5 to 2 pixels: the middle one belongs to both, with full weight; OpenCV takes half of it."""
    line = np.array([0, 1, 5, 1, 0], np.float32)[None, :, None].repeat(3, 2)
    assert_allclose(resize(line, 1, 2, "adaptive")[0, :, 0], [2, 2], atol=1e-6)
    assert_allclose(resize(line, 1, 2, "area")[0, :, 0], [1.4, 1.4], atol=1e-6)


def test_the_published_area_of_the_second_order_recipe_is_the_adaptive_average():
    degrade, generator = recipe("realesrgan"), rng()
    modes = {s.mode for _ in range(60) for s in degrade.steps((64, 64), generator) if isinstance(s, Resize)}
    assert modes == {"adaptive", "bilinear", "bicubic"}
    assert {RandomResize((0, 0, 1), (1, 1)).random_mode(generator) for _ in range(30)} == {
        "area",
        "bilinear",
        "bicubic",
    }


def test_area_resize_averages_blocks(photo):
    expected = photo.reshape(24, 4, 32, 4, 3).mean(axis=(1, 3))
    assert_allclose(resize(photo, 24, 32, "area"), expected, rtol=0, atol=1e-6)


def test_nearest_resize_repeats_pixels(photo):
    assert_array_equal(resize(photo, 192, 384, "nearest"), photo.repeat(2, axis=0).repeat(3, axis=1))


def test_no_size_falls_below_one_pixel(photo):
    assert resize(photo, 0, 5, "bilinear").shape == (1, 5, 3)
    assert resize(photo, 5, 0, "area").shape == (5, 1, 3)


def test_random_resize_draws_directions_factors_and_modes_as_stated():
    image = np.zeros((200, 100, 3), np.float32)
    random_resize = RandomResize(probs=(0.2, 0.7, 0.1), factor=(0.25, 1.5))
    generator, n = rng(), 1000
    heights = np.array([random_resize(image, generator).shape[0] for _ in range(n)])
    assert 50 <= heights.min() < 55
    assert 290 < heights.max() <= 300
    up, down = int((heights > 200).sum()), int((heights < 200).sum())
    # A factor within half a pixel of 1 counts as "keep": 0.5 / 100 of the ups and 0.5 / 150 of the downs.
    expected = np.array([0.2 * 0.995, 0.7 * (1 - 1 / 300), 0.1 + 0.001 + 0.7 / 300]) * n
    assert stats.chisquare([up, down, n - up - down], expected * n / expected.sum()).pvalue > ERROR
    assert stats.kstest(heights[heights < 199] / 200, stats.uniform(0.25, 0.75).cdf).pvalue > ERROR
    modes = [random_resize.random_mode(generator) for _ in range(n)]
    assert stats.chisquare([modes.count(m) for m in ("area", "bilinear", "bicubic")]).pvalue > ERROR


def test_random_resize_is_relative_to_the_base_if_one_is_given():
    image = np.zeros((200, 100, 3), np.float32)
    keep = RandomResize(probs=(0, 0, 1), factor=(0.5, 2))
    assert keep(image, rng()).shape == (200, 100, 3)
    assert keep(image, rng(), base=(30, 20)).shape == (30, 20, 3)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="lanczos"):
        RandomResize(probs=(0, 0, 1), factor=(1, 1), modes=("area", "lanczos"))


# JPEG


def pillow_jpeg(image: NDArray, quality: int, subsampling: str) -> NDArray:
    file = io.BytesIO()
    Image.fromarray(np.rint(image * 255).astype(np.uint8)).save(
        file, format="JPEG", quality=quality, subsampling=subsampling
    )
    return np.asarray(Image.open(file)).astype(np.float32) / 255


@pytest.mark.parametrize("quality", [10, 30, 75, 95])
def test_jpeg_agrees_with_pillow_at_the_same_quality(photo, quality):
    """Same tables, same 4:2:0; builds of libjpeg may differ in the inverse DCT and chroma upsampling by few levels.

    Half a level on average is far below the 1 to 2 levels by which 4:4:4 or five steps of quality would differ.
    """
    compressed = jpeg(photo, quality)
    expected = pillow_jpeg(photo, quality, "4:2:0")
    assert compressed.dtype == np.float32
    assert np.abs(compressed - expected).mean() < 0.5 / 255
    assert np.abs(compressed - expected).max() < 12 / 255
    assert np.abs(compressed - pillow_jpeg(photo, quality, "4:4:4")).mean() > 0.7 / 255


def test_jpeg_clips_and_rounds_before_it_compresses(photo):
    assert_array_equal(jpeg(3 * photo - 1, 50), jpeg(np.clip(3 * photo - 1, 0, 1), 50))
    assert_array_equal(jpeg(photo + 0.4 / 255, 50), jpeg(photo, 50))
    assert_allclose(jpeg(np.full((16, 16, 3), 100.6 / 255, np.float32), 100), 101 / 255, atol=1e-6)


def test_random_jpeg_draws_every_quality_of_the_range():
    image = rng().random((8, 8, 3), dtype=np.float32)
    of_quality = {jpeg(image, quality).tobytes(): quality for quality in range(100)}
    random_jpeg = RandomJpeg((30, 33))
    generator = rng()
    drawn = [of_quality[random_jpeg(image, generator).tobytes()] for _ in range(400)]
    assert stats.chisquare([drawn.count(quality) for quality in (30, 31, 32, 33)]).pvalue > ERROR


def test_random_jpeg_compresses_with_its_probability():
    random_jpeg = RandomJpeg((30, 95), prob=0.75)
    generator = rng()
    assert stats.binomtest(sum(random_jpeg.draw(generator) is not None for _ in range(1000)), 1000, 0.75).pvalue > ERROR


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_depends_on_the_seed_alone(name, photo):
    degrade = recipe(name)
    before = photo.copy()
    first = degrade(photo, rng(1))
    np.random.seed(5)  # what a global generator holds must not matter
    assert_array_equal(recipe(name)(photo, rng(1)), first)
    assert not np.array_equal(degrade(photo, rng(2)), first)
    assert_array_equal(photo, before, err_msg="the clean image was changed in place")


@pytest.mark.parametrize("size", [(8, 8), (33, 57), (96, 128), (1, 1)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_the_size_and_gives_8_bit_values(name, size, photo):
    degrade = recipe(name)
    for seed in range(12):
        lq = degrade(np.ascontiguousarray(photo[: size[0], : size[1]]), rng(seed))
        assert lq.shape == (*size, 3)
        assert lq.dtype == np.float32
        assert 0 <= lq.min() <= lq.max() <= 1
        assert_array_equal(lq, np.rint(lq * 255).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_degrades_and_keeps_the_colours(name, photo):
    """Noise is clipped and JPEG rounds, so colours may shift by a few per cent, but channels stay in order."""
    degrade = recipe(name)
    shift, error = [], []
    for seed in range(10):
        lq = degrade(photo, rng(seed))
        shift.append(lq.mean(axis=(0, 1)) - photo.mean(axis=(0, 1)))
        error.append(np.abs(lq - photo).mean())
    assert np.abs(np.mean(shift, axis=0)).max() < 0.03
    assert min(error) > 0.005
    assert np.ptp(photo.mean(axis=(0, 1))) > 0.06, "on a grey photo the order would not be seen"


def test_the_recipe_for_faces_keeps_what_it_does_not_change():
    face, general = recipe("codeformer_face"), recipe("codeformer")
    assert isinstance(face, FirstOrder)
    assert list(face.downsample) == [0.8, 8]
    assert list(face.jpeg.quality) == [60, 100]
    assert list(general.downsample) == [1, 12]
    assert list(face.blur.sizes) == list(general.blur.sizes) == [41, 41]
    assert dict(face.blur.kinds) == {"iso": 0.5, "aniso": 0.5}


def test_the_second_blur_of_the_second_order_recipe_differs_only_as_stated():
    degrade = recipe("realesrgan")
    assert isinstance(degrade, SecondOrder)
    assert degrade.blur_2.kinds == degrade.blur_1.kinds
    assert (list(degrade.blur_1.sigma), degrade.blur_1.prob) == ([0.2, 3], 1.0)
    assert (list(degrade.blur_2.sigma), degrade.blur_2.prob) == ([0.2, 1.5], 0.8)


NO_BLUR = RandomBlur((7, 7), {"iso": 1.0}, sigma=(1, 1), prob=0)


def test_the_first_order_is_blur_shrink_noise_compress_enlarge(photo):
    """Without blur and noise what remains can be written down."""
    degrade = FirstOrder(NO_BLUR, (3, 3), RandomNoise((0, 0)), RandomJpeg((60, 60)))
    expected = resize(jpeg(resize(photo, 32, 42, "bilinear"), 60), 96, 128, "bilinear")
    assert_array_equal(degrade(photo, rng()), round_to_8_bits(expected))


def test_noise_of_the_first_order_is_added_to_the_small_image():
    """Enlarged eightfold, it is smooth: neighbours hardly differ."""
    grey = np.full((128, 128, 3), 0.5, np.float32)
    noise = FirstOrder(NO_BLUR, (8, 8), RandomNoise((20, 20)), RandomJpeg((100, 100)))(grey, rng())[..., 1] - 0.5
    assert noise.std() > 10 / 255
    assert np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1] > 0.9


class Recorder:
    """Stands for any stage of a recipe and notes its turn and the height of the image."""

    def __init__(self, name: str, log: list[tuple[str, int]], scaled: bool = False):
        self.name, self.log, self.scaled = name, log, scaled

    def draw(self, *args: Any) -> Step:
        """A resize is asked with (base, rng), a scaled blur with (scale, rng), the others with (rng,)."""

        def step(image: NDArray, rng: np.random.Generator) -> NDArray:
            self.log.append((self.name, image.shape[0]))
            return resize(image, *args[0], "area") if len(args) == 2 and not self.scaled else image

        return step

    def random_mode(self, rng: np.random.Generator) -> str:
        return "area"


def test_the_first_order_runs_its_stages_in_order_and_on_the_small_image():
    log: list[tuple[str, int]] = []
    degrade = FirstOrder(Recorder("blur", log), (3, 3), Recorder("noise", log), Recorder("jpeg", log))
    assert degrade(np.zeros((96, 64, 3), np.float32), rng()).shape == (96, 64, 3)
    assert log == [("blur", 96), ("noise", 32), ("jpeg", 32)]


def test_the_second_order_runs_its_stages_in_order_and_ends_in_either_way():
    """Sizes: 96 at first, base 96 / scale after the second resize; half of the images are compressed last."""
    log: list[tuple[str, int]] = []
    names = ["blur_1", "resize_1", "noise_1", "jpeg_1", "blur_2", "resize_2", "noise_2", "jpeg_2", "sinc"]
    degrade = SecondOrder(**{name: Recorder(name, log) for name in names}, scale=(2, 4, 4))
    image, generator, n = np.zeros((96, 64, 3), np.float32), rng(), 400
    compressed_last, quarter = 0, 0
    for _ in range(n):
        log.clear()
        assert degrade(image, generator).shape == image.shape
        ran = [name for name, _ in log]
        assert ran[:7] == names[:7]
        assert sorted(ran[7:]) == ["jpeg_2", "sinc"]
        assert [height for _, height in log[:6]] == [96] * 6
        assert {height for _, height in log[6:]} in ({48}, {24})
        compressed_last += ran[-1] == "jpeg_2"
        quarter += log[-1][1] == 24
    assert stats.binomtest(compressed_last, n, 0.5).pvalue > ERROR
    assert stats.binomtest(quarter, n, 2 / 3).pvalue > ERROR


def test_the_classical_model_is_blur_shrink_noise(photo):
    degrade = Classical(NO_BLUR, (3,), RandomNoise((10, 10)), modes=("area",))
    generator = rng(4)
    generator.choice((3,)), generator.random(), generator.choice(("area",))  # scale, no blur, mode
    small = resize(photo, 32, 43, "area")
    expected = RandomNoise((10, 10))(small, generator)
    assert_array_equal(degrade(photo, rng(4)), round_to_8_bits(resize(expected, 96, 128, "bicubic")))


def test_bsrgan_shuffles_its_stages_and_closes_with_jpeg():
    """Every stage comes first equally often, the two blurs and downsamplings twice as often; noise meets any size."""
    log: list[tuple[str, int]] = []
    names = ["blur", "noise", "jpeg", "camera", "last_jpeg"]
    degrade = BSRGAN(**{name: Recorder(name, log) for name in names}, scale=(4,), halve_prob=0)
    degrade = replace(degrade, blur=Recorder("blur", log, scaled=True))
    image, generator, n = np.zeros((96, 64, 3), np.float32), rng(), 700
    first, heights = [], []
    for _ in range(n):
        log.clear()
        kinds = [type(step) for step in degrade.steps((96, 64), rng(0))]
        assert kinds.count(Clip) == 2
        assert degrade(image, generator).shape == image.shape
        assert sorted(name for name, _ in log) == sorted([*names, "blur"])
        assert log[-1] == ("last_jpeg", 24)
        first.append(log[0][0] if log[0][1] == 96 else "downsample")
        heights.append(dict(log)["noise"])
    expected = np.array([2, 1, 1, 1, 2]) / 7 * n  # a first downsampling that is no smaller than 96 counts as none: rare
    assert stats.chisquare([first.count(k) for k in (*names[:-1], "downsample")], expected).pvalue > ERROR
    # Noise comes before both downsamplings, between them or after, each a third of the time.
    between = sum(height not in (96, 24) for height in heights)
    assert stats.binomtest(heights.count(96), n, 1 / 3).pvalue > ERROR
    assert 0.15 < between / n < 1 / 3 and min(heights) < 24


def downsamplings(degrade: BSRGAN, size: tuple[int, int], n: int) -> list[list[Step]]:
    """Of n images: the steps that change the size, without the last one back, and the shifted blurs."""
    generator, found = rng(), []
    for _ in range(n):
        *steps, back = degrade.steps(size, generator)
        assert back == Resize(*size, "bicubic")
        kept = (Resize, Subsample)
        found.append([s for s in steps if isinstance(s, kept) or (isinstance(s, Blur) and len(s.kernel) == 25)])
    return found


def test_bsrgan_shrinks_by_chance_below_the_low_quality_size_and_then_fits_it():
    """As published: by 1 / U(1, 8) three times out of four, else every fourth pixel; then to a quarter."""
    degrade = replace(recipe("bsrgan"), halve_prob=0, blur=NarrowBlur())
    n, factors = 3000, []
    for *first, fit in downsamplings(degrade, (840, 420), n):
        assert (fit.height, fit.width) == (210, 105)
        if isinstance(first[-1], Subsample):
            blur, keep = first
            assert keep.factor == 4
            assert_allclose(blur.kernel.sum(0) @ np.arange(25) - 12, 1.5, atol=0.01)  # in the middle of four pixels
        else:
            (resize,) = first
            factors.append(840 / resize.height)
            assert abs(resize.width - resize.height / 2) <= 1
    assert stats.binomtest(len(factors), n, 0.75).pvalue > ERROR
    assert stats.kstest(factors, stats.uniform(1, 7).cdf).pvalue > ERROR
    assert np.mean(np.array(factors) > 4) > 0.5  # below the low-quality size


def test_bsrgan_halves_the_image_with_its_probability_and_goes_on_with_scale_2():
    degrade = replace(recipe("bsrgan"), blur=NarrowBlur())
    n, halved, antialiased, factors = 3000, 0, 0, []
    for steps in downsamplings(degrade, (840, 420), n):
        assert (steps[-1].height, steps[-1].width) == (210, 105)
        if len(resizes := [s for s in steps if isinstance(s, Resize)]) + (Subsample in map(type, steps)) == 2:
            continue
        assert (steps[0].height, steps[0].width) == (420, 210)
        halved += 1
        antialiased += steps[0].mode == "antialiased"
        if len(resizes) == 3:
            factors.append(420 / resizes[1].height)
        else:
            assert Subsample(2) in steps
    assert stats.binomtest(halved, n, 0.25).pvalue > ERROR
    assert stats.binomtest(antialiased, halved, 0.5).pvalue > ERROR
    assert stats.kstest(factors, stats.uniform(1, 3).cdf).pvalue > ERROR
    assert not [s for s in downsamplings(replace(degrade, scale=(2,)), (80, 40), 200) if len(s) > 3]


class NarrowBlur:
    """Stands for the blurs where those of the downsampling are looked for."""

    def draw(self, scale: float, rng: np.random.Generator) -> None:
        return None


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_every_nth_pixel_after_the_shifted_blur_stands_in_the_middle_of_its_block(scale):
    """Of a ramp, whose blurred values are those of the ramp itself, away from the border."""
    ramp = np.arange(120, dtype=np.float32)[None, :, None].repeat(120, 0).repeat(3, 2)
    ramp += 2 * ramp.transpose(1, 0, 2)
    small = Subsample(scale)(Blur(shifted_gaussian(25, 0.6 * scale, (scale - 1) / 2))(ramp, rng()), rng())
    expected = ramp[: 120 // scale * scale].reshape(120 // scale, scale, 120 // scale, scale, 3).mean((1, 3))
    inner = slice(20 // scale + 1, -(20 // scale + 1))
    assert_allclose(small[inner, inner], expected[inner, inner], rtol=0, atol=2e-3)


def test_the_shifted_kernel_is_that_of_the_published_code():
    """`fspecial` and `shift_pixel`, by SciPy's linear interpolation, mirrored: theirs is convolved, ours correlated."""
    for sigma, scale in ((0.1, 2), (0.7, 4), (2.4, 4)):
        axis = np.arange(25.0)
        square = np.exp(-((axis[:, None] - 12) ** 2 + (axis - 12) ** 2) / (2 * sigma**2))
        at = np.clip(axis + (scale - 1) / 2, 0, 24)
        moved = interpolate.RegularGridInterpolator((axis, axis), square)(np.stack(np.meshgrid(at, at), -1))
        published = moved / moved.sum()
        assert_allclose(shifted_gaussian(25, sigma, (scale - 1) / 2), published[::-1, ::-1], rtol=0, atol=1e-12)


def test_scaled_blurs_fill_their_ranges():
    """Half of them isotropic, of a uniform deviation up to 2 + 0.2 scale, half of uniform variances up to 4 + scale."""
    blur, generator, n = recipe("bsrgan").blur, rng(), 1500
    for scale, widest, variance in ((4, 2.8, 8), (2, 2.4, 6)):
        iso, axes, sizes = [], [], set()
        for _ in range(n):
            k = blur.draw(scale, generator).kernel
            sizes.add(len(k))
            if len(k) < 19:
                continue  # the widest do not fit in, so that their moments are too small
            axis = np.arange(len(k)) - len(k) // 2
            covariance = [[(k * axis**2).sum(), (k * axis[:, None] * axis).sum()], [0, (k.T * axis**2).sum()]]
            low, high = np.linalg.eigvalsh(covariance, UPLO="U")
            if high - low < 1e-6:
                iso.append(high**0.5)
            else:
                axes += [low, high]
        assert sizes == set(range(7, 26, 2))
        assert stats.binomtest(len(iso), len(iso) + len(axes) // 2, 0.5).pvalue > ERROR
        # Narrow kernels are a single pixel: below half a pixel their moments are not those of the Gaussian.
        wide = np.array(iso)[np.array(iso) > 0.6]
        assert stats.kstest(wide, stats.uniform(0.6, widest - 0.6).cdf).pvalue > ERROR
        wide = np.array(axes)[np.array(axes) > 0.5]
        assert stats.kstest(wide, stats.uniform(0.5, variance - 0.5).cdf).pvalue > ERROR


def test_a_mixture_draws_its_recipes_with_their_probabilities():
    mild = FirstOrder(NO_BLUR, (1, 1), RandomNoise((0, 0)), RandomJpeg((90, 90)))
    strong = FirstOrder(NO_BLUR, (1, 1), RandomNoise((0, 0)), RandomJpeg((10, 10)))
    mixture, generator = Mixture([mild, strong], (0.3, 0.7)), rng()
    drawn = [list(mixture.steps((8, 8), generator)) for _ in range(500)]
    assert stats.binomtest(sum(Jpeg(90) in steps for steps in drawn), 500, 0.3).pvalue > ERROR


@pytest.mark.parametrize("name", RECIPES)
def test_the_steps_of_a_recipe_can_be_applied_by_hand(name, photo):
    generator, x = rng(3), photo
    for step in recipe(name).steps(photo.shape[:2], generator):
        x = x if step is None else step(x, generator)
    assert_array_equal(recipe(name)(photo, rng(3)), round_to_8_bits(x))
