"""Where pictures come from: folders, lists, tables with captions, folders of ready-made pairs.

A source numbers its pictures and reads them one at a time; `dataset.shards` has another one, for tar files.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dataset.resize import resize
from utils.cli import UserError
from utils.image import ImageError, list_images, read_rgb

TABLES = (".csv", ".parquet")


class Sample(NamedTuple):
    """`hq` (H, W, 3) uint8 RGB; `lq` likewise and of the same size, where the source has ready-made pairs."""

    hq: NDArray[np.uint8]
    prompt: str = ""
    lq: NDArray[np.uint8] | None = None


class Source(Protocol):
    """Numbered pictures that can be read in any order, from any process."""

    paired: bool  # whether samples come with `lq`

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What messages call picture `i`."""

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        """Reads picture `i`; `rng` draws among its captions.

        Raises:
            ImageError: it cannot be read; the message names it.
        """


class Files:
    """The images below a folder, in a list file, or one image (see `utils.image.list_images`)."""

    paired = False

    def __init__(self, source: str | Path):
        self.paths = list_images(source)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        return Sample(read_rgb(self.paths[i]))


class PairFolders:
    """Ready-made pairs: every image below `hq` has one of the same relative name below `lq`.

    A low-quality image of another size is resized to that of its partner (bicubic), as inference does.
    """

    paired = True

    def __init__(self, hq: str | Path, lq: str | Path):
        self.hq, root = list_images(hq), Path(hq).expanduser()
        if not root.is_dir() or not Path(lq).expanduser().is_dir():
            raise UserError(f"{hq} and {lq} must be folders with the same relative names in both")
        self.lq = [Path(lq).expanduser() / path.relative_to(root) for path in self.hq]
        missing = [path for path in self.lq if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} does not exist ({len(missing)} such); every image of {hq} needs its partner")

    def __len__(self) -> int:
        return len(self.hq)

    def name(self, i: int) -> str:
        return str(self.hq[i])

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


class Captions:
    """Draws the prompt of a picture among its texts.

    Args:
        probs: probability of each text by its name (a table's column, a JSON field), e.g. `{long: 0.2, short: 0.6}`;
            what they lack to 1 is the probability of the empty prompt. A text that is missing is empty too.
    """

    def __init__(self, probs: Mapping[str, float] | None = None):
        self.names = list(probs or {})
        self.probs = [*(probs or {}).values()]
        self.probs.append(1 - sum(self.probs))
        if min(self.probs) < -1e-9:
            raise ValueError(f"captions must have probabilities from 0 to 1 with a sum of at most 1, not {dict(probs)}")

    def draw(self, texts: Mapping[str, str | None], rng: np.random.Generator) -> str:
        if not self.names:
            return ""
        probs = np.clip(self.probs, 0, None)
        choice = rng.choice(len(probs), p=probs / probs.sum())
        return (texts.get(self.names[choice]) or "") if choice < len(self.names) else ""


class Table:
    """A CSV or parquet file with one image a row, and captions. Held in memory; for tens of millions use shards.

    Args:
        path: the table; a CSV has its columns' names in the first line and is UTF-8.
        image: column of the image paths.
        captions: see `Captions`; columns by name.
        root: folder that the paths start from (default: that of the table).
    """

    paired = False

    def __init__(
        self,
        path: str | Path,
        image: str = "image",
        captions: Mapping[str, float] | None = None,
        root: str | Path | None = None,
    ):
        path = Path(path).expanduser()
        self.captions = Captions(captions)
        self.columns = read_table(path, [image, *self.captions.names])
        root = path.parent if root is None else Path(root).expanduser()
        names = self.columns.pop(image)
        if not names:
            raise UserError(f"{path} has no rows; write one image a row")
        empty = [row for row, name in enumerate(names, start=1) if not name]
        if empty:
            raise UserError(f"{path}: row {empty[0]} has no '{image}' ({len(empty)} such); remove the row")
        self.paths = [root / name for name in names]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def texts(self, i: int) -> dict[str, str | None]:
        return {name: column[i] for name, column in self.columns.items()}

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        return Sample(read_rgb(self.paths[i]), self.captions.draw(self.texts(i), rng))


def read_table(path: Path, names: list[str]) -> dict[str, list[str | None]]:
    """Columns of a CSV or parquet file as text.

    Raises:
        UserError: it is missing, damaged, or lacks a column.
    """

    def check(known: list[str]) -> None:
        for name in names:
            if name not in known:
                raise UserError(f"{path} has no column '{name}'; its columns are {', '.join(known) or 'none'}")

    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table ({', '.join(TABLES)})")
    if path.suffix.lower() == ".csv":
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                check(list(reader.fieldnames or []))
                rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a readable CSV file ({error}); write it as UTF-8") from error
        return {name: [row[name] for row in rows] for name in names}
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise UserError(f"{path} needs pyarrow; pip install pyarrow, or write the table as CSV") from error
        try:
            check(parquet.read_schema(path).names)
            table = parquet.read_table(path, columns=names, use_threads=False)  # threads would not survive a fork
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file; write it again") from error
        return {name: [None if v is None else str(v) for v in table[name].to_pylist()] for name in names}
    raise UserError(f"{path} is not a table; give one of {', '.join(TABLES)}")
