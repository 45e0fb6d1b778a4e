"""A prompt for each image: from a table, or from text files beside the images."""

import os
from collections.abc import Sequence
from pathlib import Path

from diffbir.dataset.sources.tables import headings, read_table
from diffbir.folder.inputs import Source
from diffbir.utils.cli import UserError

SIDECAR = "sidecar"
PATH, PROMPT, NEGATIVE = ("path", "file", "image"), ("prompt", "caption"), ("negative_prompt",)


class Prompts:
    """Prompt and negative prompt of images.

    Args:
        default: for images that have none of their own.
        table: path, name or relative name -> prompts.
        sidecar: whether `photo.txt` beside `photo.jpg` holds its prompt.
    """

    def __init__(
        self,
        default: tuple[str, str],
        table: dict[str, tuple[str, str]] | None = None,
        sidecar: bool = False,
    ):
        self.default, self.table, self.sidecar = default, table or {}, sidecar
        self.used: set[str] = set()

    def of(self, source: Source) -> tuple[str, str]:
        """Raises:
        UserError: its text file can't be read.
        """
        for key in (source.path, source.name, os.path.basename(source.path)):
            if key in self.table:
                self.used.add(key)
                own = self.table[key]
                return own[0] or self.default[0], own[1] or self.default[1]
        text = Path(source.path).with_suffix(".txt")
        if self.sidecar and text.is_file():
            return " ".join(_read(text).split()) or self.default[0], self.default[1]
        return self.default

    @property
    def unused(self) -> list[str]:
        return [key for key in self.table if key not in self.used]


def read_prompts(where: str | None, default: tuple[str, str], sources: Sequence[Source] = ()) -> Prompts:
    """Args:
        where: `sidecar`, or a table (see `dataset.sources.tables`) with the headings: path (relative to
            the input folder, to the table's own, or absolute; the name alone where there is just one), prompt, and
            negative_prompt if wanted.

    Raises:
        UserError: the table can't be read, lacks a column, or a name in it means several images.
    """
    if where is None or where == SIDECAR:
        return Prompts(default, sidecar=where == SIDECAR)
    path = Path(where).expanduser()
    names = _columns(path)
    columns = read_table(path, [name for name in names if name])
    by_path = {source.path for source in sources} | {source.name for source in sources}
    by_name: dict[str, list[str]] = {}
    for source in sources:
        by_name.setdefault(os.path.basename(source.path), []).append(source.name)

    def key(name: str) -> str:
        """The way in which a name of the table means one of the images."""
        name = name.replace("\\", "/")
        for candidate in (name, os.path.abspath(path.parent / name)):
            if candidate in by_path:
                return candidate
        same = by_name.get(name, ())
        if len(same) > 1:
            raise UserError(f"'{name}' in {path} means {same[0]} and {same[1]}; write the path below the input folder")
        return name

    table: dict[str, tuple[str, str]] = {}
    for row in zip(*columns.values(), strict=True):
        cells = dict(zip(columns, map(str.strip, row), strict=True))
        name, *own = (cells.get(heading, "") for heading in names)
        if name:
            table[key(name)] = tuple(own)
    return Prompts(default, table)


def _columns(path: Path) -> list[str | None]:
    """Headings of the columns for paths, prompts and negative prompts; of the last, None if there is none."""
    known = headings(path, (*PATH, *PROMPT, *NEGATIVE))
    found = [next((text for text in known if text.lower() in names), None) for names in (PATH, PROMPT, NEGATIVE)]
    for names, heading in zip((PATH, PROMPT), found, strict=False):
        if heading is None:
            raise UserError(f"{path} has no column '{names[0]}'; its first line holds the headings: path,prompt")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8 ({error}); save it as such") from error
