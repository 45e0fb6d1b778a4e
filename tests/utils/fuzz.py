"""Flips bytes of pictures in ten formats: `python -m tests.utils.fuzz 20000` (the suite does 500)."""

import io
import sys
import warnings
from collections import Counter
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image
from skimage import data

from diffbir.utils.image import ImageError, read_rgb

PHOTO = data.astronaut()[100:124, 200:232]


def seeds() -> dict[str, bytes]:
    """Sound files, with EXIF and a profile where the format has them."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    exif.get_ifd(0x8769)[0x829A] = 0.01
    rgb = Image.fromarray(PHOTO)
    rgba = Image.fromarray(np.dstack([PHOTO, PHOTO[..., 0]]))
    files = {
        "JPEG": (rgb, "JPEG", {"exif": exif}),
        "JPEG CMYK": (rgb.convert("CMYK"), "JPEG", {"exif": exif}),
        "JPEG progressive": (rgb, "JPEG", {"exif": exif, "progressive": True}),
        "MPO": (rgb, "MPO", {"exif": exif, "save_all": True, "append_images": [rgb]}),
        "PNG": (rgb, "PNG", {"exif": exif}),
        "PNG palette": (rgb.quantize(8), "PNG", {"transparency": 3}),
        "WebP": (rgba, "WEBP", {"exif": exif}),
        "TIFF LZW": (rgb, "TIFF", {"exif": exif, "compression": "tiff_lzw"}),
        "TIFF JPEG": (rgb, "TIFF", {"compression": "jpeg"}),
        "BMP": (rgba, "BMP", {}),
        "GIF": (rgb.quantize(16), "GIF", {}),
    }
    found = {}
    for name, (image, format, options) in files.items():
        content = io.BytesIO()
        image.save(content, format=format, **options)
        found[name] = content.getvalue()
    deep = PHOTO.astype(np.uint16) * 257
    found["PNG 16"] = cv2.imencode(".png", deep)[1].tobytes()
    found["TIFF 16"] = cv2.imencode(".tif", deep)[1].tobytes()
    lzw = (cv2.IMWRITE_TIFF_COMPRESSION, 5)  # older versions of OpenCV store floating-point colours in LogLuv else
    found["TIFF float"] = cv2.imencode(".tif", deep.astype(np.float32) / 65535, lzw)[1].tobytes()
    return found


def damaged(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Files with 1 to 8 bytes changed, half of them among the first 400, where headers are; some cut."""
    rng = np.random.default_rng(seed)
    sound = list(seeds().items())
    for i in range(count):
        name, content = sound[i % len(sound)]
        content = np.frombuffer(content, np.uint8).copy()
        reach = min(len(content), 400) if rng.random() < 0.5 else len(content)
        content[rng.integers(0, reach, rng.integers(1, 9))] = rng.integers(0, 256)
        yield name, content[: rng.integers(1, len(content)) if rng.random() < 0.1 else None].tobytes()


def read(content: bytes, lenient: bool) -> bool:
    """Whether it is read; any exception but an `ImageError` that names the file in one line goes through."""
    try:
        rgb = read_rgb(io.BytesIO(content), "x.tif", lenient=lenient)
    except ImageError as error:
        assert str(error).startswith("x.tif "), error
        assert "\n" not in str(error), error
        return False
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3
    return True


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    results = Counter((name, read(content, i % 2 == 0)) for i, (name, content) in enumerate(damaged(int(sys.argv[1]))))
    for name in seeds():
        print(f"{name}: {results[name, True]} read, {results[name, False]} refused by name")
