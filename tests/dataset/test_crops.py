import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from skimage import data
from torch.testing import assert_close

from diffbir.dataset.crops import Crop, resize_short
from diffbir.dataset.degradations.resize import resize
from diffbir.dataset.pairs import ImagePairs
from diffbir.utils.image import to_tensor, write_png

PHOTO = data.astronaut()[:60, :80]


def crop(image: np.ndarray, *args, **kwargs) -> np.ndarray:
    return Crop(*args, **kwargs)([image], np.random.default_rng(0))[0]


def test_without_a_crop_the_picture_stays_whole():
    assert_array_equal(crop(PHOTO, None, "none"), PHOTO)


def published(image: np.ndarray, side: int) -> np.ndarray:
    """`center_crop_arr` of openai/guided-diffusion, which the published code has, without its cut."""
    picture = Image.fromarray(image)
    while min(*picture.size) >= 2 * side:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = side / min(*picture.size)
    return np.array(picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC))


@pytest.mark.parametrize("side, shape", [(50, (50, 67)), (30, (30, 40)), (13, (13, 17)), (90, (90, 120)), (1, (1, 2))])
def test_the_short_side_is_resized_as_published_before_the_crop(side, shape):
    resized = published(PHOTO, side)
    assert resized.shape[:2] == shape
    assert_array_equal(resize_short(PHOTO, side), resized)


def test_shrinking_keeps_more_high_frequencies_than_averages_of_areas():
    photo = data.astronaut()
    ours, area = resize_short(photo, 300), resize(photo, 300, 300, "area")
    strength = [np.abs(np.diff(x.astype(float), axis=0)).mean() for x in (ours, area)]
    assert 1.03 < strength[0] / strength[1] < 1.15


@pytest.mark.parametrize("side, shape", [(30, (30, 40)), (90, (90, 120))])
def test_the_crop_is_cut_out_of_the_resized_picture(side, shape):
    resized = published(PHOTO, side)
    assert_array_equal(crop(PHOTO, None, "none", side), resized)
    left = (shape[1] - 20) // 2
    top = (shape[0] - 20) // 2
    assert_array_equal(crop(PHOTO, 20, "centre", side), resized[top : top + 20, left : left + 20])


def test_a_short_side_below_the_crop_is_that_of_the_crop():
    assert crop(PHOTO, 64, "centre", 32).shape == (64, 64, 3)


def test_all_pictures_of_a_scene_are_cut_at_the_same_place():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = Crop(16)([PHOTO, 255 - PHOTO], rng)
        assert_array_equal(a, 255 - b)


@pytest.mark.parametrize("size, place", [(None, "random"), (None, "centre"), (32, "none")])
def test_a_size_goes_with_a_cut(size, place):
    with pytest.raises(ValueError, match="whole pictures are crop none, size null"):
        Crop(size, place)


def test_the_target_replaces_the_clean_crop_and_is_what_is_degraded(tmp_path):
    write_png(tmp_path / "photo.png", PHOTO)
    seen = []

    def degrade(hq: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        seen.append(hq.copy())
        return hq

    dataset = ImagePairs(
        tmp_path, 32, degrade, crop="centre", flip=False, target=lambda hq: np.clip(hq * np.float32(1.5), 0, 1)
    )
    expected = (to_tensor(PHOTO[14:46, 24:56]) * 1.5).clamp(max=1)
    assert_close(dataset[0]["hq"], expected, rtol=0, atol=0)
    assert_close(to_tensor(seen[0]), expected, rtol=0, atol=0)
