"""Which images a command line names, by folders, files, globs and lists, and where each belongs among the results."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffbir.utils import image
from diffbir.utils.cli import UserError
from diffbir.utils.texts import list_lines

HEIC = (".heic", ".heif", ".hif")
SUFFIXES = tuple(dict.fromkeys((*image.SUFFIXES, ".jpe", ".jfif", ".mpo", ".gif", ".avif", *HEIC)))

try:
    import pi_heif
except ImportError:
    pi_heif = None
else:
    pi_heif.register_heif_opener()


@dataclass(frozen=True)
class Source:
    """An image to restore, which may turn out to be missing.

    Args:
        path: absolute, without `..`.
        name: relative to the tree that it was found in, with `/`; never leads out of it.
    """

    path: str
    name: str


def find_sources(inputs: Iterable[str], output: str | Path) -> list[Source]:
    """The images of all inputs, each once and sorted by name within an input; those below `output` are results.

    An input is a folder (searched recursively), an image, a glob (`**` is any depth), or a text file that lists images
    or folders, one a line, relative to its own folder. Several inputs share the tree of their common folder.

    Raises:
        UserError: an input doesn't exist or isn't readable, or there is nothing to restore.
    """
    inputs = list(inputs)
    found = [_paths(text) for text in inputs]
    roots = [root for root, _ in found]
    root = roots[0] if len(set(roots)) == 1 else os.path.commonpath(roots)
    results = os.path.realpath(output)
    sources = {}
    for path in (path for _, paths in found for path in paths):
        if not _below(os.path.realpath(path), results):
            sources.setdefault(path, Source(path, _name(path, root)))
    if not sources:
        raise UserError(
            f"no images in {' '.join(inputs)} other than results in {output}; give another folder (looked for "
            f"{', '.join(SUFFIXES)})"
        )
    return list(sources.values())


def _paths(text: str) -> tuple[str, list[str]]:
    """Root of an input's tree, and its images; all absolute."""
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(path):
        return path, list(_walk(path))
    if os.path.isfile(path):
        return os.path.dirname(path), [path] if _is_image(path) else list(_listed(path))
    if glob.has_magic(text):
        names = sorted(glob.glob(path, recursive=True))
        fixed = re.split(r"[*?\[]", path)[0]
        matches = [p for name in names for p in (_walk(name) if os.path.isdir(name) else [name]) if _is_image(p)]
        if matches:
            return os.path.dirname(fixed), matches
        raise UserError(f"no images match {text}; looked for {', '.join(SUFFIXES)}")
    raise UserError(f"{text} does not exist; give a folder of images, an image, a glob, or a text file listing images")


def _walk(folder: str) -> Iterator[str]:
    """Images below a folder, in the order of the names on the way to them; links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # such as lost+found of a whole disk
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif _is_image(entry.name) and not entry.name.startswith("._") and not entry.is_dir():  # ._x: macOS's own
            yield entry.path


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _listed(path: str) -> Iterator[str]:
    """The images that a list names, and those below the folders that it names."""
    try:
        names = list(list_lines(Path(path)))
    except UserError as error:
        raise UserError(f"{path} is neither an image ({', '.join(SUFFIXES)}) nor a list of images: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    if not names:
        raise UserError(f"the list {path} is empty; write one image path a line, relative to the list's folder")
    for name in names:
        named = os.path.abspath(os.path.join(os.path.dirname(path), name))
        yield from _walk(named) if os.path.isdir(named) else [named]


def _below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _name(path: str, root: str) -> str:
    return (os.path.relpath(path, root) if _below(path, root) else os.path.basename(path)).replace(os.sep, "/")
