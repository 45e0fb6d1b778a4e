"""Results as files: whole, and what other libraries read of them."""

import os

import cv2
import numpy as np
import pytest
import tifffile
from numpy.testing import assert_array_equal
from PIL import Image, features

from diffbir.folder.writing import WriteError, check_output, ending_of, write
from diffbir.utils.cli import UserError
from tests.folder.mixed import crop

RGB = crop(3)


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp", ".webp"])
def test_eight_bits_come_back_without_loss(tmp_path, ending):
    write(tmp_path / f"x{ending}", RGB, quality=100)
    assert_array_equal(cv2.imread(str(tmp_path / f"x{ending}"))[..., ::-1], RGB)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bits_come_back_without_loss(tmp_path, ending, channels):
    deep = np.random.default_rng(0).integers(0, 65536, (7, 9, channels), np.uint16)
    write(tmp_path / f"x{ending}", deep)
    if ending == ".tif":
        assert_array_equal(tifffile.imread(tmp_path / "x.tif"), deep.squeeze())
    else:
        read = cv2.imread(str(tmp_path / "x.png"), cv2.IMREAD_UNCHANGED)
        assert_array_equal(read, deep[..., {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]].squeeze())


def test_what_a_format_cannot_hold_becomes_what_it_can(tmp_path):
    deep = np.full((8, 8, 3), 65535 // 5, np.uint16)
    clear = np.dstack([RGB, np.zeros(RGB.shape[:2], np.uint8)])
    for picture, level in ((deep, 51), (clear, 255), (Image.fromarray(deep[..., 0]), 51), (deep[..., :1], 51)):
        for ending in (".jpg", ".bmp"):
            write(tmp_path / f"x{ending}", picture)
            assert abs(cv2.imread(str(tmp_path / f"x{ending}")).astype(int) - level).max() <= 1


def test_quality_and_metadata_are_passed_on(tmp_path):
    exif = Image.Exif()
    exif[0x0110] = "camera"
    for quality in (20, 90):
        write(tmp_path / f"{quality}.jpg", RGB, quality, {"exif": exif.tobytes(), "icc_profile": b"profile"})
    assert os.path.getsize(tmp_path / "20.jpg") < os.path.getsize(tmp_path / "90.jpg")
    with Image.open(tmp_path / "20.jpg") as image:
        assert image.getexif()[0x0110] == "camera" and image.info["icc_profile"] == b"profile"


@pytest.mark.parametrize(
    "path, format, ending",
    [
        ("a.JPG", "same", ".jpg"),
        ("a.jpeg", "same", ".jpeg"),
        ("a.jfif", "same", ".jpg"),
        ("a.gif", "same", ".png"),
        ("a.avif", "same", ".avif" if features.check("avif") else ".png"),
        ("a", "same", ".png"),
        ("a.jpg", "tiff", ".tif"),
    ],
)
def test_endings(path, format, ending):
    assert ending_of(path, format, "_x") == f"_x{ending}"


def test_one_result_that_a_format_cannot_hold_is_no_fault_of_the_folder(tmp_path):
    with pytest.raises(WriteError, match="another --format"):
        write(tmp_path / "x.webp", np.zeros((1, 20000, 3), np.uint8))
    with pytest.raises(WriteError):
        write(tmp_path / f"{'x' * 300}.png", RGB)
    assert os.listdir(tmp_path) == []
    write(tmp_path / f"{'x' * 251}.png", RGB)


def test_a_folder_that_vanishes_is_a_fault_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the same command goes on"):
        write(tmp_path / "file" / "x.png", RGB)
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file" / "deep")
    check_output(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == ["file"]
