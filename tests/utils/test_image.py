import io
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image, ImageCms
from skimage import data
from torch.testing import assert_close

from diffbir.utils.cli import UserError
from diffbir.utils.image import ImageError, list_images, read_rgb, side_by_side, to_tensor, to_uint8, write_png

ORIENTATION = 0x0112  # the EXIF tag


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    """(32, 40, 3), not symmetric in any way."""
    return data.astronaut()[100:132, 200:240]


# Reading


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp", ".PNG", ".TIF"])
def test_lossless_files_are_read_exactly(photo, tmp_path, suffix):
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(photo).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    assert list_images(path) == [path]
    assert_array_equal(read_rgb(path), photo)
    assert read_rgb(path).dtype == np.uint8


def test_a_jpeg_is_read_as_another_decoder_reads_it(photo, tmp_path):
    """RGB order and the 4:2:0 chroma are the decoder's; two builds of libjpeg may differ by a level or two."""
    path = tmp_path / "photo.JPG"
    Image.fromarray(photo).save(path, format="JPEG", quality=60)
    assert_allclose(read_rgb(path).astype(int), cv2.imread(str(path))[..., ::-1], atol=3)


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x, 1)),
    ],
)
def test_a_picture_is_turned_upright(photo, tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(photo).save(tmp_path / "turned.png", exif=exif)
    assert_array_equal(read_rgb(tmp_path / "turned.png"), upright(photo))


def test_alpha_is_laid_over_white(photo, tmp_path):
    alpha = np.linspace(0, 255, photo[..., 0].size).round().reshape(photo.shape[:2]).astype(np.uint8)
    Image.fromarray(np.dstack([photo, alpha])).save(tmp_path / "alpha.png")
    expected = photo * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    assert_allclose(read_rgb(tmp_path / "alpha.png"), expected, atol=1)


def test_grey_with_alpha_is_laid_over_white(tmp_path):
    Image.fromarray(np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert_allclose(read_rgb(tmp_path / "la.png")[0], [[100] * 3, [255] * 3, [224] * 3], atol=1)


@pytest.mark.parametrize("transparent, expected", [(None, [10, 20, 30]), (0, [255, 255, 255])])
def test_a_palette_gives_its_colours_and_its_transparent_one_gives_white(tmp_path, transparent, expected):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    image.save(tmp_path / "palette.png", **({} if transparent is None else {"transparency": transparent}))
    assert Image.open(tmp_path / "palette.png").mode == "P"
    assert_array_equal(read_rgb(tmp_path / "palette.png"), [[expected, [200, 100, 50], [0, 255, 0]]])


def test_grey_becomes_three_equal_channels(photo, tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), photo[..., 0])
    assert_array_equal(read_rgb(tmp_path / "grey.png"), np.repeat(photo[..., :1], 3, axis=2))


def test_one_bit_becomes_black_and_white(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "bits.png")
    assert_array_equal(read_rgb(tmp_path / "bits.png"), [[[0] * 3, [255] * 3]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    grey = np.array([[0, 128, 257, 1000, 32768, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / f"deep{suffix}"), grey)
    expected = np.rint(grey / 257).astype(int)  # 65535 = 257 * 255
    assert_array_equal(read_rgb(tmp_path / f"deep{suffix}"), np.repeat(expected[..., None], 3, axis=2))


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path):
    """Scaled by the type's range, not by the brightest pixel."""
    cv2.imwrite(str(tmp_path / "dark.png"), np.full((4, 4), 2570, np.uint16))
    assert_array_equal(read_rgb(tmp_path / "dark.png"), np.full((4, 4, 3), 10))


def test_sixteen_bit_colour_keeps_its_high_byte(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4, 3), (257 * 30, 257 * 20, 257 * 10), np.uint16))
    assert_allclose(read_rgb(tmp_path / "deep.png"), np.full((4, 4, 3), (10, 20, 30)), atol=1)


def test_a_floating_point_tiff_in_unit_range_is_not_black(tmp_path):
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], np.float32)).save(tmp_path / "float.tif")
    assert_array_equal(read_rgb(tmp_path / "float.tif"), [[[0] * 3, [51] * 3, [255] * 3]])


