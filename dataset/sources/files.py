"""Where pictures come from: folders, lists, tables with captions, folders of ready-made pairs.

A source numbers its pictures and reads them one at a time; `dataset.sources.shards` has another one, for tar files.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from diffbir.dataset.sources.texts import Paths
from diffbir.utils.image import image_names, read_rgb


class Sample(NamedTuple):
    """`hq` (H, W, 3) uint8 RGB; `lq` likewise and of the same size, where the source has ready-made pairs.

    `teacher`, also of that size, is what another model made of the degraded picture, where the source has such.
    """

    hq: NDArray[np.uint8]
    prompt: str = ""
    lq: NDArray[np.uint8] | None = None
    teacher: NDArray[np.uint8] | None = None


class Source(Protocol):
    """Numbered pictures that can be read in any order, from any process."""

    paired: bool  # whether samples come with `lq`

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What messages call picture `i`."""

    def key(self, i: int) -> str:
        """The name of picture `i` within the source, wherever that lies."""

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        """Reads picture `i`; `rng` draws among its captions.

        Raises:
            ImageError: it cannot be read; the message names it.
        """


class Files:
    """The images below a folder, in a list file, or one image (see `utils.image.image_names`)."""

    paired = False

    def __init__(self, source: str | Path):
        self.paths = Paths(*image_names(source))

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def key(self, i: int) -> str:
        return self.paths.names[i]

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        return Sample(read_rgb(self.paths[i]))
