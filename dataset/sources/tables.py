"""Tables of images with captions (CSV or parquet)."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffbir.dataset.sources.files import Sample
from diffbir.dataset.sources.texts import Paths, Texts
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
    """A CSV or parquet file with one image a row, and captions. Its text is held in memory once for all loaders.

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
        if not len(names):
            raise UserError(f"{path} has no rows; write one image a row")
        empty = [row for row, name in enumerate(names, start=1) if not name]
        if empty:
            raise UserError(f"{path}: row {empty[0]} has no '{image}' ({len(empty)} such); remove the row")
        self.paths = Paths(root, names)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def key(self, i: int) -> str:
        return self.paths.names[i]

    def texts(self, i: int) -> dict[str, str]:
        return {name: column[i] for name, column in self.columns.items()}

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        return Sample(read_rgb(self.paths[i]), self.captions.draw(self.texts(i), rng))


def read_table(path: Path, names: Sequence[str]) -> dict[str, Texts]:
    """Columns of a CSV or parquet file as text; what is missing is empty.

    Raises:
        UserError: it is missing, damaged, or lacks a column.
    """

    def check(known: list[str]) -> None:
        for name in names:
            if name not in known:
                raise UserError(f"{path} has no column '{name}'; its columns are {', '.join(known) or 'none'}")

    columns = {name: Texts() for name in names}
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table ({', '.join(TABLES)})")
    if path.suffix.lower() == ".csv":
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                check(list(reader.fieldnames or []))
                for row in reader:
                    for name, column in columns.items():
                        column.append(row[name])
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a readable CSV file ({error}); write it as UTF-8") from error
        return columns
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise UserError(f"{path} needs pyarrow; pip install pyarrow, or write the table as CSV") from error
        try:
            with parquet.ParquetFile(path) as file:
                check(file.schema_arrow.names)
                for batch in file.iter_batches(columns=[*columns], use_threads=False):  # they would not survive a fork
                    for name, column in columns.items():
                        for value in batch[name].to_pylist():
                            column.append(None if value is None else str(value))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a readable parquet file; write it again") from error
        return columns
    raise UserError(f"{path} is not a table; give one of {', '.join(TABLES)}")
