"""Files as people have them: metadata that is broken, chunks that are large, ends that are missing, and worse."""

import io
import logging
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from skimage import data

from diffbir.utils.decode import decode
from diffbir.utils.image import ImageError, read_rgb
from tests.utils import fuzz

PHOTO = data.astronaut()[100:132, 200:240]  # (32, 40, 3), not symmetric in any way


def saved(image: Image.Image, format: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, format=format, **options)
    return content.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: NDArray, bits: int, kind: int, *chunks: bytes) -> bytes:
    """A PNG by the book, of samples (H, W, C)."""
    samples = samples.astype(">u2") if bits == 16 else samples.astype(np.uint8)
    height, width = samples.shape[:2]
    if bits < 8:
        levels = np.unpackbits(samples.reshape(height, width, 1), axis=2)[:, :, 8 - bits :]
        lines = np.packbits(levels.reshape(height, -1), axis=1)
    else:
        lines = samples
    body = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Metadata


def exif(orientation: int, tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF data with an orientation and one more tag, in the order that TIFF asks for."""
    entries = sorted([(0x0112, struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)),
                      (tag, struct.pack("<HHI4s", tag, kind, count, value))])  # fmt: skip
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(entry for _, entry in entries) + bytes(4)


TAGS = {
    "a pointer to EXIF that is text": (0x8769, 2, 4, b"abc\0"),
    "a pointer to GPS that is a float": (0x8825, 11, 1, struct.pack("<f", 1.5)),
    "a pointer past the end": (0x8769, 4, 1, struct.pack("<I", 2**31)),
    "a resolution that is text": (0x011A, 2, 4, b"abc\0"),
    "a unit that is text": (0x0128, 2, 4, b"abc\0"),
    "a maker that is a number": (0x010F, 3, 1, b"\1\0\0\0"),
    "a software that is a double past the end": (0x0131, 12, 9, struct.pack("<I", 2**30)),
    "an unknown type": (0x010F, 77, 1, b"\1\0\0\0"),
}
FORMATS = {
    "JPEG": {"quality": 95},
    "MPO": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
}


@pytest.mark.parametrize("kind", [*FORMATS, "CMYK"])
@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_of_an_unexpected_type_leaves_the_orientation(kind, tag):
    format = "JPEG" if kind == "CMYK" else kind
    image = Image.fromarray(PHOTO).convert("CMYK") if kind == "CMYK" else Image.fromarray(PHOTO)
    content = saved(image, format, exif=exif(6, *TAGS[tag]), **FORMATS[format])
    upright = saved(image, format, **FORMATS[format])
    assert_array_equal(read_rgb(io.BytesIO(content), "x"), np.rot90(read_rgb(io.BytesIO(upright), "x"), -1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("broken", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*"])
def test_sound_pixels_with_unreadable_metadata_are_read_with_a_warning(format, broken, caplog):
    content = saved(Image.fromarray(PHOTO), format, exif=broken, **FORMATS[format])
    plain = saved(Image.fromarray(PHOTO), format, **FORMATS[format])
    with caplog.at_level(logging.WARNING):
        assert_array_equal(read_rgb(io.BytesIO(content), "photo"), read_rgb(io.BytesIO(plain), "plain"))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["photo: its EXIF data cannot be read, so that it may not be upright"]


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("last", [False, True])
def test_a_png_with_much_text_is_read(kind, last, monkeypatch):
    """Generators of pictures keep their settings in it: more than the 64 MB (1 MB if deflated) of Pillow."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**20)  # to be faster
    text = b"workflow " * 200_000
    body = {
        b"tEXt": b"workflow\0" + text,
        b"zTXt": b"workflow\0\0" + zlib.compress(text),
        b"iTXt": b"workflow\0\1\0\0\0" + zlib.compress(text),
    }[kind]
    plain = saved(Image.fromarray(PHOTO), "PNG")
    at = len(plain) - 12 if last else 8 + 25  # before IEND or after IHDR
    content = plain[:at] + chunk(kind, body) + plain[at:]
    with pytest.raises(ValueError, match=r"(?i)text|too large"):
        Image.open(io.BytesIO(content)).load()
    assert_array_equal(read_rgb(io.BytesIO(content), "x"), PHOTO)


def test_the_first_picture_of_several_is_read_and_that_is_said(caplog):
    others = [Image.fromarray(PHOTO[::-1])]
    for format, options in {"PNG": {}, "WEBP": {"lossless": True}, "GIF": {}, "TIFF": {}}.items():
        first = Image.fromarray(PHOTO) if format != "GIF" else Image.fromarray(PHOTO).quantize(16)
        content = saved(first, format, save_all=True, append_images=others, **options)
        caplog.clear()
        assert_array_equal(read_rgb(io.BytesIO(content), "x"), np.asarray(first.convert("RGB")))
        assert [record.getMessage() for record in caplog.records] == ["x: only the first picture of several is read"]
    mpo = saved(Image.fromarray(PHOTO), "MPO", save_all=True, append_images=others, quality=100, subsampling=0)
    caplog.clear()
    assert np.abs(read_rgb(io.BytesIO(mpo), "x").astype(int) - PHOTO).max() <= 3
    assert not caplog.records


# Ends


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_marker_is_read_where_that_is_allowed(options, mode, missing, caplog):
    content = saved(Image.fromarray(PHOTO).convert(mode), "JPEG", **options)
    assert content.endswith(b"\xff\xd9")
    whole = read_rgb(io.BytesIO(content), "x")
    with pytest.raises(ImageError, match="x is damaged"):
        read_rgb(io.BytesIO(content[:-missing]), "x")
    assert_array_equal(read_rgb(io.BytesIO(content[:-missing]), "x", lenient=True), whole)
    assert [record.getMessage() for record in caplog.records] == ["x: its end marker is missing"]


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_jpeg_that_lacks_pixels_is_refused_even_there(options):
    content = saved(Image.fromarray(PHOTO), "JPEG", **options)
    scans = [m.start() for m in re.finditer(rb"\xff\xda", content)]
    cuts = {int(kept * len(content)) for kept in (0.5, 0.7, 0.9)} | {len(content) - 8} | set(scans)
    for end in sorted(cuts):
        with pytest.raises(ImageError, match=r"x is (damaged|not an image)"):
            read_rgb(io.BytesIO(content[:end]), "x", lenient=True)


# Alpha


@pytest.mark.parametrize(
    "bits, kind, levels",
    [(bits, 0, 2**bits - 1) for bits in (1, 2, 4, 8, 16)] + [(bits, 2, 2**bits - 1) for bits in (8, 16)],
)
def test_the_transparent_colour_of_a_png_is_laid_over_white(bits, kind, levels):
    """By the book: a pixel is transparent if all of its samples, at the file's depth, are those of tRNS."""
    rng = np.random.default_rng(bits)
    samples = rng.integers(0, levels, (6, 7, 3 if kind else 1), endpoint=True)
    samples[2, 3:5] = samples[1, 1]
    if bits == 16:
        samples[4, 4] = samples[1, 1] ^ 1  # the same high byte
    content = png(samples, bits, kind, chunk(b"tRNS", samples[1, 1].astype(">u2").tobytes()))
    transparent = (samples == samples[1, 1]).all(axis=-1, keepdims=True)
    expected = np.where(transparent, 255, np.rint(samples / levels * 255))
    assert_array_equal(read_rgb(io.BytesIO(content), "x"), np.broadcast_to(expected, (6, 7, 3)))


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_of_16_bits_keeps_every_bit(kind, channels):
    samples = np.random.default_rng(kind).integers(0, 65536, (6, 7, channels))
    raster = decode(io.BytesIO(png(samples, 16, kind)), "x")
    assert raster.colour.dtype == np.uint16
    assert_array_equal(raster.colour, samples[..., : 1 if channels < 3 else 3])
    if channels in (2, 4):
        assert_array_equal(raster.alpha, samples[..., -1])
    else:
        assert raster.alpha is None


def bmp(alpha: int) -> bytes:
    """A BMP of 32 bits with masks for four channels."""
    pixels = np.dstack([PHOTO[::-1, :, ::-1], np.full(PHOTO.shape[:2], alpha, np.uint8)]).tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, PHOTO.shape[1], PHOTO.shape[0], 1, 32, 3, len(pixels), 0, 0, 0, 0)
    header += masks + b"BGRs" + bytes(48)
    return struct.pack("<2sIHHI", b"BM", 14 + 108 + len(pixels), 0, 0, 14 + 108) + header + pixels