@pytest.mark.parametrize(
    "ink, expected",
    [((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_a_cmyk_jpeg_becomes_rgb(tmp_path, ink, expected):
    """Not its negative: such files store inverted inks. 4 levels are the loss of JPEG."""
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "cmyk.jpg", quality=95)
    assert_allclose(read_rgb(tmp_path / "cmyk.jpg").astype(int), np.full((16, 16, 3), expected), atol=4)


def swapped_profile() -> bytes:
    """An RGB profile whose red is the green of sRGB and the other way round, so that conversion swaps the channels."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"____", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"____", b"gXYZ", 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_converted_to_srgb(tmp_path, mode):
    path = tmp_path / "profile.png"
    colours = np.array([[[200, 100, 50], [10, 250, 0], [128, 128, 128]]], np.uint8)
    image = Image.fromarray(colours)
    image = image.quantize(3) if mode == "P" else image.convert(mode)
    image.save(path, icc_profile=swapped_profile())
    assert Image.open(path).mode == mode
    assert_allclose(read_rgb(path).astype(int), colours[..., [1, 0, 2]], atol=2)


def test_a_profile_and_alpha_are_both_applied(tmp_path):
    image = Image.new("RGBA", (1, 1), (200, 100, 50, 102))
    image.save(tmp_path / "both.png", icc_profile=swapped_profile())
    opaque = np.array([100, 200, 50])
    assert_allclose(read_rgb(tmp_path / "both.png")[0, 0], 0.4 * opaque + 0.6 * 255, atol=2)


def test_a_profile_of_srgb_changes_nothing_visible(photo, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photo).save(tmp_path / "srgb.png", icc_profile=profile)
    assert_allclose(read_rgb(tmp_path / "srgb.png").astype(int), photo, atol=1)


@pytest.mark.parametrize("profile", [b"broken", swapped_profile()[:200]])
def test_a_broken_profile_leaves_the_pixels_as_they_are(photo, tmp_path, profile):
    Image.fromarray(photo).save(tmp_path / "broken.png", icc_profile=profile)
    assert_array_equal(read_rgb(tmp_path / "broken.png"), photo)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_profile_of_another_colour_space_leaves_the_pixels_as_they_are(photo, tmp_path, mode):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB" if mode == "L" else "LAB")).tobytes()
    image = Image.fromarray(photo).convert(mode)
    image.save(tmp_path / "other.png", icc_profile=profile)
    assert_array_equal(read_rgb(tmp_path / "other.png"), np.asarray(image.convert("RGB")))


# Files that cannot be read


def named(path: Path):
    return pytest.raises(ImageError, match=re.escape(str(path)))


def test_a_missing_file_is_named(tmp_path):
    with named(tmp_path / "gone.png"):
        read_rgb(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_a_truncated_file_is_named(photo, tmp_path, suffix, kept):
    path = tmp_path / f"cut{suffix}"
    content = io.BytesIO()
    Image.fromarray(photo).save(content, format=Image.registered_extensions()[suffix])
    path.write_bytes(content.getvalue()[: int(kept * content.tell())])
    with named(path):
        read_rgb(path)


def test_a_png_with_a_damaged_byte_is_named(photo, tmp_path):
    path = tmp_path / "damaged.png"
    write_png(path, photo)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with named(path):
        read_rgb(path)


def test_a_text_file_with_the_suffix_of_an_image_is_named(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with named(path):
        read_rgb(path)


def test_a_folder_is_named(tmp_path):
    with named(tmp_path):
        read_rgb(tmp_path)


# Listing


def test_a_folder_is_listed_with_its_folders_in_a_fixed_order(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/deep/y.webp", "c.JPEG", "notes.txt", "image.png.part", "no_suffix"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    expected = ["a/deep/y.webp", "a/z.jpg", "b.PNG", "c.JPEG"]
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(str(tmp_path))] == expected


def test_a_list_file_is_read_in_its_order_and_relative_to_its_folder(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    source = tmp_path / "lists" / "train.txt"
    source.parent.mkdir()
    source.write_text(f"z.png\n\n  ../photos/a b.jpg  \n{elsewhere / 'c.png'}\nz.png\n")
    monkeypatch.chdir(elsewhere)
    folder = source.parent
    expected = [folder / "z.png", folder / "../photos/a b.jpg", elsewhere / "c.png", folder / "z.png"]
    assert list_images(source) == expected


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_list_is_named(tmp_path, content):
    source = tmp_path / "train.txt"
    source.write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(source))} is empty"):
        list_images(source)


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"no images in {re.escape(str(tmp_path))}"):
        list_images(tmp_path)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'gone'))} does not exist"):
        list_images(tmp_path / "gone")


def test_a_binary_file_that_is_no_image_by_its_suffix_is_named(tmp_path):
    """A video or a raw photo given in place of an image."""
    source = tmp_path / "film.mp4"
    source.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=re.escape(str(source))):
        list_images(source)


# Conversion


def test_every_8_bit_value_survives_the_way_to_a_tensor_and_back():
    rgb = np.stack([np.arange(256), np.arange(256)[::-1], np.roll(np.arange(256), 7)], axis=-1)
    rgb = rgb.reshape(16, 16, 3).astype(np.uint8)
    image = to_tensor(rgb)
    assert image.dtype == torch.float32
    assert (image.min(), image.max()) == (0, 1)
    assert_array_equal(to_uint8(image), rgb)


def test_a_tensor_holds_rows_then_columns_of_each_channel():
    rgb = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    image = to_tensor(rgb)
    assert_close(image, torch.arange(24).view(2, 4, 3).permute(2, 0, 1) / 255, rtol=0, atol=0)


def test_floats_are_taken_as_they_are_and_views_are_accepted():
    rgb = np.random.default_rng(0).random((4, 5, 3))
    assert_close(to_tensor(rgb[:, ::-1])[1, 2, 0].item(), float(np.float32(rgb[2, 4, 1])), rtol=0, atol=0)
    assert to_tensor(rgb).dtype == torch.float32


def test_values_are_clamped_and_rounded_to_the_nearest():
    values = torch.tensor([-1.0, -0.001, 0.49 / 255, 0.51 / 255, 254.4 / 255, 254.6 / 255, 1.001, 2.0])
    assert to_uint8(values.view(1, 1, -1).expand(3, 1, -1))[0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255, 255]


def test_half_precision_and_gradients_are_accepted():
    image = torch.full((3, 1, 1), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert_array_equal(to_uint8(image), np.full((1, 1, 3), 128))


# Writing


def test_a_png_is_written_exactly_and_nothing_else(photo, tmp_path):
    path = tmp_path / "new" / "folder" / "photo.png"
    write_png(path, photo)
    assert_array_equal(read_rgb(path), photo)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_part_of_the_new_one(photo, tmp_path, monkeypatch, error):
    path = tmp_path / "photo.png"
    write_png(path, photo)

    def fail_halfway(image: Image.Image, part: Path, **_) -> None:
        part.write_bytes(b"half of a file")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail_halfway)
    with pytest.raises(type(error)):
        write_png(path, photo[::-1])
    assert os.listdir(tmp_path) == [path.name]
    assert_array_equal(read_rgb(path), photo)


def test_a_target_that_cannot_be_replaced_leaves_no_part(photo, tmp_path):
    (tmp_path / "photo.png").mkdir()
    with pytest.raises(OSError):
        write_png(tmp_path / "photo.png", photo)
    assert os.listdir(tmp_path) == ["photo.png"]


# Pictures next to each other


def parts(canvas: NDArray, like: NDArray, count: int) -> tuple[list[NDArray], list[NDArray]]:
    """(titles, pictures) of a canvas, found from the sizes alone."""
    height, width = like.shape[:2]
    step = (canvas.shape[1] - width) // (count - 1)
    columns = [canvas[:, i * step : i * step + width] for i in range(count)]
    return [c[:-height] for c in columns], [c[-height:] for c in columns]


def test_pictures_side_by_side_keep_their_pixels_and_order():
    photos = [data.astronaut()[100:140, left : left + 70] for left in (0, 100, 200)]
    canvas = side_by_side(dict(zip(("lq", "stage 1", "final"), photos, strict=True)))
    assert canvas.dtype == np.uint8
    _, pictures = parts(canvas, photos[0], 3)
    for picture, photo in zip(pictures, photos, strict=True):
        assert_array_equal(picture, photo)
    assert canvas.size > 3 * photos[0].size


def test_every_picture_has_its_title_above_it(photo):
    photo = np.repeat(photo, 2, axis=1)
    titles, _ = parts(side_by_side({"input": photo, "": photo, "output": photo}), photo, 3)
    ink = [int((title < 128).all(axis=2).sum()) for title in titles]
    assert ink[1] == 0
    assert min(ink[0], ink[2]) > 20
    assert not np.array_equal(titles[0], titles[2])
    swapped, _ = parts(side_by_side({"output": photo, "": photo, "input": photo}), photo, 3)
    assert_array_equal(swapped[0], titles[2])
    assert_array_equal(swapped[2], titles[0])


def test_a_single_picture_keeps_its_width(photo):
    canvas = side_by_side({"only": photo})
    assert canvas.shape[1] == photo.shape[1]
    assert_array_equal(canvas[-photo.shape[0] :], photo)
