"""Millions of names and captions that loader processes share instead of copying."""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

CODING = "utf-8", "surrogateescape"  # names of files may be any bytes


class Texts(Sequence[str]):
    """Texts one after another in one buffer; a missing one is empty.

    Reading an item of a list changes the item's reference count, and the memory page that holds it is then copied into
    the loader process that reads: in the end each has a list of its own. A buffer has no counts inside.
    """

    def __init__(self, texts: Iterable[str | None] = ()):
        self.buffer, self.ends = bytearray(), array("q")
        for text in texts:
            self.append(text)

    def append(self, text: str | None) -> None:
        self.buffer += (text or "").encode(*CODING)
        self.ends.append(len(self.buffer))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        i %= len(self)
        return self.buffer[self.ends[i - 1] if i else 0 : self.ends[i]].decode(*CODING)


class Paths(Sequence[Path]):
    """Paths below one folder (a name may also be absolute)."""

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder, self.names = folder, Texts(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Path:
        return self.folder / self.names[i]
