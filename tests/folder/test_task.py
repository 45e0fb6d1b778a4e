"""The rule of --task auto, on photos that were damaged on purpose."""

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose
from skimage import data

from diffbir.folder.task import DENOISE, SR, choose_task, luma, noise
from diffbir.utils.image import to_tensor

PHOTOS = {name: getattr(data, name)()[:400, :450] for name in ("astronaut", "coffee", "chelsea", "rocket")}


def noisy(x, sigma):
    rng = np.random.default_rng(0)
    return (x + rng.normal(0, sigma, x.shape)).clip(0, 255).round().astype(np.uint8)


def blurred(x, sigma):
    return cv2.GaussianBlur(x, (0, 0), sigma)


def shrunk(x, factor):
    return cv2.resize(x, None, fx=1 / factor, fy=1 / factor, interpolation=cv2.INTER_AREA)


def enlarged(x, factor):
    return cv2.resize(shrunk(x, factor), x.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def compressed(x, quality):
    _, data = cv2.imencode(".jpg", x[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].copy()


DAMAGE = {
    "none": (lambda x: x, SR),
    "shrunk": (lambda x: shrunk(x, 2), SR),
    "blurred": (lambda x: blurred(x, 2), SR),
    "enlarged": (lambda x: enlarged(x, 3), SR),
    "good jpeg": (lambda x: compressed(x, 92), SR),
    "jpeg, then enlarged": (lambda x: cv2.resize(compressed(x, 60), None, fx=1.5, fy=1.5), SR),
    "noisy": (lambda x: noisy(x, 12), DENOISE),
    "blurred and noisy": (lambda x: noisy(blurred(x, 2), 12), DENOISE),
    "jpeg": (lambda x: compressed(x, 40), DENOISE),
    "jpeg off the grid": (lambda x: compressed(x, 40)[3:, 5:], DENOISE),
    "noisy and jpeg": (lambda x: compressed(noisy(x, 12), 40), DENOISE),
}


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_noise_and_blocks_are_for_denoise_and_the_rest_for_sr(photo, damage):
    function, task = DAMAGE[damage]
    assert choose_task(to_tensor(function(PHOTOS[photo]))[None]) == task


@pytest.mark.parametrize("sigma", [2.0, 5.0, 20.0])
def test_noise_on_grey_is_measured(sigma):
    y = to_tensor(noisy(np.full((300, 200, 3), 128.0), sigma) / 255)[None]
    expected = sigma * np.linalg.norm((0.299, 0.587, 0.114))
    assert_allclose(noise(luma(y)), expected, rtol=0.07)


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (2, 3), (34, 36)])
def test_tiny_pictures_have_a_task(size):
    assert choose_task(to_tensor(np.full((*size, 3), 0.5))[None]) == SR
