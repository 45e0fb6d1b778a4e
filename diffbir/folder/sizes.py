"""How large an image is, and how large its result becomes."""

import contextlib
import warnings
from dataclasses import dataclass

from PIL import Image

ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap the sides

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class Target:
    """The size of results where it isn't `--upscale`; both None leave it to that.

    Args:
        long_side: pixels of the longer side.
        box: the largest size of the same shape that fits in.
    """

    long_side: int | None = None
    box: Size | None = None

    def factor(self, size: Size, upscale: float) -> float:
        """Output size over input size."""
        if self.long_side is not None:
            return self.long_side / max(size)
        if self.box is not None:
            return min(self.box[0] / size[0], self.box[1] / size[1])
        return upscale


def enlarged(size: Size, factor: float) -> Size:
    """As `Restorer.restore` rounds."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def header_size(path: str) -> Size | None:
    """Upright size of an image by its header alone; None if that can't be read."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # decoders raise anything on damaged bytes
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            size = image.size
            return size[::-1] if image.getexif().get(ORIENTATION) in LYING else size
    return None
