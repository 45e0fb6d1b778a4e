"""The table of published weight files (weights/files.yaml): what each holds and where it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from diffbir.utils.config import ROOT

FOLDER = ROOT / "weights"


@dataclass(frozen=True)
class PublishedFile:
    """One published file.

    Args:
        holds: what is in it.
        licence: its licence.
        size: bytes; as the layout implies where the true size isn't known.
        mirrors: where it is, the best first: repositories on the Hugging Face hub (owner/name), or addresses elsewhere.
        make: command that makes it here, or None.
        sha256: checksum, None where unknown.
        note: what else one should know.
    """

    holds: str
    licence: str
    size: float
    mirrors: Sequence[str] = ()
    make: str | None = None
    sha256: str | None = None
    note: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return self.make or " or ".join(map(address, self.mirrors))


def address(mirror: str) -> str:
    """Where a mirror is, for people."""
    return mirror if "://" in mirror else f"https://huggingface.co/{mirror}"


@cache
def table() -> dict[str, PublishedFile]:
    """Name of every published file -> what is known about it."""
    rows = OmegaConf.to_container(OmegaConf.load(FOLDER / "files.yaml"))
    return {name: PublishedFile(**row) for name, row in rows.items()}


def where_to_get(path: Path) -> str:
    """What to do about a missing file."""
    known = table().get(path.name)
    if known is None:
        return "check `weights` in the configuration"
    if known.make:
        return f"make it with: {known.make}"
    note = f" ({known.note})" if known.note else ""
    return f"it is published at {known.source}{note}; scripts/download_weights.py puts it there"
