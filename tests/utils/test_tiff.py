"""Every layout of TIFF against tifffile: read as that reads it, or refused by name."""

import io
import itertools
import logging

import cv2
import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from diffbir.utils.decode import decode
from diffbir.utils.image import ImageError, read_rgb

TIFFTAG_PREDICTOR = 317  # cv2 names it since 4.8
SHAPE = 21, 37  # neither of them a multiple of a tile's 16
COLOURS = {"miniswhite": 1, "minisblack": 1, "rgb": 3, "separated": 4}
UNSIGNED = ["uint8", "uint16", "float16", "float32", "float64"]  # those whose white is known
LAYOUTS = {
    "strips": {},
    "short strips": {"rowsperstrip": 4},
    "tiles": {"tile": (16, 16)},
    "deflate": {"compression": "zlib", "rowsperstrip": 5},
    "deflated tiles": {"compression": "zlib", "tile": (16, 32)},
    "differences": {"compression": "zlib", "predictor": 2, "rowsperstrip": 5},
    "differences in tiles": {"compression": "zlib", "predictor": 2, "tile": (16, 16)},
    "BigTIFF": {"bigtiff": True},
}


def samples(dtype: str, channels: int, separate: bool = False) -> NDArray:
    rng = np.random.default_rng(channels)
    shape = (channels, *SHAPE) if separate else (*SHAPE, channels)
    shape = SHAPE if channels == 1 else shape
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def written(x: NDArray, **options) -> io.BytesIO:
    content = io.BytesIO()
    tifffile.imwrite(content, x, **options)
    content.seek(0)
    return content


def meant(x: NDArray, photometric: str, extra: str | None = None) -> NDArray:
    """What samples (H, W, C) of a known type mean: RGB over white, in 0 to 255."""
    x = x.astype(np.float64) / (1 if x.dtype.kind == "f" else np.iinfo(x.dtype).max)
    colour = x[..., : COLOURS[photometric]]
    if photometric == "miniswhite":
        colour = 1 - colour
    if photometric == "separated":
        colour = (1 - colour[..., :3]) * (1 - colour[..., 3:])
    alpha = x[..., COLOURS[photometric] :] if extra in ("unassalpha", "assocalpha") else 1
    colour = colour.clip(0, alpha) if extra == "assocalpha" else colour * alpha
    return np.broadcast_to(255 * (colour + 1 - alpha), (*SHAPE, 3))


def channels_last(file: io.BytesIO, separate: bool) -> NDArray:
    x = tifffile.imread(file)
    file.seek(0)
    return x[..., None] if x.ndim == 2 else x.transpose(1, 2, 0) if separate else x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("photometric", COLOURS)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_every_layout_of_every_type_is_read_as_tifffile_reads_it(planar, photometric, layout):
    separate, options = planar == "separate", LAYOUTS[layout]
    extras = [None, "unassalpha", "unspecified", *(["assocalpha"] if photometric in ("minisblack", "rgb") else [])]
    for dtype, extra, byteorder in itertools.product(UNSIGNED, extras, "<>"):
        number = COLOURS[photometric] + (extra is not None)
        if (separate and number == 1) or (options.get("predictor") and dtype.startswith("float")):
            continue  # nothing to separate; differences of floats have a test of their own
        file = written(
            samples(dtype, number, separate),
            photometric=photometric,
            planarconfig=planar if number > 1 else None,
            extrasamples=extra and [extra],
            byteorder=byteorder,
            **options,
        )
        expected = meant(channels_last(file, separate), photometric, extra)
        # Colours that were multiplied by alpha, or are of inks, are rounded once more.
        atol = 1.01 if dtype == "uint8" and (extra == "assocalpha" or photometric == "separated") else 0.51
        assert_allclose(read_rgb(file, "x"), expected, rtol=0, atol=atol, err_msg=f"{dtype} {extra} {byteorder}")


@pytest.mark.parametrize("photometric", COLOURS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_bit_is_kept(photometric, dtype):
    x = samples(dtype, COLOURS[photometric])
    raster = decode(written(x, photometric=photometric, planarconfig=None if x.ndim == 2 else "contig"), "x")
    x = x.reshape(raster.colour.shape)
    expected = x if photometric != "miniswhite" else (1 if dtype == "float32" else np.iinfo(dtype).max) - x
    assert_array_equal(raster.colour, expected)
    assert raster.colour.dtype == dtype


@pytest.mark.parametrize("depth", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("compression", [5, 8, 32773, 32946])
def test_what_opencv_writes_with_libtiff_is_read(depth, channels, compression, tmp_path):
    """LZW, deflate and PackBits with the predictors that libtiff chooses for them."""
    x = samples(depth, channels)
    flags = [cv2.IMWRITE_TIFF_COMPRESSION, compression]
    if compression != 32773:
        flags += [TIFFTAG_PREDICTOR, 3 if depth == "float32" else 2]
    assert cv2.imwrite(str(tmp_path / "x.tif"), x if channels == 1 else x[..., [2, 1, 0, 3][:channels]], flags)
    raster = decode(tmp_path / "x.tif")
    assert_array_equal(raster.colour, x.reshape(*SHAPE, -1)[..., :3])
    if channels == 4:
        assert_array_equal(raster.alpha, x[..., 3])


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma", "raw"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I;16"])
def test_what_pillow_writes_is_read(mode, compression):
    x = samples("uint8", 3)
    image = Image.fromarray(x).convert(mode) if mode != "I;16" else Image.fromarray(samples("uint16", 1))
    content = io.BytesIO()
    try:
        image.save(content, format="TIFF", compression=compression)
    except (OSError, RuntimeError):
        pytest.skip(f"this libtiff has no {compression}")
    content.seek(0)
    expected = np.rint(np.asarray(image) / 257) if mode == "I;16" else np.asarray(image.convert("RGB"))
    if mode == "CMYK":
        expected = meant(np.asarray(image), "separated")
    assert_allclose(read_rgb(content, "x"), expected.reshape(*SHAPE, -1) + np.zeros(3), rtol=0, atol=1)


