"""What a file holds beside 8-bit RGB comes back: bits, alpha, grey, profile, EXIF; read by other libraries."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageCms
from skimage import data

from diffbir.model.restorer import Restorer
from diffbir.utils.decode import decode
from diffbir.utils.deep import Deep, encode
from diffbir.utils.image import read_rgb, write_png
from diffbir.utils.pictures import open_picture

PHOTO = data.astronaut()[100:132, 200:240]  # (32, 40, 3), not symmetric in any way
DEEP = np.random.default_rng(0).integers(0, 65536, (*PHOTO.shape[:2], 4), dtype=np.uint16)


def profile(space: bytes, curve: bytes, columns: dict[bytes, tuple[float, float, float]]) -> bytes:
    """A profile by the book (ICC.1): one curve for all channels, and columns of its matrix."""
    body, table = b"", b""
    tags = {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve} if columns else {b"kTRC": curve}
    tags |= {
        name: b"XYZ " + bytes(4) + np.array(np.rint(np.array(v) * 65536), ">i4").tobytes()
        for name, v in columns.items()
    }
    tags[b"wtpt"] = b"XYZ " + bytes(4) + np.array(np.rint(np.array([0.9642, 1, 0.8249]) * 65536), ">i4").tobytes()
    tags[b"desc"] = b"desc" + bytes(4) + (2).to_bytes(4, "big") + b"x\0" + bytes(78)
    tags[b"cprt"] = b"text" + bytes(4) + b"x\0"
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        place = start + len(body)
        table += name + place.to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content + bytes(-len(content) % 4)
    size = start + len(body)
    head = (
        size.to_bytes(4, "big") + bytes(4) + bytes.fromhex("02100000") + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    )
    head = head.ljust(68, b"\0") + np.array(np.rint(np.array([0.9642, 1, 0.8249]) * 65536), ">i4").tobytes()
    return head.ljust(128, b"\0") + len(tags).to_bytes(4, "big") + table + body


GAMMA = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big")
TABLE = b"curv" + bytes(4) + (256).to_bytes(4, "big") + (np.linspace(0, 1, 256) ** 1.8 * 65535).astype(">u2").tobytes()
PARA = b"para" + bytes(4) + bytes.fromhex("00030000") + np.array(
    np.rint(np.array([2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045]) * 65536), ">i4"
).tobytes()  # fmt: skip
ADOBE = {
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}
PROFILES = {
    "gamma": profile(b"RGB ", GAMMA, ADOBE),
    "table": profile(b"RGB ", TABLE, ADOBE),
    "parametric": profile(b"RGB ", PARA, ADOBE),
    "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
}


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a maker"
    tags[0x8769] = {0x829A: 0.01}
    return tags


def through(path: Path, out: Path, **options) -> None:
    """Reads and writes, and nothing in between."""
    x, back = open_picture(path)
    back(x).save(out, **options)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("to", [".png", ".tif"])
def test_16_bits_come_back_to_the_last(suffix, channels, to, tmp_path):
    """Written and read by OpenCV; tifffile reads the TIFFs too."""
    pixels = DEEP[..., 0] if channels == 1 else DEEP[..., :channels]
    cv2.imwrite(str(tmp_path / f"in{suffix}"), pixels)
    through(tmp_path / f"in{suffix}", tmp_path / f"out{to}")
    assert_array_equal(cv2.imread(str(tmp_path / f"out{to}"), cv2.IMREAD_UNCHANGED), pixels)
    if to == ".tif":
        rgb = pixels if channels == 1 else pixels[..., [2, 1, 0, 3][:channels]]
        assert_array_equal(tifffile.imread(tmp_path / "out.tif"), rgb)


def test_floats_become_16_bits(tmp_path):
    x = np.linspace(0, 1, 3 * 70_000, dtype=np.float32).reshape(100, 700, 3)
    tifffile.imwrite(tmp_path / "in.tif", x, photometric="rgb")
    through(tmp_path / "in.tif", tmp_path / "out.png")
    out = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert_allclose(out, x.astype(np.float64) * 65535, rtol=0, atol=0.51)


def test_a_gradient_of_65536_levels_keeps_all_of_them(tmp_path):
    gradient = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert cv2.imwrite(str(tmp_path / "in.png"), np.dstack([gradient, gradient[::-1], gradient.T]))
    through(tmp_path / "in.png", tmp_path / "out.png")
    out = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)
    assert_array_equal(out, cv2.imread(str(tmp_path / "in.png"), cv2.IMREAD_UNCHANGED))


def test_a_gradient_keeps_its_levels_through_a_restoration(tmp_path):
    """Stage 1 of the embedded model changes values, but no step of the way has 8 bits."""
    gradient = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert cv2.imwrite(str(tmp_path / "in.png"), gradient)
    image = Restorer.from_preset("mini", "cpu", "fp32")(tmp_path / "in.png", upscale=1, stage="1")
    image.save(tmp_path / "out.png")
    out = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)
    assert out.dtype == np.uint16
    assert out.shape == (256, 256)
    assert len(np.unique(out)) > 20000


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_grey_and_alpha_come_back(mode, tmp_path):
    channels = {"L": DEEP[..., 0], "LA": DEEP[..., :2], "RGB": DEEP[..., :3], "RGBA": DEEP}[mode]
    pixels = (channels // 257).astype(np.uint8)
    Image.fromarray(pixels, mode).save(tmp_path / "in.png")
    through(tmp_path / "in.png", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == mode
        assert_array_equal(np.asarray(image), pixels)


def test_deep_grey_with_alpha_comes_back():
    deep = Deep.of(DEEP[..., :2], {})
    for suffix in (".png", ".tif"):
        content = encode(deep, suffix)
        raster = decode(io.BytesIO(content), "x")
        assert_array_equal(raster.colour[..., 0], DEEP[..., 0])
        assert_array_equal(raster.alpha, DEEP[..., 1])
        if suffix == ".png":  # OpenCV reads grey with alpha as colour with alpha
            assert_array_equal(cv2.imdecode(np.frombuffer(content, np.uint8), -1)[..., [0, 3]], DEEP[..., :2])
        else:
            assert_array_equal(tifffile.imread(io.BytesIO(content)), DEEP[..., :2])


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_undone_for_the_networks_and_put_back(name, depth, tmp_path):
    icc = PROFILES[name]
    colours = PHOTO // 2 + 64  # well inside of sRGB
    source = Image.fromarray(colours)
    source.save(tmp_path / "in.png", icc_profile=icc)
    if depth == 16:
        write_png(tmp_path / "in.png", Deep.of(colours.astype(np.uint16) * 257, {"icc_profile": icc}))
    x, back = open_picture(tmp_path / "in.png")
    lcms = ImageCms.profileToProfile(
        source, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert_allclose(255 * x[0].permute(1, 2, 0).numpy(), np.asarray(lcms), rtol=0, atol=1.1)
    assert_allclose(read_rgb(tmp_path / "in.png").astype(int), np.asarray(lcms), rtol=0, atol=1)
    write_png(tmp_path / "out.png", back(x))
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["icc_profile"] == icc
    out = cv2.imread(str(tmp_path / "out.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert out.dtype == (np.uint8 if depth == 8 else np.uint16)
    # 16 bits lose a little to the floats of the tables and to the tensor's, never a level of 8 bits
    assert_allclose(
        out.astype(int), colours.astype(int) * (1 if depth == 8 else 257), rtol=0, atol=1 if depth == 8 else 8
    )


def test_a_grey_profile_is_undone_and_put_back(tmp_path):
    icc = profile(b"GRAY", b"curv" + bytes(4) + (1).to_bytes(4, "big") + (256).to_bytes(2, "big"), {})  # linear light
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "in.png", icc_profile=icc)
    x, back = open_picture(tmp_path / "in.png")
    y = grey / 255
    expected = np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    assert_allclose(x[0, 0].numpy(), expected, rtol=0, atol=1e-4)
    image = back(x)
    assert image.mode == "L"
    assert image.info["icc_profile"] == icc
    assert_array_equal(np.asarray(image), grey)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_comes_back_for_an_upright_picture(format, tmp_path):
    path = tmp_path / f"in.{format.lower()}"
    Image.fromarray(PHOTO).save(path, format, exif=exif(), quality=95)
    x, back = open_picture(path)
    assert x.shape[-2:] == (40, 32)  # turned
    write_png(tmp_path / "out.png", back(x))
    with Image.open(tmp_path / "out.png") as image:
        tags = image.getexif()
        assert tags[0x0112] == 1
        assert tags[0x010F] == "a maker"
        assert float(tags.get_ifd(0x8769)[0x829A]) == pytest.approx(0.01)
        assert image.size == (32, 40)


def test_exif_and_profile_of_a_deep_png(tmp_path):
    info = {"icc_profile": PROFILES["gamma"], "exif": exif().tobytes()}
    write_png(tmp_path / "in.png", Deep.of(DEEP[..., :3], info))
    x, back = open_picture(tmp_path / "in.png")
    back(x).save(tmp_path / "out.png")
    back(x).save(tmp_path / "out.tif")
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["icc_profile"] == PROFILES["gamma"]
        assert (image.getexif()[0x0112], image.getexif()[0x010F]) == (1, "a maker")
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.pages[0].tags[34675].value == PROFILES["gamma"]


@pytest.mark.parametrize("growth", [2, 4])
def test_the_edge_of_a_mask_stays_sharp(growth):
    """One pixel of the result wide, and where it was."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    _, back = open_picture(np.dstack([np.zeros((8, 8, 3), np.uint8), mask]))
    large = back(torch.zeros(1, 3, 8 * growth, 8 * growth))[..., 3]
    assert (large[:, : 4 * growth - 1] == 0).all()
    assert (large[:, 4 * growth + 1 :] == 255).all()


def test_a_soft_mask_is_enlarged_smoothly():
    mask = np.linspace(0, 255, 8).round().astype(np.uint8) + np.zeros((8, 1), np.uint8)
    _, back = open_picture(np.dstack([np.zeros((8, 8, 3), np.uint8), mask]))
    large = back(torch.zeros(1, 3, 16, 16))[..., 3]
    expected = F.interpolate(torch.from_numpy(mask)[None, None].double(), size=(16, 16), mode="bilinear")[0, 0]
    assert_allclose(large, expected.numpy(), rtol=0, atol=0.51)
