"""OUTPUT/manifest.jsonl: one line of JSON an image, from the plan of a run to its end.

A line is `pending` until the image is `done` or `failed`; `refused` is a result that would have replaced a file which
no run has written. While a run goes on, lines are appended, and the last about a result counts; before and after, the
file is rewritten with one line for each result, sorted. Processes beside the first append to files of their own.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffbir.folder.writing import failure
from diffbir.utils.files import replacing

NAME = "manifest.jsonl"
PENDING, DONE, FAILED, REFUSED = "pending", "done", "failed", "refused"

Line = dict[str, Any]  # its key is "output", the result's path relative to the folder


def read(folder: Path) -> dict[str, Line]:
    """Result -> its last line; what a killed run left half written doesn't count."""
    lines = (line for path in (folder / NAME, *parts(folder)) for line in _read(path))
    return {line["output"]: line for line in lines}


def _read(path: Path) -> Iterator[Line]:
    try:
        data = path.read_bytes()
    except OSError:
        return
    for text in data.split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("output"), str) and "status" in line:
            yield line


def parts(folder: Path) -> list[Path]:
    """What processes beside the first have written."""
    return sorted(folder.glob(f".{NAME}.*[0-9]"))


def rewrite(folder: Path, lines: Iterable[Line]) -> None:
    """One line for each result in place of all that was written."""
    last = {line["output"]: line for line in lines}
    old = parts(folder)
    with replacing(folder / NAME) as part:
        part.write_bytes(b"".join(_encoded(last[output]) for output in sorted(last)))
    for path in old:
        path.unlink(missing_ok=True)


def _encoded(line: Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


class Journal:
    """Appends lines, each in one write; any thread may call it.

    Args:
        rank: number of the process.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.path = folder / (f".{NAME}.{rank}" if rank else NAME)

    def __enter__(self) -> "Journal":
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self.file).st_size
        if size and os.pread(self.file, 1, size - 1) != b"\n":  # a line that a kill cut off
            os.write(self.file, b"\n")
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.file)

    def write(self, line: Line) -> None:
        """Raises:
        UserError: the folder can't be written to any more.
        """
        data = _encoded(line)
        try:
            if os.write(self.file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise failure(error, self.path) from error


def facts(path: str | Path) -> Line:
    """What identifies an input.

    Raises:
        OSError: it can't be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": status.st_size, "modified": status.st_mtime_ns, "sha256": digest.hexdigest()}


def unchanged(line: Line, path: str) -> bool:
    """Whether a file holds what it, or another, held when the line was written; read only if its time has changed."""
    try:
        status = os.stat(path)
        if status.st_size != line.get("bytes"):
            return False
        same_file = line.get("input") == path and status.st_mtime_ns == line.get("modified")
        return same_file or facts(path)["sha256"] == line.get("sha256")
    except OSError:
        return False
