"""Tables of images with captions (CSV or parquet)."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffbir.dataset.sources.files import Sample
from diffbir.utils.cli import UserError
from diffbir.utils.image import read_rgb

TABLES = (".csv", ".parquet")


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
