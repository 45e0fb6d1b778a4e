"""Small pictures of input, stage 1 and result, from which `--compare` makes its page."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffbir.folder.writing import write
from diffbir.utils.image import to_uint8

TITLES = ("input", "stage 1", "result")
SIDE = 1024  # pixels of the longer side, at most
QUALITY = 85


def preview(base: Path, title: str) -> Path:
    return base.with_name(f"{base.name}.{title.replace(' ', '')}.jpg")


def has_previews(base: Path) -> bool:
    return all(preview(base, title).is_file() for title in TITLES)


def write_previews(base: Path, pictures: Mapping[str, Tensor]) -> None:
    """Writes (1, 3, H, W) in [0, 1] for each of `TITLES`, reduced, as `base.TITLE.jpg`."""
    for title in TITLES:
        image = Image.fromarray(to_uint8(pictures[title][0]))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        write(preview(base, title), image, QUALITY)
