"""A folder as people have them: pictures of every kind, and twenty kinds of trouble among them."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from skimage import data

PHOTO = data.astronaut()
KINDS = 18


def crop(i: int, height: int = 18, width: int = 20) -> NDArray[np.uint8]:
    top, left = 7 * i % 400, 13 * i % 400
    return np.ascontiguousarray(PHOTO[top : top + height, left : left + width])


def encoded(rgb: NDArray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)).save(file, kind, **options)
    return file.getvalue()


def good(i: int) -> tuple[str, bytes]:
    """Name and content of the i-th of the right files."""
    rgb, n = crop(i), f"{i:03d}"
    image = Image.fromarray(rgb)
    turned = Image.Exif()
    turned[0x0112] = 6
    alpha = np.dstack([rgb, np.full(rgb.shape[:2], 200, np.uint8)])
    deep = rgb[..., 0].astype(np.uint16) * 257
    avif = ("AVIF", f"{n}.avif") if features.check("avif") else ("PNG", f"{n}-as.png")
    return [
        lambda: (f"{n}.png", encoded(rgb, "PNG")),
        lambda: (f"trip/{n}.JPG", encoded(rgb, "JPEG")),
        lambda: (f"trip/day 1/{n}.jpeg", encoded(rgb, "JPEG", quality=30)),
        lambda: (f"{n}.WebP", encoded(rgb, "WEBP", lossless=True)),
        lambda: (f"{n}.bmp", encoded(rgb, "BMP")),
        lambda: (f"{n}.TIF", encoded(rgb, "TIFF")),
        lambda: (f"{n}.gif", encoded(rgb, "GIF")),
        lambda: (avif[1], encoded(rgb, avif[0])),
        lambda: (f"grey-{n}.png", encoded(image.convert("L"), "PNG")),
        lambda: (f"palette-{n}.png", encoded(image.convert("P"), "PNG")),
        lambda: (f"alpha-{n}.png", encoded(alpha, "PNG")),
        lambda: (f"deep-{n}.png", encoded(Image.fromarray(deep), "PNG")),
        lambda: (f"cmyk-{n}.jpg", encoded(image.convert("CMYK"), "JPEG")),
        lambda: (f"turned-{n}.jpg", encoded(rgb, "JPEG", exif=turned)),
        lambda: (f"ünï çödé {n}.png", encoded(rgb, "PNG")),
        lambda: (f"{'long' * 58}{n}.png", encoded(crop(i, 9, 9), "PNG")),
        lambda: (f"tiny-{n}.png", encoded(crop(i, 1, 1), "PNG")),
        lambda: (f"thin-{n}.png", encoded(crop(i, 1, 60), "PNG")),
    ][i % KINDS]()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def troubles() -> dict[str, bytes | None]:
    """Name -> content of what can't be restored; None is a link to nothing."""
    png, jpg, tif = (encoded(crop(3), kind) for kind in ("PNG", "JPEG", "TIFF"))
    webp, bmp, gif = (encoded(crop(3), kind) for kind in ("WEBP", "BMP", "GIF"))
    flipped = bytearray(png)
    flipped[png.index(b"IDAT") + 10] ^= 0xFF
    return {
        "bad/empty.png": b"",
        "bad/zeros.jpg": bytes(1000),
        "bad/text.jpg": b"this is no picture\n" * 20,
        "bad/page.webp": b"<!doctype html><title>404</title>",
        "bad/half.png": png[: len(png) // 2],
        "bad/half.jpg": jpg[: len(jpg) // 2],
        "bad/half.tif": tif[: len(tif) // 2],
        "bad/half.webp": webp[: len(webp) // 2],
        "bad/half.bmp": bmp[: len(bmp) // 2],
        "bad/half.gif": gif[: len(gif) // 4],
        "bad/head.png": png[:8],
        "bad/head.jpg": jpg[:2],
        "bad/head.tif": tif[:4],
        "bad/head.bmp": bmp[:14],
        "bad/head.gif": gif[:6],
        "bad/flipped.png": bytes(flipped),
        "bad/bomb.png": bomb(),
        "bad/archive.png": b"PK\x03\x04" + bytes(100),
        "bad/link.png": None,
        "bad/film.gif": b"\x00\x00\x00\x18ftypmp42" + bytes(50),
    }


def make(folder: Path, right: int = 180) -> list[str]:
    """Writes so many right files and twenty wrong ones; returns the names of the wrong ones."""
    wrong = troubles()
    for name, content in [*map(good, range(right)), *wrong.items()]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.symlink_to(folder / "nothing.png")
        else:
            path.write_bytes(content)
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as file:  # a name that is no Unicode
        file.write(encoded(crop(5), "PNG"))
    return list(wrong)
