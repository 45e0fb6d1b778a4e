"""Photos to try the page with."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffbir.folder.inputs import SUFFIXES
from diffbir.utils.cli import UserError
from diffbir.utils.config import ROOT
from diffbir.utils.image import read_rgb

DEMO = ROOT / "inputs" / "demo"  # in a checkout
SIDE = 160  # pixels of the longer side of thumbnails

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A photo, and a small picture of it that browsers show."""

    path: Path
    thumbnail: Path


def find_examples(folder: Path | None, place: Path) -> Iterator[Example]:
    """The photos of a folder, by default the demo photos where they are here; thumbnails go to `place`.

    Raises:
        UserError: the folder doesn't exist.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--examples {folder} is no folder; give one with photos")
    folder, found = folder or DEMO, []
    if folder.is_dir():
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    for i, path in enumerate(found):
        try:
            image = Image.fromarray(read_rgb(path, lenient=True))
        except UserError as error:
            log.warning("%s; it is no example then", error)
            continue
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        thumbnail = place / f"{i}.jpg"
        image.save(thumbnail, quality=90)
        yield Example(path, thumbnail)
