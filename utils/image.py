"""Image files: the only place where images are uint8 (H, W, 3); everywhere else they are float32 NCHW RGB in [0, 1]."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffbir.utils.cli import UserError
from diffbir.utils.decode import ImageError, decode
from diffbir.utils.deep import eight_bits, encode
from diffbir.utils.profiles import as_image, to_srgb, unit_srgb
from diffbir.utils.raster import white
from diffbir.utils.texts import list_lines

__all__ = ["ImageError"]  # of `read_rgb`

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def list_images(source: str | Path) -> list[Path]:
    """All images of a source, see `image_names`."""
    folder, names = image_names(source)
    return [folder / name for name in names]


def image_names(source: str | Path) -> tuple[Path, Iterator[str]]:
    """All images below a folder (recursive, sorted), in a list file (one path a line, relative to it), or one file.

    Returns:
        A folder, and the names relative to it (or absolute), which are found while they are iterated over.

    Raises:
        UserError: the source doesn't exist or (while iterating) holds no image.
    """
    source = Path(source).expanduser()
    if source.is_dir():
        return source, _some(
            _walk(source), f"no images in {source}; looked for {', '.join(SUFFIXES)} in it and its folders"
        )
    if not source.is_file():
        raise UserError(f"{source} does not exist; give a folder of images, an image, or a text file listing images")
    if source.suffix.lower() in SUFFIXES:
        return source.parent, iter([source.name])
    empty = f"the list {source} is empty; write one image path a line, relative to the list's folder"
    return source.parent, _some(_lines(source), empty)


def _walk(folder: Path, below: str = "") -> Iterator[str]:
    """Names of the images below a folder, in the order of the names on the way to them."""
    try:
        with os.scandir(folder / below) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except PermissionError:  # such as lost+found of a whole disk
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, f"{below}{entry.name}/")
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file():
            yield below + entry.name


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from list_lines(path)
    except UserError as error:
        raise UserError(f"{path} is neither an image ({', '.join(SUFFIXES)}) nor a list of images: {error}") from error


def _some(names: Iterator[str], otherwise: str) -> Iterator[str]:
    """The names, of which there must be one."""
    first = next(names, None)
    if first is None:
        raise UserError(otherwise)
    yield first
    yield from names


def read_rgb(file: str | Path | BinaryIO, name: str | None = None, *, lenient: bool = False) -> NDArray[np.uint8]:
    """Reads an image as it is meant to be seen: upright (EXIF), in sRGB (ICC), alpha laid over white.

    Args:
        file: a path, or an open file.
        name: what messages call it (default: the path).
        lenient: also reads a JPEG that has all pixels and lacks only its end marker.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: missing, damaged, too large, or nothing that is read right; see docs/pictures.md.
    """
    raster = decode(file, name, lenient=lenient)
    if raster.colour.dtype == np.uint8:
        rgb = (
            np.asarray(to_srgb(as_image(raster.colour, raster.icc)))
            if raster.icc or raster.colour.shape[2] != 3
            else raster.colour
        )
    else:
        rgb = 255 * np.broadcast_to(unit_srgb(raster), (*raster.colour.shape[:2], 3))
    if raster.alpha is not None:
        alpha = raster.alpha[..., None] / np.float32(white(raster.alpha.dtype))
        rgb = rgb * alpha + 255 * (1 - alpha)
    return rgb if rgb.dtype == np.uint8 else np.rint(rgb).astype(np.uint8)


def write_png(path: str | Path, picture: NDArray | Image.Image) -> None:
    """Writes a picture as PNG, with the profile and EXIF of its `info`; the file appears whole or not at all.

    Args:
        picture: (H, W) or (H, W, 1 | 2 | 3 | 4) uint8 or uint16, a PIL image, or a `utils.deep.Deep`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    info = {k: v for k, v in getattr(picture, "info", {}).items() if k in ("icc_profile", "exif")}
    try:
        if isinstance(picture, np.ndarray) and picture.dtype == np.uint16:
            part.write_bytes(encode(picture, ".png", info))
        else:
            image = picture if isinstance(picture, Image.Image) else eight_bits(picture)
            image.save(part, format="PNG", **info)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_tensor(rgb: NDArray) -> Tensor:
    """(H, W, 3) uint8, or float in [0, 1] -> (3, H, W) float32 in [0, 1]."""
    x = torch.from_numpy(np.array(rgb.transpose(2, 0, 1), dtype=np.float32, order="C"))
    return x.div_(255) if rgb.dtype == np.uint8 else x


def to_uint8(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) in [0, 1], clamped -> (H, W, 3) uint8."""
    return image.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def side_by_side(images: dict[str, NDArray]) -> NDArray[np.uint8]:
    """Equally large pictures (arrays as `write_png` takes them) next to each other, each with its title above."""
    height, width = next(iter(images.values())).shape[:2]
    bar, gap = 22, 4
    canvas = Image.new("RGB", ((width + gap) * len(images) - gap, height + bar), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, image) in enumerate(images.items()):
        left = i * (width + gap)
        draw.text((left + 4, 3), title, fill="black", font=ImageFont.load_default(14))
        canvas.paste(eight_bits(image).convert("RGB"), (left, bar))
    return np.asarray(canvas)
