"""Folders of ready-made pairs."""

from pathlib import Path

import numpy as np

from diffbir.dataset.degradations.resize import resize
from diffbir.dataset.sources.files import Sample
from diffbir.dataset.sources.texts import Paths
from diffbir.utils.cli import UserError
from diffbir.utils.image import ImageError, image_names, read_rgb


def folder(path: str | Path) -> Path:
    """A path that must be a folder."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path} is no folder; pairs are folders that hold the same relative names")
    return path


class PairFolders:
    """Ready-made pairs: every image below `hq` has one of the same relative name below `lq`.

    A low-quality image of another size is resized to that of its partner (bicubic), as inference does.

    Args:
        teacher: a folder with what another model makes of every `lq`, likewise; None is without.
    """

    paired = True

    def __init__(self, hq: str | Path, lq: str | Path, teacher: str | Path | None = None):
        self.hq = Paths(*image_names(folder(hq)))
        self.others = {"lq": self.partners(hq, lq)}
        if teacher is not None:
            self.others["teacher"] = self.partners(hq, teacher)

    def partners(self, hq: str | Path, path: str | Path) -> Paths:
        paths = Paths(folder(path), self.hq.names)
        missing = [p for p in paths if not p.is_file()]
        if missing:
            raise UserError(f"{missing[0]} does not exist ({len(missing)} such); every image of {hq} needs its partner")
        return paths

    def __len__(self) -> int:
        return len(self.hq)

    def name(self, i: int) -> str:
        return str(self.hq[i])

    def key(self, i: int) -> str:
        return self.hq.names[i]

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        hq = read_rgb(self.hq[i])
        height, width = hq.shape[:2]
        others = {name: read_rgb(paths[i]) for name, paths in self.others.items()}
        for name, image in others.items():
            own_height, own_width = image.shape[:2]
            # One pixel of rounding at the smaller size is what any downsampling may leave.
            if abs(height * own_width - width * own_height) > max(height, width):
                raise ImageError(
                    f"{self.others[name][i]} ({own_width} x {own_height}) has not the shape of {self.hq[i]} "
                    f"({width} x {height}); correct or remove the pair"
                )
            if image.shape != hq.shape:
                others[name] = resize(image, height, width, "bicubic")
        return Sample(hq, **others)
