"""Why a file is refused as weights: what it is instead, or which of its entries is more than tensors."""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAGIC = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"GGUF": "a GGUF file, which is not read; get .safetensors",
    b"\x89HDF": "an HDF5 file, which is not read; get .safetensors",
    b"\x93NUMPY": "a numpy array; get the weights as .safetensors",
}
PAGE = re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml)", re.IGNORECASE)


def describe(path: Path) -> str | None:
    """What a file is that holds no weights, and what to do; None if that cannot be told."""
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        return "empty; fetch it again"
    if head.startswith(b"version https://git-lfs.github.com/"):
        return "a git-LFS pointer, which stands for the file; fetch the file itself: git lfs pull"
    if PAGE.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "a web page, which was saved in place of the file; fetch it again by the link of the download"
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any("/code/" in name for name in names):
            return "a TorchScript program, which is not run; save the state dict of its network"
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:2]) or 'nothing'}; unpack it"
    text = head.decode(errors="ignore").strip()  # the last character may be cut
    if text and len(text.encode()) > len(head) - 8 and all(c.isprintable() or c.isspace() for c in text):
        return f"a text ('{text.splitlines()[0][:60]}'); fetch the file again"
    return None


class Refused:
    """Stands for an object of a pickle that is not built; subclasses bear the name that the pickle gives."""

    def __new__(cls, *_: Any, **__: Any) -> "Refused":
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


class _Inert(pickle.Unpickler):
    """Builds plain containers, and `Refused` for all else: nothing that a pickle names is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type(f"{module}.{name}", (Refused,), {})

    def persistent_load(self, _: Any) -> Refused:
        return Refused()


def refused_entry(path: Path, name: str) -> tuple[str, ...] | None:
    """Where in the nested entries of a torch file an object of the class `name` is; None if that cannot be told."""
    try:
        for content in _pickles(path):
            trail = _find(content, name)
            if trail is not None:
                return trail
    except Exception:  # it is for a message only, and a damaged pickle raises what it likes
        pass
    return None


def _pickles(path: Path) -> Iterator[Any]:
    """What a torch file holds; in files of torch before 1.6, also the three numbers and tables before it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(member) as file:
                yield _Inert(file).load()
        return
    with path.open("rb") as file:
        for _ in range(4):
            yield _Inert(file).load()


def _find(value: Any, name: str, trail: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, Refused):
        return trail if kind.__name__ == name else None
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    found = (_find(part, name, (*trail, str(key))) for key, part in inside)
    return next((place for place in found if place is not None), None)
