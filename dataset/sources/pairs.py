"""Folders of ready-made pairs."""

from pathlib import Path

import numpy as np

from diffbir.dataset.degradations.resize import resize
from diffbir.dataset.sources.files import Sample
from diffbir.dataset.sources.texts import Paths
from diffbir.utils.cli import UserError
from diffbir.utils.image import ImageError, image_names, read_rgb


class PairFolders:
    """Ready-made pairs: every image below `hq` has one of the same relative name below `lq`.

    A low-quality image of another size is resized to that of its partner (bicubic), as inference does.
    """

    paired = True

    def __init__(self, hq: str | Path, lq: str | Path):
        folders = Path(hq).expanduser(), Path(lq).expanduser()
        if not all(folder.is_dir() for folder in folders):
            raise UserError(f"{hq} and {lq} must be folders with the same relative names in both")
        self.hq = Paths(*image_names(folders[0]))
        self.lq = Paths(folders[1], self.hq.names)
        missing = [path for path in self.lq if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} does not exist ({len(missing)} such); every image of {hq} needs its partner")

    def __len__(self) -> int:
        return len(self.hq)

    def name(self, i: int) -> str:
        return str(self.hq[i])

    def key(self, i: int) -> str:
        return self.hq.names[i]

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        hq, lq = read_rgb(self.hq[i]), read_rgb(self.lq[i])
        (height, width), (low_height, low_width) = hq.shape[:2], lq.shape[:2]
        # One pixel of rounding at the smaller size is what any downsampling may leave.
        if abs(height * low_width - width * low_height) > max(height, width):
            raise ImageError(
                f"{self.lq[i]} ({low_width} x {low_height}) has not the shape of {self.hq[i]} ({width} x {height}); "
                "correct or remove the pair"
            )
        if lq.shape != hq.shape:
            lq = resize(lq, height, width, "bicubic")
        return Sample(hq, lq=lq)
