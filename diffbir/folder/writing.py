"""Results as files of any format, which appear whole or not at all."""

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from diffbir.utils.choices import FORMATS
from diffbir.utils.cli import UserError
from diffbir.utils.deep import encode
from diffbir.utils.files import no_room, replacing

# Ending of a file -> what Pillow calls its format.
KINDS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP",
    ".avif": "AVIF",
}  # fmt: skip
ENDINGS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tif", "bmp": ".bmp", "avif": ".avif"}
OF_16_BITS = ("PNG", "TIFF")
WITH_ALPHA = ("PNG", "TIFF", "WEBP", "AVIF")
METADATA = {"PNG": ("exif", "icc_profile", "dpi"), "JPEG": ("exif", "icc_profile", "dpi"),
            "TIFF": ("exif", "icc_profile", "dpi"), "WEBP": ("exif", "icc_profile"), "AVIF": ("exif", "icc_profile"),
            "BMP": ("dpi",)}  # fmt: skip
CARRIED = ("exif", "icc_profile", "dpi")  # from an input to its result
LOSSLESS = 100  # the quality at which WebP and AVIF lose nothing, or next to nothing

Written = Image.Image | NDArray  # PIL image, or (H, W) or (H, W, 1 | 2 | 3 | 4) uint8 or uint16


class WriteError(Exception):
    """One result cannot be written in this format; the message says why."""


def check_format(format: str) -> None:
    """Raises:
    UserError: this Pillow cannot write it.
    """
    for name in ("avif", "webp"):
        if format == name and not features.check(name):
            raise UserError(f"--format {name} needs another Pillow: pip install --upgrade pillow; or take png")


def ending_of(path: str, format: str, suffix: str = "") -> str:
    """Ending of the result of an input: for `same` its own, or .png where that cannot be written."""
    if format != FORMATS[-1]:
        return suffix + ENDINGS[format]
    own = os.path.splitext(path)[1].lower()
    own = {".jpe": ".jpg", ".jfif": ".jpg", ".mpo": ".jpg"}.get(own, own)
    writable = own in KINDS and (own != ".avif" or features.check("avif"))
    return suffix + (own if writable else ".png")


def write(path: Path, picture: Written, quality: int = 95, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a picture in the format of the path's ending.

    16 bits stay so in PNG and TIFF. What a format can't hold is brought to what it can: 8 bits, RGB, alpha over white.

    Args:
        quality: of JPEG, WebP and AVIF, from 1 to 100; WebP of 100 is lossless.
        metadata: `exif`, `icc_profile` and `dpi` as Pillow takes them; what the format can't hold is left out.

    Raises:
        WriteError: the format can't hold this picture, such as one of too many pixels.
        UserError: the folder can't be written to; no result can.
    """
    kind = KINDS[path.suffix.lower()]
    try:
        if isinstance(picture, np.ndarray) and picture.dtype == np.uint16 and kind in OF_16_BITS:
            data = encode(picture, path.suffix, metadata)
        else:
            image = fitting(to_pil(picture), kind)
            own = {k: v for k, v in (metadata or {}).items() if k in METADATA[kind] and v}
            memory = io.BytesIO()  # Pillow, writing to a file, doesn't notice a full disk
            image.save(memory, format=kind, **settings_of(kind, quality), **own)
            data = memory.getbuffer()
        with replacing(path) as part, part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # so that no power cut leaves an empty file that counts as done
    except (OSError, ValueError) as error:
        raise failure(error, path) from error


def write_result(path: Path, picture: Written, quality: int = 95) -> None:
    """Writes what comes back from `utils.pictures.open_picture`, with the metadata of the file that it came from.

    Raises:
        WriteError, UserError: see `write`.
    """
    info = getattr(picture, "info", {})
    write(path, picture, quality, {key: info[key] for key in CARRIED if key in info})


def settings_of(kind: str, quality: int) -> dict[str, Any]:
    """What Pillow calls them."""
    if kind == "JPEG":
        return {"quality": quality, "subsampling": 0 if quality >= 90 else 2}
    if kind == "WEBP":
        return {"lossless": True} if quality >= LOSSLESS else {"quality": quality, "exact": True}
    return {"AVIF": {"quality": quality}, "TIFF": {"compression": "tiff_adobe_deflate"}}.get(kind, {})


def to_pil(picture: Written) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    picture = picture[..., 0] if picture.ndim == 3 and picture.shape[-1] == 1 else picture
    if picture.dtype == np.uint16:
        picture = np.rint(picture / 257).astype(np.uint8)
    return Image.fromarray(picture)


def fitting(image: Image.Image, kind: str) -> Image.Image:
    """The image in a mode that the format holds."""
    if image.mode.startswith("I;16") and kind not in OF_16_BITS:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("LA", "RGBA", "PA", "P") and image.has_transparency_data and kind not in WITH_ALPHA:
        rgba = image.convert("RGBA")
        grey = image.mode == "LA"
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("L" if grey else "RGB")
    if image.mode not in ("L", "RGB") and kind in ("JPEG", "BMP"):
        return image.convert("RGB")
    return image


def failure(error: Exception, path: Path) -> Exception:
    """Tells what is wrong with this one result from what is wrong with the folder."""
    reason = no_room(error) or (error.strerror if isinstance(error, OSError) and error.errno else None)
    too_long = isinstance(error, OSError) and error.errno in (36, 63)  # ENAMETOOLONG of Linux and macOS
    if reason and not too_long:
        return UserError(
            f"{path} cannot be written ({reason}); make room or choose another --output, and the same command goes on"
        )
    return WriteError(f"{path} cannot be written ({error}); choose another --format or a shorter name")


def check_output(folder: Path) -> None:
    """Writes and removes a file in the output folder, or in the folder that it will be made in.

    Raises:
        UserError: it can't be written to.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(f"--output {folder}: {there} is a file; choose another folder")
    probe = there / f".{os.getpid()}.part"
    try:
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written to ({error.strerror}); choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