def test_a_bmp_whose_alpha_is_0_everywhere_is_not_white(caplog):
    assert_array_equal(read_rgb(io.BytesIO(bmp(0)), "x"), PHOTO)
    assert "alpha is 0 everywhere" in caplog.text
    assert np.abs(read_rgb(io.BytesIO(bmp(102)), "x") - (0.4 * PHOTO + 0.6 * 255)).max() <= 0.51


# Limits and messages


def test_a_picture_over_the_limit_is_said_to_be_that(tmp_path):
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    words = (
        f"{path} has 200000000 pixels, and the limit is 178956970; if the file is to be trusted, --max-megapixels 200 "
    )
    with pytest.raises(ImageError, match=re.escape(words)):
        read_rgb(path)


@pytest.mark.parametrize("limit, words", [("1280", "it was read"), ("1278", "has 1280 pixels, and the limit is 1278")])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_the_limit_can_be_set(tmp_path, limit, words, format):
    Image.fromarray(PHOTO).save(tmp_path / "x", format)
    code = "import sys; from diffbir.utils.decode import decode; decode(sys.argv[1]); print('it was read')"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x"],
        env={"DIFFBIR_MAX_PIXELS": limit, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert words in run.stdout + run.stderr


@pytest.mark.parametrize("mode, words", [(0o000, "Permission denied"), (None, "Is a directory")])
def test_what_cannot_be_opened_is_said_to_be_that(tmp_path, mode, words):
    if mode is None:
        path = tmp_path
    else:
        path = tmp_path / "locked.png"
        path.touch(mode)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")
    with pytest.raises(ImageError, match=f"{re.escape(str(path))} cannot be opened .*{words}"):
        read_rgb(path)


# Anything


@pytest.mark.filterwarnings("ignore")
def test_whatever_a_damaged_file_holds_it_is_read_or_refused_by_name():
    assert all(fuzz.read(content, lenient=False) for content in fuzz.seeds().values())
    results = [fuzz.read(content, lenient=i % 2 == 0) for i, (_, content) in enumerate(fuzz.damaged(500))]
    assert 100 < sum(results) < 400
