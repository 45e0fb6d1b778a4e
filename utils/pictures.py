"""Pictures as people hold them (files, PIL images, numpy arrays, tensors) to float32 NCHW RGB in [0, 1], and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from diffbir.utils.cli import UserError
from diffbir.utils.decode import decode
from diffbir.utils.deep import Deep
from diffbir.utils.exif import upright
from diffbir.utils.image import to_tensor
from diffbir.utils.profiles import parse, to_srgb, unit_srgb
from diffbir.utils.raster import Raster, white

Picture = str | Path | Image.Image | NDArray | Tensor
Back = Callable[[Tensor], Any]  # (B, 3, h, w) RGB in [0, 1], any size -> a picture of the kind that came in

WHITE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's
SLACK = 1e-3  # how far resizing or rounding may have left [0, 1]


def open_picture(picture: Picture) -> tuple[Tensor, Back]:
    """Brings a picture into the form that networks take.

    A grey picture becomes three equal channels, and grey again on the way back. Alpha is set aside, and put back at the
    size of the result.

    Args:
        picture: a path, which comes back as a PIL image (L, LA, RGB, RGBA, or I;16 of 16-bit grey) or, of 16 bits in
            colour or with alpha, as `utils.deep.Deep`; in the colours of its profile, with `info` of profile and EXIF;
            a PIL image, of which the upright sRGB version is taken (16-bit greyscale stays so, palettes become RGB);
            an array (H, W) or (H, W, 1 | 3 | 4), uint8, uint16 or floats in [0, 1];
            a tensor (C, H, W) or (B, C, H, W) of floats in [0, 1] with 1, 3 or 4 channels, on any device.

    Returns:
        (B, 3, H, W) float32 RGB in [0, 1], and what turns a result into the same kind of picture.

    Raises:
        UserError: something else; an unreadable file is an `ImageError`.
    """
    if isinstance(picture, (str, Path)):
        return _open_file(decode(picture, lenient=True))
    if isinstance(picture, Image.Image):
        array = _array(picture)
        x, back = _open_array(array)
        return x, lambda y: Image.fromarray(back(y))
    if isinstance(picture, np.ndarray):
        if picture.ndim != 2 and (picture.ndim != 3 or picture.shape[-1] not in (1, 3, 4)):
            raise UserError(
                f"a picture as an array is (H, W), or (H, W, C) with 1, 3 or 4 channels, not {picture.shape}; "
                "transpose it, or give several as a list"
            )
        return _open_array(picture)
    if isinstance(picture, Tensor):
        return _open_tensor(picture)
    raise UserError(
        f"a picture is a path, a PIL image, a numpy array or a tensor, not {type(picture).__name__}; convert it"
    )


def check_images(x: Tensor, channels: tuple[int, ...] = (3,)) -> None:
    """Refuses what isn't (B, C, H, W) of floats in [0, 1].

    Raises:
        UserError: in one sentence.
    """
    allowed = " or ".join(map(str, channels))
    if not x.is_floating_point():
        raise UserError(f"a tensor of pictures holds floats in [0, 1], not {x.dtype}; divide it by its largest value")
    if x.ndim != 4 or x.shape[1] not in channels:
        raise UserError(
            f"a tensor of pictures is (C, H, W) or (B, C, H, W) with {allowed} channels, not {tuple(x.shape)}; "
            "permute or convert it"
        )
    _check_range(x)


def _check_range(x: Tensor) -> None:
    if 0 in x.shape:
        raise UserError(f"a picture has at least one pixel; this one's shape is {tuple(x.shape)}")
    low, high = (float(v) for v in x.aminmax())
    if not (low >= -SLACK and high <= 1 + SLACK):  # so that NaN is refused too
        raise UserError(f"a picture of floats lies in [0, 1], and this one in [{low:g}, {high:g}]; rescale it")


def _open_tensor(picture: Tensor) -> tuple[Tensor, Back]:
    single = picture.ndim == 3
    batch = picture[None] if single else picture
    check_images(batch, (1, 3, 4))
    x, join = _split(batch.detach().float())

    def back(y: Tensor) -> Tensor:
        y = join(y.to(picture.device)).to(picture.dtype, copy=True)
        return y[0] if single else y

    return x, back


def _open_file(raster: Raster) -> tuple[Tensor, Back]:
    """A file's colours as sRGB, and back into its own with its bits; CMYK and profiles of tables come back as sRGB."""
    profile = parse(raster.icc, raster.colour.shape[2])
    info = {"icc_profile": raster.icc} if profile else {}
    if raster.exif:
        info["exif"] = upright(raster.exif)
    x = unit_srgb(raster)
    grey, eight = x.shape[2] == 1, raster.colour.dtype == np.uint8
    if raster.alpha is not None:
        alpha = raster.alpha[..., None] / np.float32(white(raster.alpha.dtype))
        x = np.concatenate([x, alpha], axis=-1)
    x, join = _split(to_tensor(x)[None])

    def back(y: Tensor) -> Image.Image | Deep:
        y = join(y.float())[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        if profile:
            colours = 1 if grey else 3
            y = np.concatenate([profile.from_srgb(y[..., :colours]), y[..., colours:]], axis=-1)
        y = np.rint(y * (255 if eight else 65535)).astype(np.uint8 if eight else np.uint16)
        y = y[..., 0] if y.shape[2] == 1 else y
        if y.ndim == 3 and not eight:
            return Deep.of(y, dict(info))
        image = Image.fromarray(y)
        image.info |= info
        return image

    return x, back


def _open_array(array: NDArray) -> tuple[Tensor, Back]:
    floats = np.issubdtype(array.dtype, np.floating)
    if not floats and array.dtype not in WHITE:
        raise UserError(f"a picture as an array is uint8, uint16 or floats in [0, 1], not {array.dtype}; convert it")
    white = 1 if floats else WHITE[array.dtype]
    flat = array.ndim == 2
    channels_last = array[..., None] if flat else array
    x = torch.from_numpy(np.array(channels_last.transpose(2, 0, 1), dtype=np.float32, order="C")).div_(white)[None]
    _check_range(x)
    x, join = _split(x)

    def back(y: Tensor) -> NDArray:
        y = join(y)[0].permute(1, 2, 0).clamp(0, 1).mul(white)
        y = (y if floats else y.round()).cpu().numpy().astype(array.dtype)
        return np.ascontiguousarray(y[..., 0] if flat else y)

    return x, back


def _split(x: Tensor) -> tuple[Tensor, Back]:
    """Colour of (B, 1 | 2 | 3 | 4, H, W) as RGB, and what gives a result the channels of x again."""
    colour, alpha = (x[:, :-1], x[:, -1:]) if x.shape[1] in (2, 4) else (x, None)
    grey = colour.shape[1] == 1

    def join(y: Tensor) -> Tensor:
        y = (y * y.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True) if grey else y
        if alpha is None:
            return y
        return torch.cat([y, _resized(alpha, y.shape[-2:])], dim=1)

    return colour.clamp(0, 1).expand(-1, 3, -1, -1), join


def _resized(alpha: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, H, W) at another size; where it is only 0 and 1, its edges stay one pixel wide."""
    if alpha.shape[-2:] == size:
        return alpha
    resized = F.interpolate(alpha, size, mode="bilinear", antialias=True)
    growth = min(size[0] / alpha.shape[-2], size[1] / alpha.shape[-1])
    if growth > 1 and ((alpha == 0) | (alpha == 1)).all():
        resized = ((resized - 0.5) * growth + 0.5).clamp(0, 1)
    return resized


def _array(image: Image.Image) -> NDArray:
    """Pixels as they are meant to be seen: (H, W) or (H, W, 2 | 3 | 4), the last of an even number being alpha."""
    image = ImageOps.exif_transpose(image)  # a copy: the caller's stays as it is
    if image.mode == "F":
        return np.asarray(image)
    if image.mode.startswith("I"):
        return np.asarray(image).clip(0, 65535).astype(np.uint16)
    colour = np.asarray(to_srgb(image))
    if image.mode in ("1", "L", "LA", "La"):
        colour = colour[..., :1]
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        colour = np.concatenate([colour, alpha[..., None]], axis=-1)
    return colour[..., 0] if colour.shape[-1] == 1 else colour
