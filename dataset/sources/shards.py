"""Tar shards in the WebDataset layout: members whose names agree up to the first dot are one sample.

Shards on a local (or mounted) disk are indexed once, which makes every sample directly readable. They are drawn like
single files: the same draw is the same pair for any number of workers and ranks and after any stop, and an epoch sees
each sample once, however unequal the shards are.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diffbir.dataset.sources.files import Sample
from diffbir.dataset.sources.tables import Captions
from diffbir.utils.cli import UserError
from diffbir.utils.files import replacing
from diffbir.utils.image import SUFFIXES, ImageError, read_rgb

# Of each member of a sample: where it starts in the tar and how long it is, bytes; a start of -1 is none.
MEMBERS = ("image", "txt", "json")
ENTRY = np.dtype([(f"{member}_{what}", "i8") for member in MEMBERS for what in ("start", "size")])


class Shards:
    """Samples of uncompressed tar files, in any order.

    A sample is an image and, where there are captions, a `.txt` (its text is called `txt`) or a `.json` (its fields).
    The index of a shard is kept beside it as `<shard>.index.npz`, where its folder can be written to.

    Args:
        source: a folder of tar files, one tar file, or several as `shards/{000..099}.tar`.
        captions: see `dataset.sources.tables.Captions`.
    """

    paired = False

    def __init__(self, source: str | Path, captions: Mapping[str, float] | None = None):
        self.paths = list_shards(source)
        indices = [load_index(path) for path in tqdm(self.paths, "indexing shards", unit="shard", leave=False)]
        self.starts = np.cumsum([0, *map(len, indices)])
        self.entries = np.concatenate(indices)
        if not len(self.entries):
            raise UserError(f"no images in the shards of {source}; looked for members {', '.join(SUFFIXES)}")
        self.captions = Captions(captions)
        unknown = set(self.captions.names) - self.texts(0).keys()
        if unknown:  # a misspelt name would train on empty prompts
            known = ", ".join(self.texts(0)) or "none"
            raise UserError(f"the first sample of {self.paths[0]} has no caption '{unknown.pop()}'; it has {known}")

    def __len__(self) -> int:
        return len(self.entries)

    def place(self, i: int) -> tuple[Path, int]:
        """The shard that holds sample `i`, and the sample's number in it."""
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.paths[shard], int(i - self.starts[shard])

    def name(self, i: int) -> str:
        path, number = self.place(i)
        return f"{path}: sample {number}"

    def key(self, i: int) -> str:
        path, number = self.place(i)
        return f"{path.name}: sample {number}"

    def texts(self, i: int) -> dict[str, str | None]:
        return parse_texts(self._member(i, "txt"), self._member(i, "json"), self.name(i))

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        image = read_rgb(io.BytesIO(self._member(i, "image")), self.name(i))
        return Sample(image, self.captions.draw(self.texts(i), rng) if self.captions.names else "")

    def _member(self, i: int, member: str) -> bytes | None:
        start, size = (int(self.entries[i][f"{member}_{what}"]) for what in ("start", "size"))
        if start < 0:
            return None
        path, _ = self.place(i)
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(size)
        except FileNotFoundError as error:
            raise ImageError(f"{path} does not exist any more; put it back, or start again without it") from error
        except OSError as error:
            raise ImageError(f"{path} cannot be read ({error.strerror}); check the disk") from error


def parse_texts(txt: bytes | None, fields: bytes | None, name: str) -> dict[str, str | None]:
    """Captions of a sample from its `.txt` and `.json` members.

    Raises:
        ImageError: they cannot be read; the message has the sample's name.
    """
    try:
        texts = {} if fields is None else dict(json.loads(fields))
        return texts if txt is None else {"txt": txt.decode(), **texts}
    except (ValueError, TypeError) as error:
        raise ImageError(f"{name} has unreadable captions ({error}); write the shard again") from error


def is_shards(source: str | Path) -> bool:
    """Whether `list_shards` is meant: a tar file, several by braces, or a folder with tar files directly in it."""
    return str(source).endswith(".tar") or any(Path(source).expanduser().glob("*.tar"))


def list_shards(source: str | Path) -> list[Path]:
    """Tar files of a folder (sorted), one tar file, or those that `{first..last}` names.

    Raises:
        UserError: there is none, or one is missing.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            raise UserError(f"no tar files in {folder}; give the folder that holds the shards")
        return paths
    paths = [Path(name).expanduser() for name in expand_braces(str(source))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]} does not exist ({len(missing)} of {len(paths)} shards); check {source}")
    return paths


def expand_braces(text: str) -> Iterator[str]:
    """`a{08..10}` -> a08, a09, a10, the digits as wide as the first number."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if not found:
        yield text
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from expand_braces(f"{text[: found.start()]}{number:0{len(first)}}{text[found.end() :]}")


def load_index(path: Path) -> NDArray:
    """Index of one shard, (N,) of `ENTRY`: from the file beside it if that is up to date, else from the shard."""
    cache, stat = path.with_name(f"{path.name}.index.npz"), path.stat()
    key = np.array([stat.st_size, stat.st_mtime_ns])
    try:
        with np.load(cache) as stored:
            if np.array_equal(stored["key"], key) and stored["entries"].dtype == ENTRY:
                return stored["entries"]
    except (OSError, ValueError, KeyError, EOFError):
        pass  # absent, or damaged: it is made again
    entries = index_shard(path)
    try:
        with replacing(cache) as part, part.open("wb") as file:
            np.savez(file, key=key, entries=entries)
    except OSError:
        pass  # a folder that cannot be written to: indexed again at the next start
    return entries


def index_shard(path: Path) -> NDArray:
    """Finds the samples of a tar file from its headers alone, in their order; (N,) of `ENTRY`.

    Raises:
        UserError: it is damaged or compressed.
    """
    entries: list[dict[str, int]] = []
    current = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = split_name(member.name)
                if not member.isfile() or key is None:
                    continue
                if key != current:
                    current = key
                    entries.append({})
                kind = "image" if f".{suffix}" in SUFFIXES else suffix
                if kind in MEMBERS:
                    entries[-1] |= {f"{kind}_start": member.offset_data, f"{kind}_size": member.size}
                tar.members.clear()  # tarfile keeps every header that it has seen
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable, uncompressed tar file ({error}); fetch it again") from error
    samples = [tuple(entry.get(field, -1) for field in ENTRY.names) for entry in entries if "image_start" in entry]
    return np.array(samples, dtype=ENTRY)


def split_name(name: str) -> tuple[str | None, str]:
    """A member's sample and kind: `a/b.c.PNG` -> (`a/b`, `c.png`); a name without either belongs to none."""
    folder, slash, name = name.rpartition("/")
    key, _, suffix = name.partition(".")
    return f"{folder}{slash}{key}" if key else None, suffix.lower()


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Writes samples, each a key without dots and its members by suffix, as a tar file of the same bytes every time.

    Returns:
        The number of samples.
    """
    count = 0
    with replacing(path) as part, tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            count += 1
    return count
