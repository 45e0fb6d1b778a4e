"""Files to pixels. Every decoder has its own gaps and its own exceptions; past this door there are none of either."""

import logging
import math
import os
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffbir.utils import exif, tiff
from diffbir.utils.cli import UserError
from diffbir.utils.raster import Raster, Unsupported, scaled

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit refuses, or it is none

UPRIGHT = {  # orientation (EXIF) -> what turns (H, W, ...) upright
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
JPEG_END = b"\xff\xd9"
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd9]")  # that begins a segment
REMEDY = "replace or remove it"
LIMIT = "DIFFBIR_MAX_PIXELS"  # of the environment


class ImageError(UserError):
    """An image file that cannot be read; the message names it."""


def decode(file: str | Path | BinaryIO, name: str | None = None, *, lenient: bool = False) -> Raster:
    """Reads an image file; what was assumed is logged as a warning.

    Args:
        file: a path, or an open file.
        name: what messages call it (default: the path).
        lenient: also reads a JPEG that has all pixels and lacks only its end marker.

    Raises:
        ImageError: missing, damaged, too large, not an image, or of a kind that isn't read right.
    """
    name = name or str(file)
    with _named(name), open(file, "rb") if isinstance(file, (str, Path)) else nullcontext(file) as stream:
        raster = _decode(stream, lenient)
    for note in raster.notes:
        log.warning("%s: %s", name, note)
    return raster


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever a decoder raises becomes an `ImageError` that says what is wrong with the file and what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(f"{name} cannot be opened ({error.strerror}); {REMEDY}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image that can be read here; {REMEDY}") from error
    except Image.DecompressionBombError as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        raise ImageError(
            f"{name} has {pixels} pixels, and the limit is {pixel_limit()}; if the file is to be trusted, "
            f"--max-megapixels {math.ceil(pixels / 1e6)} of the command line raises it, or {LIMIT}={pixels} in the "
            "environment"
        ) from error
    except Unsupported as error:
        raise ImageError(f"{name} {error}") from error
    except MemoryError as error:
        raise ImageError(f"{name} does not fit into memory; make it smaller or remove it") from error
    except Exception as error:  # Pillow's plugins raise what their parsing happens to raise
        raise ImageError(f"{name} is damaged ({' '.join(str(error).split())}); {REMEDY}") from error


def pixel_limit() -> int:
    """Pictures of more pixels are refused, by default what Pillow refuses."""
    limit = Image.MAX_IMAGE_PIXELS
    return 2**62 if limit is None else 2 * limit  # Pillow warns above its limit, and refuses above twice that


@contextmanager
def limited_to(pixels: int) -> Iterator[None]:
    """Within it the limit is another, also in processes that are started there."""
    before = os.environ.get(LIMIT), Image.MAX_IMAGE_PIXELS
    os.environ[LIMIT], Image.MAX_IMAGE_PIXELS = str(pixels), _for_pillow(pixels)
    try:
        yield
    finally:
        os.environ.pop(LIMIT)
        if before[0] is not None:
            os.environ[LIMIT] = before[0]
        Image.MAX_IMAGE_PIXELS = before[1]


