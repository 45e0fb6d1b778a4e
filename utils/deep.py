"""Pictures of 16 bits in colour or with alpha, which Pillow can neither hold nor write."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffbir.utils.exif import PREFIX
from diffbir.utils.files import replacing

STRIP = 2**18  # bytes


class Deep(np.ndarray):
    """(H, W, 2 grey and alpha | 3 RGB | 4 with alpha) uint16, with `info` and `save` as a PIL image has them."""

    info: dict[str, Any]  # icc_profile, exif

    @classmethod
    def of(cls, pixels: NDArray[np.uint16], info: dict[str, Any]) -> "Deep":
        deep = np.ascontiguousarray(pixels).view(cls)
        deep.info = info
        return deep

    def __array_finalize__(self, source: Any) -> None:
        self.info = dict(getattr(source, "info", {}))

    def save(self, path: str | Path) -> None:
        """Writes PNG or TIFF with 16 bits, all other formats with 8; the file appears whole or not at all."""
        path = Path(path)
        with replacing(path) as part:
            if path.suffix.lower() in ENCODERS:
                part.write_bytes(encode(self, path.suffix, self.info))
            else:
                format = Image.registered_extensions().get(path.suffix.lower())
                eight_bits(self).save(part, format=format, **self.info)


def eight_bits(pixels: NDArray) -> Image.Image:
    """(H, W) or (H, W, 1 | 2 | 3 | 4) uint8 or uint16 as a PIL image."""
    pixels = np.asarray(pixels)
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / np.float32(257)).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def encode(pixels: NDArray[np.uint16], suffix: str, info: dict[str, Any] | None = None) -> bytes:
    """A PNG or TIFF of 16 bits.

    Args:
        pixels: (H, W) or (H, W, 1 | 2 | 3 | 4); an even number of channels ends in alpha.
        suffix: .png, .tif or .tiff.
        info: `icc_profile` and, of PNG, `exif`, as Pillow has them; all else is left out.
    """
    pixels = np.asarray(pixels)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    info = info or {}
    return ENCODERS[suffix.lower()](pixels, info.get("icc_profile"), info.get("exif"))


def _png(pixels: NDArray[np.uint16], icc: bytes | None, exif: bytes | None) -> bytes:
    height, width, channels = pixels.shape
    lines = pixels.astype(">u2").view(np.uint8).reshape(height, width, 2 * channels)
    steps = np.diff(lines, axis=1, prepend=np.uint8(0))  # filter 1: differences from the left, modulo 256
    filtered = np.concatenate([np.ones((height, 1), np.uint8), steps.reshape(height, -1)], axis=1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if icc:
        parts.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    if exif:
        parts.append((b"eXIf", exif.removeprefix(PREFIX)))
    parts += [(b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(x, zlib.crc32(k))) for k, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _tiff(pixels: NDArray[np.uint16], icc: bytes | None, exif: bytes | None) -> bytes:
    height, width, channels = pixels.shape
    rows = max(1, STRIP // (2 * width * channels))
    steps = np.diff(pixels, axis=1, prepend=np.uint16(0)).astype("<u2")  # predictor 2
    strips = [zlib.compress(steps[y : y + rows].tobytes()) for y in range(0, height, rows)]
    offsets = 8 + np.cumsum([0, *map(len, strips)])
    tags = {  # tag -> type of its numbers, numbers
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [16] * channels), 259: ("H", [8]),
        262: ("H", [1 if channels < 3 else 2]), 273: ("I", offsets[:-1].tolist()), 277: ("H", [channels]),
        278: ("I", [rows]), 279: ("I", list(map(len, strips))), 284: ("H", [1]), 317: ("H", [2]),
    }  # fmt: skip
    if channels in (2, 4):
        tags[338] = ("H", [2])
    if icc:
        tags[34675] = ("B", list(icc))
    start = int(offsets[-1] + offsets[-1] % 2)
    outside, entries = b"", b""
    for tag, (kind, numbers) in sorted(tags.items()):
        value = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        if len(value) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(outside)
            outside, value = outside + value + bytes(len(value) % 2), struct.pack("<I", place)
        entries += struct.pack("<HHI4s", tag, {"B": 7, "H": 3, "I": 4}[kind], len(numbers), value)
    body = b"".join(strips) + bytes(start - int(offsets[-1]))
    return struct.pack("<2sHI", b"II", 42, start) + body + struct.pack("<H", len(tags)) + entries + bytes(4) + outside


ENCODERS = {".png": _png, ".tif": _tiff, ".tiff": _tiff}
