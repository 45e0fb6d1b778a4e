"""Every kind of picture in and back again."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffbir.utils.cli import UserError
from diffbir.utils.pictures import open_picture

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
FLOATS = torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()).float() / 255


def deep(array: np.ndarray) -> np.ndarray:
    return array.astype(np.uint16) * 257  # 8 bits spread over 16


ARRAYS = {
    f"{kind} {name}": convert(PIXELS[index])
    for name, index in {"grey": (..., 0), "1": (..., [0]), "rgb": (..., [0, 1, 2]), "rgba": ...}.items()
    for kind, convert in {
        "uint8": np.array,
        "uint16": deep,
        "float32": lambda a: a.astype(np.float32) / 255,
        "float64": lambda a: a.astype(np.float32).astype(np.float64) / 255,
    }.items()
}
TENSORS = {
    "chw": FLOATS[:3],
    "1hw": FLOATS[:1],
    "alpha": FLOATS,
    "batch": torch.stack([FLOATS[:3], FLOATS[:3].flip(-1)]),
    "half": FLOATS[:3].half(),
    "double": FLOATS[None].double(),
}
IMAGES = {
    mode: Image.fromarray(PIXELS if mode == "RGBA" else PIXELS[..., :3]).convert(mode)
    for mode in ("L", "RGB", "RGBA", "LA")
} | {"I;16": Image.fromarray(deep(PIXELS[..., 0]))}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_as_it_was(name):
    array = ARRAYS[name]
    x, back = open_picture(array)
    assert x.shape == (1, 3, 5, 7)
    assert x.dtype == torch.float32
    same = back(x)
    assert (same.dtype, same.shape) == (array.dtype, array.shape)
    np.testing.assert_allclose(same, array, rtol=0, atol=1e-6 if array.dtype.kind == "f" else 0)
    # The same picture in 8 bits, whatever it came in; grey in three channels.
    first = np.broadcast_to(PIXELS[..., :1], (5, 7, 3)) if array.ndim == 2 or array.shape[2] == 1 else PIXELS[..., :3]
    assert torch.equal((x[0] * 255).round().byte(), torch.from_numpy(first.transpose(2, 0, 1).copy()))


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_as_it_was(name):
    tensor = TENSORS[name]
    x, back = open_picture(tensor)
    assert x.shape == (2 if name == "batch" else 1, 3, 5, 7)
    same = back(x)
    assert (same.dtype, same.shape) == (tensor.dtype, tensor.shape)
    torch.testing.assert_close(same, tensor, rtol=0, atol=1e-6)
    assert same.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("mode", IMAGES)
def test_an_image_comes_back_as_it_was(mode):
    x, back = open_picture(IMAGES[mode])
    assert x.shape == (1, 3, 5, 7)
    same = back(x)
    assert same.mode == mode
    assert np.array_equal(np.asarray(same), np.asarray(IMAGES[mode]))


def test_an_image_is_taken_as_it_is_meant_to_be_seen_and_left_alone(tmp_path):
    """Upright by EXIF, as Pillow and the command line do it; a path and the opened file are the same."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    path = tmp_path / "turned.png"
    Image.fromarray(PIXELS[..., :3]).save(path, exif=exif)
    image = Image.open(path)
    assert torch.equal(open_picture(image)[0], open_picture(path)[0])
    _, back = open_picture(image)
    assert np.array_equal(np.asarray(back(open_picture(str(path))[0])), np.rot90(PIXELS, 3)[..., :3])
    assert image.size == (7, 5)


def test_a_palette_with_transparency_keeps_it():
    gif = io.BytesIO()
    Image.fromarray(PIXELS[..., :3]).quantize(8).save(gif, "GIF", transparency=3)
    image = Image.open(gif)
    x, back = open_picture(image)
    assert back(x).mode == "RGBA"
    assert np.array_equal(np.asarray(back(x)), np.asarray(image.convert("RGBA")))


def test_grey_is_the_luma_of_the_result_as_pillow_has_it():
    _, back = open_picture(PIXELS[..., 0])
    grey = back(FLOATS[None, :3])
    pillow = np.asarray(Image.fromarray(PIXELS[..., :3]).convert("L"))
    assert np.abs(grey.astype(int) - pillow).max() <= 1


def test_alpha_grows_with_the_result():
    flat = np.full((4, 4, 4), 255, np.uint8)
    flat[..., 3] = 51
    _, back = open_picture(flat)
    large = back(torch.ones(1, 3, 8, 12))
    assert large.shape == (8, 12, 4)
    assert (large == [255, 255, 255, 51]).all()


@pytest.mark.parametrize(
    "picture, words",
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "holds floats in [0, 1], not torch.uint8"),
        (torch.zeros(6, 5, 3), "3 or 4 channels, not (1, 6, 5, 3)"),
        (torch.zeros(4, 5), "channels, not (4, 5)"),
        (torch.full((3, 4, 4), 255.0), "this one in [255, 255]"),
        (np.full((4, 4, 3), 200.0), "this one in [200, 200]"),
        (np.full((4, 4, 3), np.nan), "this one in [nan, nan]"),
        (np.zeros((3, 4, 5)), "channels, not (3, 4, 5)"),
        (np.zeros((2, 4, 5, 3)), "give several as a list"),
        (np.zeros((4, 4, 3), np.int64), "not int64"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (b"bytes", "not bytes"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(picture, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        open_picture(picture)
    assert "\n" not in str(caught.value)
