"""Text files as people have them: their encoding, the ends of their lines, and paths written in them."""

import codecs
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from diffbir.utils.cli import UserError

log = logging.getLogger(__name__)

MARKS = {  # utf-32 first: its mark begins with that of utf-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BLOCK = 2**20
CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1b]")  # in no text; the separators from 0x1c are in names of files


class Encoding(NamedTuple):
    """Arguments of `open` for a text file."""

    encoding: str
    errors: str
    newline: str  # what ends a line


def find_encoding(path: Path) -> Encoding:
    """By the mark at the start; else UTF-8 if it is that, UTF-16 if every other byte is zero, or Windows' Latin-1.

    Raises:
        UserError: it is no text.
    """
    with path.open("rb") as file:
        head = file.read(BLOCK)
        marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
        if marked is None and len(head) > 3 and 0 in head:
            for name, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
                marked = marked or (name if zeros.count(0) > 0.7 * len(zeros) else None)
        decoder = codecs.getincrementaldecoder(marked or "utf-8")()
        newline, valid, block = "\r", True, head
        while block:
            newline = "\n" if b"\n" in block else newline
            if not marked and b"\0" in block:
                raise UserError(f"{path} has NUL bytes and is damaged or no text; write it again as UTF-8")
            try:
                valid = valid and decoder.decode(block) is not None
            except UnicodeDecodeError as error:
                if marked:
                    raise UserError(f"{path} begins as {marked} and isn't ({error}); write it as UTF-8") from error
                valid = False
            block = file.read(BLOCK)
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            if marked:
                raise UserError(f"{path} is cut short ({error}); write it again as UTF-8") from error
            valid = False
    if marked or valid:
        return Encoding(marked or "utf-8", "strict", newline)
    if CONTROLS.search(head):
        raise UserError(f"{path} is no text file; write it again as UTF-8")
    log.warning("%s is not UTF-8; it is read as Latin-1", path)
    return Encoding("cp1252", "latin1", newline)


def _as_latin_1(error: UnicodeError) -> tuple[str, int]:
    """The five bytes that Windows' Latin-1 leaves open."""
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("latin1", _as_latin_1)


def decode(text: bytes) -> str:
    """A short text that may have a mark at its start.

    Raises:
        UnicodeDecodeError: it is neither UTF-8 nor marked as something else.
    """
    return text.decode(next((name for mark, name in MARKS.items() if text.startswith(mark)), "utf-8"))


def list_lines(path: Path) -> Iterator[str]:
    """The paths in a list file, one a line; empty lines and those that begin with `#` are none.

    Raises:
        UserError: it is no text.
    """
    how, comments, count = find_encoding(path), 0, 0
    with path.open(encoding=how.encoding, errors=how.errors, newline=how.newline) as file:
        for line in file:
            name = line.strip(" \t\r\n")
            if name.startswith("#") and not _exists(path.parent, name):
                comments += 1
            elif name:
                count += 1
                raw = name.encode("cp1252", "replace").decode("utf-8", "surrogateescape")
                # A name on disk may have the same bytes as the list, whatever they mean.
                yield raw if how.encoding == "cp1252" and _exists(path.parent, raw) else as_path(name, path.parent)
    log.info("%s: %d paths%s", path, count, f", {comments} comments" if comments else "")


def as_path(name: str, folder: Path) -> str:
    """A path as a text has it -> one of this system, relative to the folder: without quotes, `~` or backslashes.

    A file that has such a name is what is meant.
    """
    if name[:1] in ("'", '"') and len(name) > 2 and name[-1] == name[0] and not _exists(folder, name):
        name = name[1:-1]
    if name.startswith("~") and not _exists(folder, name):
        name = os.path.expanduser(name)
    if "\\" in name and os.sep == "/" and not _exists(folder, name):
        name = name.replace("\\", "/")
    return name


def _exists(folder: Path, name: str) -> bool:
    return os.path.exists(folder / name)  # which is False for names that are none, unlike `Path.exists`
