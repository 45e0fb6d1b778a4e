import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from skimage import data

from diffbir.dataset.degradations.blur import RandomBlur
from diffbir.dataset.degradations.camera import CameraNoise, RandomCameraNoise, demosaic
from diffbir.dataset.degradations.jpeg import Jpeg, RandomJpeg, jpeg
from diffbir.dataset.degradations.noise import (
    CorrelatedNoise,
    GaussianNoise,
    RandomNoise,
    correlated_noise,
    gaussian_noise,
    photon_counts,
    poisson_noise,
)
from diffbir.dataset.degradations.recipes import (
    BSRGAN,
    Classical,
    FirstOrder,
    Mixture,
    SecondOrder,
    Step,
    round_to_8_bits,
)
from diffbir.dataset.degradations.resize import RandomResize, Resize, resize
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


def test_random_noise_draws_correlated_noise_as_often_and_as_strong_as_stated():
    """The variances along the axes are uniform in [0, sigma^2], so each channel's is sigma^2 / 2 on average."""
    noise = RandomNoise(sigma=(10, 10), grey_prob=0.4, correlated_prob=0.2)
    generator, n = rng(), 4000
    drawn = [noise.draw(generator) for _ in range(n)]
    correlated = [step.mix for step in drawn if isinstance(step, CorrelatedNoise)]
    grey = sum(isinstance(step, GaussianNoise) and step.grey for step in drawn)
    expected = [0.2 * n, 0.4 * n, 0.4 * n]
    assert stats.chisquare([len(correlated), grey, n - len(correlated) - grey], expected).pvalue > ERROR
    variances = np.concatenate([np.linalg.svd(mix, compute_uv=False) ** 2 for mix in correlated])
    assert stats.kstest(variances, stats.uniform(0, 100).cdf).pvalue > ERROR
    # No direction is preferred: every channel has the same variance on average.
    per_channel = np.array([(mix**2).sum(axis=1) for mix in correlated])
    error = per_channel.std(axis=0) / len(correlated) ** 0.5
    assert (np.abs(per_channel.mean(axis=0) - 50) < stats.norm.isf(ERROR / 6) * error).all()


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

    def __init__(self, name: str, log: list[tuple[str, int]]):
        self.name, self.log = name, log

    def draw(self, *args: Any) -> Step:
        """A resize is asked with (base, rng), the others with (rng,)."""

        def step(image: NDArray, rng: np.random.Generator) -> NDArray:
            self.log.append((self.name, image.shape[0]))
            return resize(image, *args[0], "area") if len(args) == 2 else image

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
    """Every stage comes first equally often; noise and JPEG meet the small or the large image."""
    log: list[tuple[str, int]] = []
    names = ["blur_1", "blur_2", "noise", "jpeg", "camera", "last_jpeg"]
    degrade = BSRGAN(**{name: Recorder(name, log) for name in names}, scale=(4,), two_step_prob=0)
    image, generator, n = np.zeros((96, 64, 3), np.float32), rng(), 600
    first, small = [], 0
    for _ in range(n):
        log.clear()
        assert degrade(image, generator).shape == image.shape
        assert sorted(name for name, _ in log) == sorted(names)
        assert log[-1] == ("last_jpeg", 24)
        first.append(log[0][0])
        small += dict(log)["noise"] == 24
    assert stats.chisquare([first.count(name) for name in names[:-1]]).pvalue > ERROR
    assert stats.binomtest(small, n, 0.5).pvalue > ERROR


def test_bsrgan_resizes_in_two_steps_with_its_probability_and_ends_at_the_scale():
    degrade = recipe("bsrgan")
    generator, n, two = rng(), 3000, []
    for _ in range(n):
        *first, last, back = [s for s in degrade.steps((800, 400), generator) if isinstance(s, Resize)]
        assert (last.height, last.width) == (200, 100)
        assert back == Resize(800, 400, "bicubic")
        two += [800 / step.height for step in first]
    assert stats.binomtest(len(two), n, 0.25).pvalue > ERROR
    assert stats.kstest(two, stats.uniform(0.5, 3.5).cdf).pvalue > ERROR


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
