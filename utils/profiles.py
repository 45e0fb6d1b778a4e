"""Colour profiles (ICC.1): 8 bits by littleCMS, as Pillow has it; deeper, and back again, in floats here."""

import io
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from diffbir.utils.raster import Raster, white

# Linear sRGB -> XYZ under D50, the illuminant of profiles (IEC 61966-2-1, adapted by Bradford as in ICC.1 annex E)
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GRID = np.linspace(0, 1, 2**16)


@dataclass(frozen=True)
class Profile:
    """A profile of curves and a matrix, or of one curve for grey: those that can be undone exactly."""

    curves: tuple[NDArray, ...]  # 1 or 3, each of values at GRID, not falling
    matrix: NDArray | None  # (3, 3): linear RGB -> XYZ under D50

    def to_srgb(self, x: NDArray) -> NDArray:
        """(H, W, 1 | 3) in [0, 1] -> the same in sRGB; what sRGB doesn't have is clipped."""
        y = np.stack([np.interp(x[..., i], GRID, curve) for i, curve in enumerate(self.curves)], axis=-1)
        return _encoded(y if self.matrix is None else y @ (np.linalg.inv(SRGB) @ self.matrix).T).astype(np.float32)

    def from_srgb(self, x: NDArray) -> NDArray:
        """The way back."""
        y = _linear(x.astype(np.float64))
        y = y if self.matrix is None else (y @ (np.linalg.inv(self.matrix) @ SRGB).T).clip(0, 1)
        x = np.stack([np.interp(y[..., i], curve, GRID) for i, curve in enumerate(self.curves)], axis=-1)
        return x.astype(np.float32)


def parse(icc: bytes | None, channels: int) -> Profile | None:
    """A profile for 1 or 3 channels; None if it is another kind (with tables), for other colours, or broken."""
    try:
        (count,) = struct.unpack_from(">I", icc, 128)
        tags = {k: icc[i : i + n] for k, i, n in struct.iter_unpack(">4sII", icc[132 : 132 + 12 * count])}
        if icc[16:20] != {1: b"GRAY", 3: b"RGB "}[channels] or b"A2B0" in tags:
            return None
        if channels == 1:
            return Profile((_curve(tags[b"kTRC"]),), None)
        columns = [struct.unpack_from(">3i", tags[name], 8) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
        matrix = np.array(columns).T / 2**16
        np.linalg.inv(matrix)
        return Profile(tuple(_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC")), matrix)
    except (TypeError, KeyError, ValueError, struct.error, np.linalg.LinAlgError):
        return None


def _curve(tag: bytes) -> NDArray:
    """Values at GRID of a curveType or parametricCurveType (ICC.1, 10.6 and 10.18)."""
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        values = np.array(struct.unpack_from(f">{count}H", tag, 12))
        if count == 0:
            return GRID
        if count == 1:
            return GRID ** (values[0] / 256)
        y = np.interp(GRID, np.linspace(0, 1, count), values / 65535)
    elif tag[:4] == b"para":
        (kind,) = struct.unpack_from(">H", tag, 8)
        values = np.array(struct.unpack_from(f">{(1, 3, 4, 5, 7)[kind]}i", tag, 12)) / 2**16
        g, a, b, c, d, e, f = (*values, *(1, 0, 0, 0, 0, 0)[len(values) - 1 :])
        if kind in (1, 2):  # flat below -b/a
            c, d, e, f = 0, -b / a, c, c
        y = np.where(d <= GRID, (a * GRID + b).clip(0) ** g + e, c * GRID + f)
    else:
        raise ValueError("no curve")
    if y[-1] <= y[0]:
        raise ValueError("a curve that falls")
    return np.maximum.accumulate(y.clip(0, 1))


def _linear(x: NDArray) -> NDArray:
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def _encoded(y: NDArray) -> NDArray:
    y = y.clip(0, 1)
    return np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)


def unit_srgb(raster: Raster) -> NDArray:
    """(H, W, 1 grey | 3 RGB) float32 sRGB in [0, 1], at the depth of the file."""
    x, channels = raster.colour, raster.colour.shape[2]
    if profile := parse(raster.icc, channels) if channels != 4 else None:
        return profile.to_srgb(x / np.float32(white(x.dtype)))
    if raster.icc and (
        x.dtype == np.uint8 or converts(raster.icc, channels)
    ):  # by tables, which littleCMS has in 8 bits
        eight = x if x.dtype == np.uint8 else np.rint(x / white(x.dtype) * 255).astype(np.uint8)
        rgb = np.asarray(to_srgb(as_image(eight, raster.icc)))
        return (rgb / 255).astype(np.float32)[..., : 1 if channels == 1 else 3]
    x = x / np.float32(white(x.dtype))
    return x if channels != 4 else (1 - x[..., :3]) * (1 - x[..., 3:])


def converts(icc: bytes, channels: int) -> bool:
    """Whether littleCMS takes the profile for so many channels."""
    image = Image.new({1: "L", 3: "RGB", 4: "CMYK"}[channels], (1, 1))
    return _by_profile(image, icc) is not None


def as_image(colour: NDArray[np.uint8], icc: bytes | None = None) -> Image.Image:
    """(H, W, 1 | 3 | 4 CMYK) uint8 as a PIL image with this profile."""
    height, width, channels = colour.shape
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    image = Image.frombuffer(mode, (width, height), np.ascontiguousarray(colour), "raw", mode, 0, 1)
    image.info["icc_profile"] = icc
    return image


def to_srgb(image: Image.Image) -> Image.Image:
    """Any mode of 8 bits -> RGB in sRGB by its profile; alpha is dropped."""
    profile = image.info.get("icc_profile")
    if image.mode not in ("RGB", "CMYK", "L"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    if profile and (converted := _by_profile(image, profile)):
        return converted
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large photo takes long


def _by_profile(image: Image.Image, icc: bytes) -> Image.Image | None:
    """In sRGB; None if the profile is broken or another's: then the pixel values as they stand are the best guess."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
