import numpy as np
import pytest
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from scipy.ndimage import correlate1d
from skimage import data

from diffbir.dataset.sharpen import UnsharpMask
from tests.golden.fill import image as golden_image


def test_sharpening_agrees_with_the_published_code(numerics_golden):
    x = F.interpolate(golden_image("jpeg_in", (1, 3, 8, 8)), (64, 48), mode="bicubic").clamp(0, 1)
    sharp = UnsharpMask()(np.ascontiguousarray(x[0].permute(1, 2, 0).numpy()))
    assert sharp.dtype == np.float32
    assert_allclose(sharp, numerics_golden["usm_sharp"][0].permute(1, 2, 0).numpy(), rtol=0, atol=5e-6)


def test_sharpening_is_the_formula_with_scipys_gaussian():
    """sigma is 0.15 size + 0.35, the Gaussian cut to the size."""
    photo = data.astronaut()[40:136, 160:288].astype(np.float32) / 255
    axis = np.arange(-10, 11)
    window = np.exp(-0.5 * (axis / (0.15 * 21 + 0.35)) ** 2)

    def blur(x):
        for dim in (0, 1):
            x = correlate1d(x, window / window.sum(), axis=dim, mode="mirror")
        return x

    difference = photo - blur(photo.astype(np.float64))
    soft = blur((np.abs(difference) * 255 > 6).astype(np.float64))
    expected = soft * np.clip(photo + 0.8 * difference, 0, 1) + (1 - soft) * photo
    # A pixel whose difference lies within rounding of the threshold may count as either; its share is at most 0.02.
    assert_allclose(UnsharpMask(size=21, weight=0.8, threshold=6)(photo), expected, rtol=0, atol=1e-4)


def test_weak_texture_stays_and_strong_edges_overshoot():
    texture = np.full((80, 80, 3), 0.5, np.float32)
    texture[::2] += 8 / 255
    assert_array_equal(UnsharpMask()(texture), texture)
    edge = np.full((80, 80, 3), 0.3, np.float32)
    edge[:, 40:] = 0.7
    sharp = UnsharpMask()(edge)
    assert sharp[40, 40, 0] > 0.75
    assert sharp[40, 39, 0] < 0.25


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 70, 3), (60, 60, 3)])
def test_sharpening_stays_in_range_for_any_size(shape):
    noise = np.random.default_rng(0).random(shape, dtype=np.float32)
    before = noise.copy()
    sharp = UnsharpMask()(noise)
    assert sharp.shape == shape
    assert 0 <= sharp.min() <= sharp.max() <= 1
    assert_array_equal(noise, before)
