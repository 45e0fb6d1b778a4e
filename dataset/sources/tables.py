"""Tables of images with captions (CSV or parquet)."""

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffbir.dataset.sources.files import Sample
from diffbir.dataset.sources.texts import Paths, Texts
from diffbir.utils.cli import UserError
from diffbir.utils.image import read_rgb
from diffbir.utils.texts import as_path, find_encoding

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

TABLES = (".csv", ".tsv", ".parquet")
SEPARATORS = ",;\t|"

log = logging.getLogger(__name__)


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
        path: the table; a CSV has its columns' names in the first line, and commas, semicolons, tabs or bars.
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
        self.paths = Paths(root, (as_path(name, root) for name in names))
        log.info("%s: %d rows", path, len(self.paths))

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
        UserError: it is missing, damaged, lacks a column or has it twice, or a row has other cells than the header.
    """
    _check_file(path)
    columns = {name: Texts() for name in names}
    for row in (_parquet if path.suffix.lower() == ".parquet" else _csv)(path, list(columns)):
        for value, column in zip(row, columns.values(), strict=True):
            column.append(value)
    return columns


def headings(path: Path, likely: Sequence[str]) -> list[str]:
    """Names of a table's columns, as they stand there.

    Args:
        likely: names of which some are expected, by which the separator is known.

    Raises:
        UserError: it is missing or damaged.
    """
    _check_file(path)
    if path.suffix.lower() == ".parquet":
        with _open_parquet(path) as file:
            return file.schema_arrow.names
    how = find_encoding(path)
    with path.open(newline="", encoding=how.encoding, errors=how.errors) as file:
        return _header(file.readline(), likely)[1]


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table ({', '.join(TABLES)})")
    if path.suffix.lower() not in TABLES:
        raise UserError(f"{path} is not a table; give one of {', '.join(TABLES)}")


def _check(path: Path, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{path} has no column '{name}'; its columns are {', '.join(known) or 'none'}")
        if known.count(name) > 1:
            raise UserError(f"{path} has {known.count(name)} columns '{name}'; rename all but one")


def _csv(path: Path, names: Sequence[str]) -> Iterator[list[str]]:
    """Cells of the named columns, row by row."""
    how, line = find_encoding(path), 1
    limit = csv.field_size_limit(2**31 - 1)  # captions may be long
    try:
        with path.open(newline="", encoding=how.encoding, errors=how.errors) as file:
            separator, known = _header(file.readline(), names)
            _check(path, names, known)
            file.seek(0)
            reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
            next(reader)
            places, line = [known.index(name) for name in names], reader.line_num + 1
            for row in reader:
                if len(row) != len(known) and "".join(row).strip():
                    raise UserError(
                        f"{path}: line {line} has {len(row)} cells, and the header {len(known)}; put a text with "
                        f"{separator!r} in it in double quotes"
                    )
                if len(row) == len(known):
                    yield [row[place] for place in places]
                line = reader.line_num + 1
    except csv.Error as error:
        hint = 'write a " within a quoted text as ""'
        raise UserError(f"{path}: the row from line {line} on is not readable ({error}); {hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a readable CSV file ({error}); write it as UTF-8") from error
    finally:
        csv.field_size_limit(limit)


def _header(line: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """The separator that gives most of the columns that are looked for, then most columns; and the columns."""
    found = []
    for separator in SEPARATORS:
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
        found.append((separator, [cell.strip() for cell in cells]))
    return max(found, key=lambda columns: (len(set(names) & set(columns[1])), len(columns[1])))


def _parquet(path: Path, names: Sequence[str]) -> Iterator[list[str | None]]:
    with _open_parquet(path) as file:
        _check(path, names, file.schema_arrow.names)
        for batch in file.iter_batches(columns=names, use_threads=False):  # they would not survive a fork
            cells = (map(_text, batch[name].to_pylist()) for name in names)
            yield from map(list, zip(*cells, strict=True))


@contextmanager
def _open_parquet(path: Path) -> Iterator["ParquetFile"]:
    """Raises:
    UserError: pyarrow is missing, or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs pyarrow; pip install pyarrow, or write the table as CSV") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} has a column that holds no texts ({error}); write one text a row") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file; write it again") from error


def _text(value: object) -> str | None:
    """A cell as text; none, and what is no number, is missing."""
    if value is None or value != value:
        return None
    if isinstance(value, list | dict):
        raise TypeError(f"a {type(value).__name__}")
    return value.decode() if isinstance(value, bytes) else str(value)