@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "L"])
def test_jpeg_inside_is_read_as_opencv_reads_it(mode, tmp_path):
    photo = data.astronaut()[100:132, 200:240]
    Image.fromarray(photo).convert(mode).save(tmp_path / "x.tif", compression="jpeg", quality=95)
    expected = cv2.imread(str(tmp_path / "x.tif"))[..., ::-1]
    assert_allclose(read_rgb(tmp_path / "x.tif").astype(int), expected, rtol=0, atol=4)
    assert mode == "L" or np.abs(expected.astype(int) - photo).mean() < 4


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", [0, 1, 3])
def test_few_bits_and_palettes(bits, photometric):
    """By the book: lines are packed from the highest bit on, and levels are spread over black to white."""
    levels = np.random.default_rng(bits).integers(0, 2**bits, SHAPE)
    lines = np.packbits(np.unpackbits(levels.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(21, -1), 1)
    colours = np.random.default_rng(9).integers(0, 256, (3, 2**bits))
    tags = {
        256: (4, [37]), 257: (4, [21]), 258: (3, [bits]), 259: (3, [1]), 262: (3, [photometric]), 273: (4, [8]),
        277: (3, [1]), 278: (4, [21]), 279: (4, [lines.size]),
    }  # fmt: skip
    if photometric == 3:
        tags[320] = (3, (colours * 257).ravel().tolist())
    expected = colours.T[levels] if photometric == 3 else np.rint(levels / (2**bits - 1) * 255)[..., None]
    if photometric == 0:
        expected = 255 - expected
    assert_array_equal(read_rgb(classic(tags, lines.tobytes()), "x"), expected + np.zeros((1, 1, 3)))


def classic(tags: dict[int, tuple[int, list[int]]], body: bytes) -> io.BytesIO:
    """A TIFF whose pixels come first, at 8."""
    at = 8 + len(body) + len(body) % 2
    outside, entries = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        value = np.array(values, {3: "<u2", 4: "<u4"}[kind]).tobytes()
        if len(value) > 4:
            place = at + 2 + 12 * len(tags) + 4 + len(outside)
            outside, value = outside + value, place.to_bytes(4, "little")
        entries += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + len(values).to_bytes(4, "little")
        entries += value.ljust(4, b"\0")
    head = b"II*\0" + at.to_bytes(4, "little") + body.ljust(at - 8, b"\0")
    return io.BytesIO(head + len(tags).to_bytes(2, "little") + entries + bytes(4) + outside)


def test_reversed_bits():
    """FillOrder 2 of old fax machines."""
    x = samples("uint16", 1)
    body = np.packbits(np.unpackbits(x.astype("<u2").view(np.uint8).reshape(-1, 1), axis=1)[:, ::-1], axis=1)
    tags = {256: [37], 257: [21], 258: [16], 259: [1], 262: [1], 266: [2], 273: [8], 277: [1], 278: [21]}
    file = classic({tag: (4 if tag == 273 else 3, value) for tag, value in tags.items()}, body.tobytes())
    assert_array_equal(decode(file, "x").colour[..., 0], x)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_upright(orientation, dtype):
    x = samples(dtype, 3)
    flip = {
        1: x, 2: x[:, ::-1], 3: x[::-1, ::-1], 4: x[::-1], 5: x.transpose(1, 0, 2), 6: np.rot90(x, -1),
        7: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90(x, 1),
    }[orientation]  # fmt: skip
    file = written(x, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    assert_array_equal(decode(file, "x").colour, flip)


# Ranges


def float_file(
    *values: float, dtype: str = "float32", low: float | None = None, high: float | None = None
) -> io.BytesIO:
    """Grey floats, of which the last 1000 are 0.5, perhaps with a declared range."""
    x = np.concatenate([np.array(values, dtype), np.full(1000, 0.5, dtype)])[None]
    tags = [] if high is None else [(340, 12, 1, low, True), (341, 12, 1, high, True)]
    return written(x, photometric="minisblack", extratags=tags)


def levels(file: io.BytesIO, count: int) -> list[int]:
    return read_rgb(file, "x")[0, :count, 0].tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_highlight_is_clipped_and_leaves_the_rest_alone(dtype, caplog):
    assert levels(float_file(0, 0.2, 1, 1.01, 7.3, -0.1, dtype=dtype), 7) == [0, 51, 255, 255, 255, 0, 128]
    assert "1 is taken as white, and 2 samples of up to 7.3 are clipped to it" in caplog.text


def test_what_is_not_finite_leaves_the_rest_alone(caplog):
    assert levels(float_file(np.nan, np.inf, -np.inf, 0.2), 5) == [0, 255, 0, 51, 128]
    assert "3 samples are not finite: NaN is read as black, infinity as white" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint32", "int16", "int32"])
def test_a_declared_range_counts(dtype, caplog):
    x = np.array([[10, 20, 60, 110, 200]], dtype)
    file = written(x, photometric="minisblack", extratags=[(340, 12, 1, 10.0, True), (341, 12, 1, 110.0, True)])
    assert levels(file, 5) == [0, round(255 * 0.1), round(255 * 0.5), 255, 255]
    assert "10 is read as black and 110 as white, as the file declares" in caplog.text


def test_32_bit_integers_that_use_their_range(caplog):
    x = np.array([[0, 2**31, 2**32 - 1, 51 * 2**32 // 255]], np.uint32)
    assert levels(written(x, photometric="minisblack"), 4) == [0, 128, 255, 51]
    assert "0 is taken as black and 4294967295 as white" in caplog.text


RAMP = np.linspace(0, 255, 21 * 37).reshape(SHAPE)


@pytest.mark.parametrize(
    "x, words",
    [
        (RAMP.astype(np.float32), "holds 32-bit floats up to 255, and nothing says which is white"),
        (np.rint(RAMP).astype(np.float64), "holds 64-bit floats up to 255"),
        ((RAMP > 254).astype(np.float32) * 255, "holds 32-bit floats up to 255"),
        (RAMP.astype(np.float16) * 100, "holds 16-bit floats up to 25504"),
        (np.where(RAMP < 100, np.nan, 0.5).astype(np.float32), "are not finite"),
        (RAMP.astype(np.uint32), "holds 32-bit integers from 0 to 255, and nothing says which are black and white"),
        (RAMP.astype(np.uint64), "holds 64-bit integers from 0 to 255"),
        (RAMP.astype(np.int16), "holds 16-bit signed integers from 0 to 255"),
        (RAMP.astype(np.int32) * -9, "holds 32-bit signed integers from -2295 to 0"),
        ((RAMP / 2).astype(np.int8), "holds 8-bit signed integers from 0 to 127"),
    ],
)
def test_a_range_that_nobody_can_know_is_refused(x, words):
    with pytest.raises(ImageError) as caught:
        read_rgb(written(x, photometric="minisblack"), "x.tif")
    assert str(caught.value).startswith("x.tif holds")
    assert words in str(caught.value)


# Refusals


@pytest.mark.parametrize(
    "options, channels, dtype, words",
    [
        ({"photometric": "rgb", "extrasamples": ["unassalpha", "unspecified"]}, 5, "uint8", "of 5 channels"),
        ({"photometric": "rgb", "extrasamples": ["unspecified"] * 2}, 5, "uint16", "of 5 channels"),
        ({"photometric": "minisblack", "extrasamples": ["unspecified"] * 3}, 4, "uint8", "of 4 channels"),
        ({"photometric": "separated", "extrasamples": ["assocalpha"]}, 5, "uint8", "inks are multiplied by its alpha"),
        ({"photometric": "cielab"}, 3, "uint8", "in CIELAB"),
        ({"photometric": "cielab"}, 3, "uint16", "in CIELAB"),
        ({"photometric": "cfa"}, 1, "uint16", "a raw photo"),
        ({"photometric": "ycbcr"}, 3, "uint8", "colour space 6"),
        ({"photometric": "rgb"}, 3, "complex64", "64 bits with samples of type 6"),
        ({"photometric": "separated", "extratags": [(332, 3, 1, 2, True)]}, 4, "uint8", "other inks than CMYK"),
    ],
)
def test_what_is_not_read_is_refused_by_name(options, channels, dtype, words):
    x = samples("float32", channels).astype(dtype) if dtype == "complex64" else samples(dtype, channels)
    with pytest.raises(ImageError) as caught:
        read_rgb(written(x, planarconfig="contig" if channels > 1 else None, **options), "x.tif")
    assert str(caught.value).startswith("x.tif is a TIFF")
    assert words in str(caught.value)
    assert "save it" in str(caught.value)


def test_alpha_that_is_not_declared_is_left_out_and_that_is_said(caplog):
    x = samples("uint16", 4)
    with caplog.at_level(logging.WARNING):
        read_rgb(written(x, photometric="rgb", extrasamples=["unspecified"]), "x")
    assert caplog.messages == ["x: a channel that isn't declared as alpha is left out"]