def _for_pillow(limit: int) -> int:
    return -(-limit // 2)


if number := os.environ.get(LIMIT):  # Pillow knows no limit for a single call
    if not number.isdecimal():
        raise UserError(f"{LIMIT} is a number of pixels, not '{number}'")
    Image.MAX_IMAGE_PIXELS = _for_pillow(int(number))


def _decode(stream: BinaryIO, lenient: bool) -> Raster:
    head = stream.read(32)
    stream.seek(0)
    if head[:4] in tiff.MAGIC:
        if found := tiff.read(stream, pixel_limit()):
            raster, orientation = found
            return _upright(raster, orientation)
        stream.seek(0)
    try:
        return _read(stream, head)
    except ValueError:
        if head[:8] != PNG:
            raise
        stream.seek(0)  # too much text: generators of pictures keep their settings in it
        return _read(BytesIO(_without_texts(stream.read())), head)
    except OSError as error:
        if not lenient or head[:2] != JPEG or "truncated" not in str(error):
            raise
        stream.seek(0)
        raster = _without_end(stream.read(), head)
        if raster is None:
            raise
        return raster


def _read(stream: BinaryIO, head: bytes) -> Raster:
    """What Pillow reads right, or with a little help."""
    with Image.open(stream) as image:
        moves = image.format != "MPO" and getattr(image, "is_animated", False)  # of an MPO, the rest is the other eye's
        notes = ["only the first picture of several is read"] if moves else []
        image.load()
        if image.format == "PNG":
            colour, alpha = _png(image, stream, *head[24:26])
        else:
            colour, alpha = _channels(image)
        if colour.dtype not in (np.uint8, np.uint16):
            colour, assumed = scaled(colour)
            notes += assumed
        if image.format in ("BMP", "DIB") and alpha is not None and not alpha.any():
            alpha = None
            notes.append("its alpha is 0 everywhere and ignored, as by viewers")
        data, turned = image.info.get("exif"), 1
        try:  # Pillow also knows other places
            turned = exif.orientation(data) if data else image.getexif().get(exif.ORIENTATION, 1)
        except Exception:  # as many kinds as there are ways to break EXIF
            data = None
            notes.append("its EXIF data cannot be read, so that it may not be upright")
        profile = image.info.get("icc_profile")
        return _upright(Raster(colour, alpha, profile or None, data or None, tuple(notes)), turned)


def _upright(raster: Raster, orientation: object) -> Raster:
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return raster
    alpha = raster.alpha if raster.alpha is None else np.ascontiguousarray(turn(raster.alpha))
    return replace(raster, colour=np.ascontiguousarray(turn(raster.colour)), alpha=alpha)


def _channels(image: Image.Image) -> tuple[NDArray, NDArray | None]:
    """(H, W, C) and alpha of a loaded image of any mode."""
    if image.mode[0] in "IF":  # deeper than 8 bits, which Pillow would clip instead of scale
        deep = np.asarray(image)[..., None]
        return (deep if image.mode == "F" or deep.min() < 0 or deep.max() > 65535 else deep.astype(np.uint16)), None
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        rgba = np.asarray(image if image.mode == "RGBA" else image.convert("RGBA"))
        return rgba[..., :1] if grey else rgba[..., :3], rgba[..., 3]
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if grey else "RGB")
    return np.atleast_3d(np.asarray(image)), None


def _png(image: Image.Image, stream: BinaryIO, bits: int, kind: int) -> tuple[NDArray, NDArray | None]:
    """A PNG with its samples of 16 bits and its transparent colour, as its header has them."""
    transparent = image.info.pop("transparency", None) if kind in (0, 2) else None
    colour, alpha = _channels(image)
    if bits == 16 and kind != 0:  # of which Pillow keeps the high bytes; it has checked the file for damage, though
        stream.seek(0)
        samples = cv2.imdecode(np.frombuffer(stream.read(), np.uint8), cv2.IMREAD_UNCHANGED)  # B G R A
        colour = np.ascontiguousarray(samples[..., :1] if kind == 4 else samples[..., 2::-1])
        alpha = np.ascontiguousarray(samples[..., 3]) if kind in (4, 6) else None
    if transparent is not None:
        white = np.iinfo(colour.dtype).max
        level = np.array(transparent) * (white // (2**bits - 1)) if bits > 1 else white * bool(transparent)
        alpha = np.where((colour == level).all(axis=-1), 0, white).astype(colour.dtype)
    return colour, alpha


def _without_texts(content: bytes) -> bytes:
    """A PNG without its texts."""
    parts, start = [content[: len(PNG)]], len(PNG)
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            parts.append(content[start:end])
        start = end
    return b"".join(parts)


def _without_end(content: bytes, head: bytes) -> Raster | None:
    """A JPEG that lacks its end marker; None if it lacks more: then what follows its end shows in the picture."""
    if not _all_scans(content):
        return None
    content = content.rstrip(b"\xff")
    ends = (_read(BytesIO(content + tail + JPEG_END), head) for tail in (b"", b"\x55\xaa" * 64))
    first, second = (replace(raster, notes=(*raster.notes, "its end marker is missing")) for raster in ends)
    return first if np.array_equal(first.colour, second.colour) else None


def _all_scans(content: bytes) -> bool:
    """Whether the scans that a JPEG has begun bring every coefficient of every component to its last bit."""
    start, components, missing = 2, 0, {}
    while found := MARKER.search(content, start):
        marker, start = content[found.start() + 1], found.end()
        length, body = struct.unpack_from(">H", content, start)[0], content[start + 2 :]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            components = body[5]
        elif marker == 0xDA:
            first, last, approximation = body[1 + 2 * body[0] : 4 + 2 * body[0]]
            for i in range(body[0]):
                bits = missing.setdefault(body[1 + 2 * i], [1] * 64)
                bits[first : last + 1] = [approximation & 15] * (last + 1 - first)
        start += length
    return 0 < components == len(missing) and not any(map(any, missing.values()))
